"""`MnemoCallback`: snapshots and exact resume for an unchanged Lightning script."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_mnemo import loops
from lightning_mnemo.attributes import AttributeWatch
from lightning_mnemo.checks import optimizers_differ, require_supported, what_is_off, writes_early
from lightning_mnemo.data import DataPosition
from lightning_mnemo.extras import Extras
from lightning_mnemo.identity import fingerprints
from lightning_mnemo.metrics import capture_metrics, restore_metrics
from lightning_mnemo.outputs import Outputs
from lightning_mnemo.signals import StopSignals, leave
from mnemo import faults
from mnemo.config import load_config
from mnemo.errors import NothingToResumeError
from mnemo.session.keeper import Keeper, Restored
from mnemo.session.place import current_place, next_fit, shared_identity
from mnemo.session.report import say
from mnemo.session.session import expected_size
from mnemo.smp.board import Position
from mnemo.snapshot.rng import restore_rng


class MnemoCallback(pl.Callback):
    """Keeps the training's state in the memory of a process that outlives it.

    ::

    trainer = L.Trainer(callbacks=[MnemoCallback("mnemo.yaml")])
    trainer.fit(model)      # takes snapshots; resumes where an earlier life of the run ended
    """

    def __init__(self, config: str | Path | None = None, **sections: Mapping[str, Any]) -> None:
        """Read the configuration; nothing else happens before ``fit``.

        Args:
            config: YAML file; None reads environment and defaults only.
            sections: Settings as arguments: ``snapshot={"every": 10}``.

        Raises:
            ConfigError: A setting is unknown or wrong.
        """
        self._config = load_config(config, **sections)
        self._keeper: Keeper | None = None
        self._restored: Restored | None = None
        self._hooks: loops.LoopHooks | None = None
        self._data: DataPosition | None = None
        self._outputs: Outputs | None = None
        self._extras: Extras | None = None
        self._signals: StopSignals | None = None
        self._attributes = AttributeWatch()
        self._loss: torch.Tensor | None = None
        self._boundaries = 0
        self._steps_before = 0
        self._just_resumed = False
        self._done = False

    # --- beginning ----------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Every rank, when the process group is there and before anything is restored."""
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        require_supported(trainer, MnemoCallback)
        self._done = self._just_resumed = False
        self._boundaries = self._steps_before = 0
        replicas = isinstance(trainer.strategy, DDPStrategy)
        place = current_place(replicas=replicas, device=trainer.strategy.root_device)
        self._keeper = keeper = Keeper(
            self._config, shared_identity(self._config), place, next_fit()
        )
        try:
            self._restored = keeper.find()
        except BaseException as error:
            self._close(finished=isinstance(error, NothingToResumeError))
            raise
        self._data = DataPosition(trainer, seed_samples=self._config.run.seed_samples)
        self._outputs = Outputs(trainer)
        if self._restored is not None:
            self._data.resume_from(self._restored.state["data"])
            self._outputs.let_rewrite()
        self._hooks = hooks = loops.LoopHooks(trainer)
        loop = trainer.fit_loop
        hooks.around(trainer.strategy, "process_dataloader", self._around_process_dataloader)
        hooks.around(trainer.strategy, "load_optimizer_state_dict", self._around_load_optimizers)
        hooks.around(loop, "setup_data", self._around_setup_data)
        hooks.around(loop, "on_advance_end", self._around_epoch_end)
        hooks.around(loop.epoch_loop, "on_run_start", self._around_run_start)
        hooks.around(loop.epoch_loop, "on_advance_end", self._batch_done)
        if writes_early(trainer):
            hooks.around(loop.epoch_loop, "advance", self._around_advance)
        hooks.around(trainer._checkpoint_connector, "resume_start", self._around_resume_start)

    def _around_process_dataloader(
        self, trainer: pl.Trainer, original: Callable[[Any], Any], loader: Any
    ) -> Any:
        assert self._data is not None
        loader = original(loader)
        return self._data.adopt(loader) if trainer.training else loader

    def _around_setup_data(self, trainer: pl.Trainer, original: Callable[[], None]) -> None:
        assert self._data is not None
        if trainer.fit_loop._combined_loader is None or trainer.fit_loop._should_reload_train_dl:
            self._data.reset()
        with loops.as_of_epoch(trainer, self._data.loaded_in_epoch):
            original()

    def _around_epoch_end(self, trainer: pl.Trainer, original: Callable[[], None]) -> None:
        self._weights_may_change()
        original()

    def _around_run_start(
        self, trainer: pl.Trainer, original: Callable[[Any], None], fetcher: Any
    ) -> None:
        assert self._data is not None
        if self._restored is None:
            self._data.begin_epoch()
        original(fetcher)
        self._go_on(trainer, fetcher)

    def _around_advance(
        self, trainer: pl.Trainer, original: Callable[[Any], None], fetcher: Any
    ) -> None:
        if self._keeper is not None:
            self._keeper.before_update()
        original(fetcher)

    def _around_resume_start(
        self,
        trainer: pl.Trainer,
        original: Callable[..., None],
        checkpoint_path: Any = None,
        **options: Any,
    ) -> None:
        original(checkpoint_path, **options)
        self._choose(trainer, checkpoint_path)

    def _around_load_optimizers(
        self, trainer: pl.Trainer, original: Callable[[Any], None], checkpoint: Any
    ) -> None:
        try:
            original(checkpoint)
        except (ValueError, KeyError) as error:
            restored, keeper = self._restored, self._keeper
            if restored is None or keeper is None:
                raise
            raise optimizers_differ(restored.step, keeper.identity.run_id, error) from error

    def _choose(self, trainer: pl.Trainer, checkpoint_path: Any) -> None:
        """Lightning asks what to resume from: a checkpoint that the user named wins over memory."""
        keeper = self._keeper
        assert keeper is not None
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") or 0) > 0
        if checkpoint_path and self._restored is not None and not restarted:
            if trainer.is_global_zero:
                say(
                    f"fit(ckpt_path={str(checkpoint_path)!r}) was asked for: the snapshot of step "
                    f"{self._restored.step} in memory is given up"
                )
            self._restored = None
            assert self._data is not None
            self._data.forget()
        if self._restored is None:
            keeper.forget()
            return
        keeper.accept(
            self._restored,
            trainer.strategy.lightning_module_state_dict(),
            ["checkpoint.state_dict."],
        )
        if self._outputs is not None:
            self._outputs.adopt(self._restored.state["outputs"])
        checkpoint = loops.without_loader_states(self._restored.state["checkpoint"])
        if loops.finished_progress(trainer, checkpoint):
            checkpoint["loops"] = loops.before_the_end(checkpoint["loops"])
        trainer._checkpoint_connector._loaded_checkpoint = checkpoint

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Every rank, when everything is restored but the loops' position."""
        keeper = self._keeper
        if keeper is None:
            return
        keeper.begin(fingerprints(trainer))
        if self._restored is None:
            keeper.announce(None)
            keeper.reserve(expected_size(pl_module, trainer.optimizers))
        else:
            warnings.filterwarnings(
                "ignore", message="You're resuming from a checkpoint that ended before"
            )
        if keeper.place.rank == 0 and keeper.place.world_size > 1:
            for line in what_is_off(trainer):
                say(line)
        if self._outputs is not None:
            self._outputs.attach()
        self._extras = Extras(trainer)
        self._extras.watch_optimizers(keeper)
        self._signals = StopSignals(keeper.request_stop)
        self._signals.install()

    def _go_on(self, trainer: pl.Trainer, fetcher: Any) -> None:
        """The iterator of an epoch is there, nothing fetched: be where the snapshot was."""
        restored, self._restored = self._restored, None
        self._steps_before = trainer.global_step
        if restored is None:
            return
        state = restored.state
        keeper, data, extras = self._keeper, self._data, self._extras
        assert keeper is not None
        assert data is not None
        assert extras is not None
        loops.restore_progress(trainer, state["checkpoint"]["loops"])
        loops.end_restart(trainer)
        data.catch_up(fetcher)
        restore_metrics(trainer, state["metrics"])
        if self._outputs is not None:
            self._outputs.show_epoch()
        extras.restore(state["extras"], state["checkpoint"]["optimizer_states"])
        self._boundaries = restored.tick // 2
        self._steps_before = trainer.global_step
        self._just_resumed = True
        restore_rng(restored.rng)
        pending = state["validation_pending"]
        notes = ["validation is repeated"] if pending else []
        keeper.announce(
            restored, exact=not data.note, note="; ".join([*notes, *filter(None, [data.note])])
        )
        if pending:
            loop = trainer.fit_loop.epoch_loop
            self._validate(trainer, fetcher, type(loop).on_advance_end.__get__(loop))

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
        self._loss = loss.detach()
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
            self._keeper.before_update()
            faults.reach("update", step=trainer.global_step)

    def _batch_done(
        self, trainer: pl.Trainer, on_advance_end: Callable[[Any], None], fetcher: Any
    ) -> None:
        """A batch, with its logging, is done; validation may follow before the next."""
        assert self._data is not None
        self._data.observe(fetcher)
        if self._just_resumed:
            self._just_resumed = False
            self._check_order()
        validates = loops.validation_is_next(trainer, fetcher)
        if not self._stepped(trainer):
            if validates:
                self._weights_may_change()
            on_advance_end(fetcher)
            return
        self._steps_before = trainer.global_step
        self._boundaries += 1
        if validates:
            self._boundary(trainer, 2 * self._boundaries, validation_pending=True)
            self._validate(trainer, fetcher, on_advance_end)
        else:
            on_advance_end(fetcher)
            self._boundary(trainer, 2 * self._boundaries)
        if self._extras is not None:
            self._extras.begin_batch()
        faults.reach("between", step=trainer.global_step)

    def _stepped(self, trainer: pl.Trainer) -> bool:
        """Whether the batch that just ended ended with an update."""
        if trainer.lightning_module.automatic_optimization:
            return loops.stepped(trainer) and trainer.global_step != self._steps_before
        return self._extras is not None and self._extras.has_stepped()

    def _validate(
        self, trainer: pl.Trainer, fetcher: Any, on_advance_end: Callable[[Any], None]
    ) -> None:
        """Validate, and take a snapshot of the same step again, which knows that it is done."""
        self._weights_may_change()
        on_advance_end(fetcher)
        self._boundary(trainer, 2 * self._boundaries + 1)

    def _weights_may_change(self) -> None:
        """What runs now may write or exchange weights, and does not count as step time."""
        if self._keeper is not None:
            self._keeper.before_update()
            self._keeper.pause()

    def _check_order(self) -> None:
        """The first batch of a resumed epoch is there: its sampler has drawn everything again."""
        keeper, data = self._keeper, self._data
        verdict = data.verdict() if data is not None else ""
        if keeper is None or not verdict:
            return
        say(f"not exact: {verdict}")
        keeper.journal.write(
            "degraded",
            run=keeper.identity.run_id,
            rank=keeper.place.rank,
            kind="order",
            text=verdict,
        )

    def _boundary(
        self, trainer: pl.Trainer, tick: int, *, validation_pending: bool = False
    ) -> None:
        keeper = self._keeper
        if keeper is None:
            return
        assert self._extras is not None
        progress = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        # Lightning counts no steps of optimizers that are stepped behind its back.
        step = trainer.global_step or self._boundaries
        position = Position(tick, step, trainer.current_epoch, progress, time.time())
        keeper.boundary(
            position,
            lambda: self._state(trainer, validation_pending=validation_pending),
            volatile=self._extras.volatile,
            watch=("checkpoint.state_dict",),
            loss=self._loss,
        )
        if keeper.stopping:
            leave(trainer, keeper)

    def _state(self, trainer: pl.Trainer, *, validation_pending: bool) -> dict[str, Any]:
        """Everything that the next batch depends on, by reference."""
        module = trainer.lightning_module
        self._attributes.look(module)
        assert self._data is not None
        assert self._outputs is not None
        assert self._extras is not None
        return {
            "checkpoint": trainer._checkpoint_connector.dump_checkpoint(weights_only=False),
            "data": self._data.state(),
            "metrics": capture_metrics(trainer),
            "extras": self._extras.state(),
            "outputs": self._outputs.state(),
            "validation_pending": validation_pending,
        }

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
        self._close(finished=isinstance(exception, KeyboardInterrupt))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The fit is over."""
        if stage == "fit":
            self._close(finished=self._done)

    def _close(self, *, finished: bool) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            return
        for part in (self._signals, self._hooks, self._extras):
            if part is not None:
                part.undo()
        if self._outputs is not None:
            self._outputs.close(finished=finished)
        keeper.close(finished=finished)
        self._signals = self._hooks = self._extras = None
        self._data = self._outputs = self._restored = self._loss = None
