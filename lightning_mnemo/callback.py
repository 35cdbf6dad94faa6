"""`MnemoCallback`: snapshots and exact resume for an unchanged Lightning script."""

from __future__ import annotations

import os
import signal
import threading
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
from lightning_mnemo.data import DataPosition
from lightning_mnemo.loggers import Outputs
from lightning_mnemo.metrics import capture_metrics, restore_metrics
from mnemo import faults
from mnemo.config import load_config
from mnemo.errors import ConfigError
from mnemo.session.identity import (
    data_fingerprint,
    fingerprint,
    optimizer_fingerprint,
    script_fingerprint,
)
from mnemo.session.keeper import Keeper, Restored
from mnemo.session.place import current_place, next_fit, shared_identity
from mnemo.session.report import say
from mnemo.session.session import expected_size
from mnemo.smp.board import Position
from mnemo.snapshot.rng import restore_rng
from mnemo.types import EXIT_STATE_SAVED

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class MnemoCallback(pl.Callback):
    """Keeps the training's state in the memory of a process that outlives it::

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
        self._attributes = AttributeWatch()
        self._loss: torch.Tensor | None = None
        self._boundaries = 0
        self._steps_before = 0
        self._handlers: dict[int, Any] = {}
        self._done = False

    # --- beginning ----------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Every rank, when the process group is there and before anything is restored."""
        if stage != "fit" or trainer.fast_dev_run:
            return
        _require_lightning(trainer)
        self._done = False
        replicas = isinstance(trainer.strategy, DDPStrategy)
        place = current_place(replicas=replicas, device=trainer.strategy.root_device)
        self._keeper = keeper = Keeper(
            self._config, shared_identity(self._config), place, next_fit()
        )
        try:
            self._restored = keeper.find()
        except BaseException:
            self._close(finished=False)
            raise
        self._data = DataPosition(trainer, seed_samples=self._config.run.seed_samples)
        self._outputs = Outputs(trainer)
        if self._restored is not None:
            self._data.resume_from(self._restored.state["data"])
            self._outputs.adopt(self._restored.state["outputs"], self._restored.step)
        self._patch(trainer)

    def _patch(self, trainer: pl.Trainer) -> None:
        self._hooks = hooks = loops.LoopHooks(trainer)
        data = self._data
        assert data is not None

        def process_dataloader(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
            def wrapped(loader: Any) -> Any:
                loader = original(loader)
                return data.adopt(loader) if trainer.training else loader

            return wrapped

        def setup_data(original: Callable[[], None]) -> Callable[[], None]:
            def wrapped() -> None:
                if (
                    trainer.fit_loop._combined_loader is None
                    or trainer.fit_loop._should_reload_train_dl
                ):
                    data.reset()
                original()

            return wrapped

        def resume_start(original: Callable[..., None]) -> Callable[..., None]:
            def wrapped(checkpoint_path: Any = None, weights_only: Any = None) -> None:
                original(checkpoint_path, weights_only)
                self._choose(trainer, checkpoint_path)

            return wrapped

        def on_run_start(original: Callable[[Any], None]) -> Callable[[Any], None]:
            def wrapped(fetcher: Any) -> None:
                original(fetcher)
                self._go_on(trainer, fetcher)

            return wrapped

        def on_advance_end(original: Callable[[Any], None]) -> Callable[[Any], None]:
            def wrapped(fetcher: Any) -> None:
                self._batch_done(trainer, fetcher, original)

            return wrapped

        hooks.wrap(trainer.strategy, "process_dataloader", process_dataloader)
        hooks.wrap(trainer.fit_loop, "setup_data", setup_data)
        hooks.wrap(trainer._checkpoint_connector, "resume_start", resume_start)
        hooks.wrap(trainer.fit_loop.epoch_loop, "on_run_start", on_run_start)
        hooks.wrap(trainer.fit_loop.epoch_loop, "on_advance_end", on_advance_end)

    def _choose(self, trainer: pl.Trainer, checkpoint_path: Any) -> None:
        """Lightning asks what to resume from: a checkpoint that the user named wins over memory."""
        keeper = self._keeper
        assert keeper is not None
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") or 0) > 0
        if checkpoint_path and self._restored is not None and not restarted:
            if trainer.is_global_zero:
                say(
                    f"fit(ckpt_path={str(checkpoint_path)!r}) was asked for: the snapshot of step {self._restored.step} in memory is given up"
                )
            self._restored = None
            assert self._data is not None
            self._data.forget()
        if self._restored is None:
            keeper.forget()
            return
        keeper.accept(
            self._restored, trainer.strategy.lightning_module_state_dict(), "checkpoint.state_dict."
        )
        checkpoint = dict(self._restored.state["checkpoint"])
        if loops.finished_progress(trainer, checkpoint):
            checkpoint["loops"] = loops.before_the_end(checkpoint["loops"])
        trainer._checkpoint_connector._loaded_checkpoint = checkpoint

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Every rank, when everything is restored but the loops' position."""
        keeper = self._keeper
        if keeper is None:
            return
        loaders = (
            trainer.fit_loop._combined_loader.flattened if trainer.fit_loop._combined_loader else []
        )
        keeper.begin(
            {
                "optimizer": optimizer_fingerprint(trainer.optimizers),
                "data": data_fingerprint(loaders),
                "hyperparameters": fingerprint(
                    repr(sorted(dict(pl_module.hparams).items(), key=str))
                ),
                "script": script_fingerprint(),
            }
        )
        if self._restored is None:
            keeper.announce(None)
            keeper.reserve(expected_size(pl_module, trainer.optimizers))
        else:
            warnings.filterwarnings(
                "ignore", message="You're resuming from a checkpoint that ended before"
            )
        if keeper.place.rank == 0 and keeper.place.world_size > 1:
            missing = "mnemo run and " if "MNEMO_AGENT" not in os.environ else ""
            say(
                f"replacing a single rank is off: needs {missing}a later version's strategy; a crash restarts all ranks from memory"
            )
        self._install_signal_handlers()

    def _go_on(self, trainer: pl.Trainer, fetcher: Any) -> None:
        """The iterator of an epoch is there, no batch fetched yet: be exactly where the snapshot was."""
        restored, self._restored = self._restored, None
        self._steps_before = trainer.global_step
        if restored is None:
            return
        state = restored.state
        keeper, data = self._keeper, self._data
        assert keeper is not None
        assert data is not None
        loops.restore_progress(trainer, state["checkpoint"]["loops"])
        loops.end_restart(trainer)
        data.catch_up(fetcher)
        restore_metrics(trainer, state["metrics"])
        for name, module in trainer.lightning_module.named_modules():
            module.training = state["modes"].get(name, module.training)
        self._boundaries = restored.tick // 2
        self._steps_before = trainer.global_step
        restore_rng(restored.rng)
        pending = state["validation_pending"]
        note = "validation is repeated" if pending else ""
        if data.order_only:
            note = "the order of batches is exact; random numbers drawn in loader workers are not: set run.seed_samples"
        keeper.announce(restored, exact=not data.order_only, note=note)
        if pending:
            self._advance_end_with_validation(
                trainer,
                fetcher,
                trainer.fit_loop.epoch_loop.__class__.on_advance_end.__get__(
                    trainer.fit_loop.epoch_loop
                ),
            )

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

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Every rank, right before parameters change."""
        if self._keeper is not None:
            self._keeper.before_update()
            faults.reach("update", step=trainer.global_step)

    def _batch_done(
        self, trainer: pl.Trainer, fetcher: Any, on_advance_end: Callable[[Any], None]
    ) -> None:
        """A batch, with its logging, is done; validation may follow before the next."""
        if not loops.stepped(trainer) or trainer.global_step == self._steps_before:
            on_advance_end(fetcher)
            return
        self._steps_before = trainer.global_step
        self._boundaries += 1
        if loops.validation_is_next(trainer, fetcher):
            self._boundary(trainer, 2 * self._boundaries, validation_pending=True)
            self._advance_end_with_validation(trainer, fetcher, on_advance_end)
        else:
            on_advance_end(fetcher)
            self._boundary(trainer, 2 * self._boundaries)
        faults.reach("between", step=trainer.global_step)

    def _advance_end_with_validation(
        self, trainer: pl.Trainer, fetcher: Any, on_advance_end: Callable[[Any], None]
    ) -> None:
        on_advance_end(fetcher)
        self._boundary(trainer, 2 * self._boundaries + 1)

    def _boundary(
        self, trainer: pl.Trainer, tick: int, *, validation_pending: bool = False
    ) -> None:
        keeper = self._keeper
        if keeper is None:
            return
        progress = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        position = Position(tick, trainer.global_step, trainer.current_epoch, progress, time.time())
        keeper.boundary(
            position,
            lambda: self._state(trainer, validation_pending=validation_pending),
            volatile=lambda: {b.data_ptr() for b in trainer.lightning_module.buffers()},
            watch=("checkpoint.state_dict",),
            clean=self._loss_is_finite,
        )
        if keeper.stopping:
            self._stop(trainer)

    def _loss_is_finite(self) -> bool:
        return self._loss is None or bool(torch.isfinite(self._loss).all())

    def _state(self, trainer: pl.Trainer, *, validation_pending: bool) -> dict[str, Any]:
        """Everything that the next batch depends on, by reference."""
        module = trainer.lightning_module
        self._attributes.look(module)
        assert self._data is not None
        assert self._outputs is not None
        return {
            "checkpoint": trainer._checkpoint_connector.dump_checkpoint(weights_only=False),
            "data": self._data.state(),
            "metrics": capture_metrics(trainer),
            "modes": {name: child.training for name, child in module.named_modules()},
            "outputs": self._outputs.state(),
            "validation_pending": validation_pending,
        }

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Weights may be exchanged for validation: nothing may be under way."""
        if self._keeper is not None and not trainer.sanity_checking:
            self._keeper.before_update()
            self._keeper.pause()

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

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Callbacks that average weights write them here."""
        if self._keeper is not None:
            self._keeper.before_update()
            self._keeper.pause()

    # --- end ----------------------------------------------------------------------------------

    def _install_signal_handlers(self) -> None:
        """SIGTERM and SIGUSR1 ask all ranks to stop after the same step and keep its state.

        Slurm's own signals stay Lightning's, which requeues the job by them.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        from lightning.pytorch.plugins.environments import SLURMEnvironment

        wanted = (signal.SIGTERM,) if SLURMEnvironment.detect() else _STOP_SIGNALS
        for number in wanted:
            self._handlers[number] = signal.getsignal(number)
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        del number, frame
        if self._keeper is not None:
            self._keeper.request_stop()

    def _restore_signal_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _stop(self, trainer: pl.Trainer) -> None:
        """The snapshot of this step was just begun: seal it, persist it, leave with 75."""
        keeper = self._keeper
        assert keeper is not None
        keeper.settle(self._config.recover.grace)
        trainer.strategy.barrier("mnemo stop")
        stored = keeper.flush(self._config.recover.grace) if keeper.place.local_rank == 0 else None
        if keeper.place.rank == 0:
            where = (
                f"persisted up to step {stored}"
                if stored is not None
                else f"kept in memory for {self._config.snapshot.keep_alive:.0f} s"
            )
            say(
                f"asked to stop: step {trainer.global_step} is saved ({where}); exit code {EXIT_STATE_SAVED} asks to be started again"
            )
        raise SystemExit(EXIT_STATE_SAVED)

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
        self._restore_signal_handlers()
        if self._hooks is not None:
            self._hooks.undo()
        keeper.close(finished=finished)
        self._hooks = self._data = self._outputs = self._restored = self._loss = None


def _require_lightning(trainer: object) -> None:
    if not isinstance(trainer, pl.Trainer):
        raise ConfigError(
            f"MnemoCallback works with lightning.pytorch, this Trainer is {type(trainer).__module__}.{type(trainer).__qualname__}: "
            "write 'import lightning.pytorch as pl' instead of 'import pytorch_lightning as pl'"
        )
