"""`MnemoCallback`: snapshots and exact resume for an unchanged Lightning script.

The parts that it puts together: `resume` from a found snapshot to the first batch, `boundaries`
from then on, and `loops` for the places of Lightning's loops that a callback does not reach.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from typing_extensions import Unpack

from lightning_mnemo.boundaries import Boundaries
from lightning_mnemo.checks import require_supported, what_is_off
from lightning_mnemo.extras import replicas
from lightning_mnemo.identity import fingerprints
from lightning_mnemo.loops import LoopHooks
from lightning_mnemo.resume import Resume
from lightning_mnemo.searches import only_searches
from lightning_mnemo.signals import StopSignals
from mnemo import faults
from mnemo.config import load_config
from mnemo.errors import NothingToResumeError
from mnemo.session import prefetch
from mnemo.session.keeper import End, Keeper
from mnemo.session.place import current_place, next_fit, shared_identity
from mnemo.session.report import say
from mnemo.session.session import expected_size


class Sections(TypedDict, total=False):
    """Settings by section: LightningCLI takes no argument whose name it cannot see."""

    run: Mapping[str, Any]
    snapshot: Mapping[str, Any]
    protect: Mapping[str, Any]
    persist: Mapping[str, Any]
    recover: Mapping[str, Any]
    predict: Mapping[str, Any]
    monitor: Mapping[str, Any]
    network: Mapping[str, Any]


class MnemoCallback(pl.Callback):
    """Keeps the training's state in the memory of a process that outlives it.

    ::

    trainer = L.Trainer(callbacks=[MnemoCallback("mnemo.yaml")])
    trainer.fit(model)      # takes snapshots; resumes where an earlier life of the run ended
    """

    def __init__(self, config: str | Path | None = None, **sections: Unpack[Sections]) -> None:
        """Read the configuration; in a restarted rank, begin to read its newest snapshot.

        Args:
            config: YAML file; None reads environment and defaults only.
            sections: Settings as arguments: ``snapshot={"every": 10}``.

        Raises:
            ConfigError: A setting is unknown or wrong.
        """
        self._config = load_config(config, **sections)
        prefetch.begin(self._config)
        self._keeper: Keeper | None = None
        self._resume: Resume | None = None
        self._boundaries: Boundaries | None = None
        self._hooks: LoopHooks | None = None
        self._signals: StopSignals | None = None
        self._done = False

    # --- beginning ----------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Every rank, when the process group is there and before anything is restored."""
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            prefetch.drop()
            return
        require_supported(trainer, MnemoCallback)
        if only_searches(trainer):  # what was read ahead is the next fit's
            return
        self._done = False
        replicas = isinstance(trainer.strategy, DDPStrategy)
        place = current_place(self._config, replicas=replicas, device=trainer.strategy.root_device)
        self._keeper = keeper = Keeper(
            self._config, shared_identity(self._config), place, next_fit()
        )
        try:
            restored = keeper.find()
        except BaseException as error:
            nothing = isinstance(error, NothingToResumeError)
            self._close(End.GIVEN_UP if nothing else End.INTERRUPTED)
            raise
        self._resume = Resume(trainer, keeper, restored, seed_samples=self._config.run.seed_samples)
        self._hooks = LoopHooks(trainer)
        self._resume.install(self._hooks)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Every rank, when everything is restored but the loops' position."""
        keeper, resume, hooks = self._keeper, self._resume, self._hooks
        if keeper is None or resume is None or hooks is None:
            return
        keeper.begin(
            {**fingerprints(trainer), **resume.made},
            replicas(trainer),
        )
        if resume.restored is None:
            resume.announce_without()
            keeper.reserve(expected_size(pl_module, trainer.optimizers))
        if keeper.place.rank == 0:
            for line in what_is_off(trainer, keeper.why_not_replaced):
                say(line)
        resume.outputs.attach()
        self._boundaries = Boundaries(trainer, keeper, resume)
        self._boundaries.install(hooks)
        self._signals = StopSignals(keeper.request_stop)
        self._signals.install(trainer)

    # --- training -----------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Every rank, every batch."""
        faults.reach("forward", step=trainer.global_step)

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor
    ) -> None:
        """Every rank, every batch."""
        if self._boundaries is not None:
            self._boundaries.loss = loss.detach()
        faults.reach("backward", step=trainer.global_step)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """In manual optimization anything may be written from here on, as SAM does."""
        if self._keeper is not None and not pl_module.automatic_optimization:
            self._keeper.before_update()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Every rank, right before parameters change."""
        if self._keeper is not None:
            self._keeper.pass_update()
            faults.reach("update", step=trainer.global_step)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Every rank, every validation batch."""
        if not trainer.sanity_checking:
            faults.reach("validation", step=trainer.global_step)

    # --- end ----------------------------------------------------------------------------------

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The training ended well."""
        if self._keeper is not None:
            self._keeper.before_update()
        self._done = True

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """The training ended by an error, a signal or Ctrl-C; only the last wants nothing kept."""
        wanted = not isinstance(exception, KeyboardInterrupt)
        if wanted and self._boundaries is not None:
            self._boundaries.left_early()
        self._close(End.INTERRUPTED if wanted else End.GIVEN_UP)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The fit is over."""
        if stage != "fit":
            return
        end = End.FINISHED if self._done else End.INTERRUPTED
        if self._resume is not None and self._boundaries is None:
            self._resume.announce_idle()
            if self._resume.restored is None:
                end = End.GIVEN_UP  # there is nothing to resume
        self._close(end)

    def _close(self, end: End) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            return
        for part in (self._signals, self._hooks, self._boundaries):
            if part is not None:
                part.undo()
        if self._resume is not None:
            self._resume.outputs.close(end)
        keeper.close(end)
        self._signals = self._hooks = self._boundaries = self._resume = None
