"""From the snapshot that was found to the first batch that goes on from it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from lightning_mnemo import loops
from lightning_mnemo.checks import optimizers_differ
from lightning_mnemo.data import DataPosition
from lightning_mnemo.extras import Extras
from lightning_mnemo.identity import as_built, as_configured
from lightning_mnemo.metrics import restore_metrics
from lightning_mnemo.outputs import Outputs
from lightning_mnemo.searches import Searches
from mnemo.session.announce import Start
from mnemo.session.exactness import first_sum_differs
from mnemo.session.finder import Restored
from mnemo.session.identity import does_not_load, flexible_names
from mnemo.session.keeper import Keeper
from mnemo.session.report import say
from mnemo.snapshot.listing import keep_types
from mnemo.snapshot.rng import restore_rng


class Resume:
    """Of one fit, on every rank: each step of Lightning's own restoring, and what it lacks."""

    def __init__(
        self,
        trainer: pl.Trainer,
        keeper: Keeper,
        restored: Restored | None,
        *,
        seed_samples: bool,
    ) -> None:
        """Prepare; nothing is restored yet.

        Args:
            trainer: Whose fit it is.
            keeper: Found ``restored``.
            restored: None begins anew.
            seed_samples: See `run.seed_samples`.
        """
        self._trainer = trainer
        self._keeper = keeper
        self._order_unchecked = False
        self._making_loaders = False
        """Those for training: a search makes the ones for validation in mid-training, too."""
        self.restored = restored
        """What is to be gone on from; None once that is done."""
        self.lightnings: tuple[str, int] | None = None
        """File and step that Lightning itself goes on from."""
        self.made: dict[str, str] = {}
        """Fingerprints of what a resume and training write into, as the program made it."""
        self.data = DataPosition(trainer, seed_samples=seed_samples)
        self.outputs = Outputs(trainer)
        self.searches = Searches(trainer, keeper)
        if restored is not None:
            self.data.resume_from(restored.state["data"])
            self.searches.resume_from(restored.state["searches"])
            self.outputs.let_rewrite()

    def install(self, hooks: loops.LoopHooks) -> None:
        """Follow Lightning while it makes loaders and restores."""
        trainer = self._trainer
        hooks.around(trainer.strategy, "process_dataloader", self._around_process_dataloader)
        if isinstance(trainer.strategy, DDPStrategy):
            hooks.around(trainer.strategy, "configure_ddp", self._around_configure_ddp)
        hooks.around(trainer.strategy, "setup_optimizers", self._around_setup_optimizers)
        hooks.around(trainer.strategy, "load_model_state_dict", self._around_load_model)
        hooks.around(trainer.strategy, "load_optimizer_state_dict", self._around_load_optimizers)
        hooks.around(trainer.fit_loop, "setup_data", self._around_setup_data)
        hooks.around(trainer, "_run_sanity_check", self._around_sanity_check)
        # A search goes back to where it began by a checkpoint of its own: no start of a fit.
        resume_start = self.searches.apart(self._around_resume_start)
        hooks.around(trainer._checkpoint_connector, "resume_start", resume_start)
        self.searches.install(hooks)

    def _around_process_dataloader(
        self, trainer: pl.Trainer, original: Callable[[Any], Any], loader: Any
    ) -> Any:
        loader = original(loader)
        return self.data.adopt(loader) if self._making_loaders else loader

    def _around_setup_data(self, trainer: pl.Trainer, original: Callable[[], None]) -> None:
        if trainer.fit_loop._combined_loader is None or trainer.fit_loop._should_reload_train_dl:
            self.data.reset()
        self._making_loaders = True
        try:
            with loops.as_of_epoch(trainer, self.data.loaded_in_epoch):
                original()
        finally:
            self._making_loaders = False

    def _around_configure_ddp(self, trainer: pl.Trainer, original: Callable[[], None]) -> None:
        """Ranks begin with the same model; one that takes another's place has its state by now."""
        with self._keeper.not_repeated():
            original()

    def _around_sanity_check(self, trainer: pl.Trainer, original: Callable[[], None]) -> None:
        """A rank that takes another's place makes no check, but loaders as that one did."""
        if trainer.enable_validation and self._keeper.replaces:  # type: ignore[attr-defined]
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        with self._keeper.not_repeated():
            original()

    def _around_setup_optimizers(
        self, trainer: pl.Trainer, original: Callable[..., None], *args: Any, **named: Any
    ) -> None:
        original(*args, **named)
        self.made |= as_configured(trainer)

    def _around_load_model(
        self, trainer: pl.Trainer, original: Callable[..., None], *args: Any, **named: Any
    ) -> None:
        try:
            original(*args, **named)
        except RuntimeError as error:
            if self.restored is None:
                raise
            run_id = self._keeper.identity.run_id
            raise does_not_load(self.restored.step, run_id, error) from error

    def _around_load_optimizers(
        self, trainer: pl.Trainer, original: Callable[[Any], None], checkpoint: Any
    ) -> None:
        try:
            original(checkpoint)
        except (ValueError, KeyError) as error:
            if self.restored is None:
                raise
            raise optimizers_differ(
                self.restored.step, self._keeper.identity.run_id, error
            ) from error
        if self.restored is not None:
            saved = checkpoint["optimizer_states"]
            for optimizer, state in zip(trainer.optimizers, saved, strict=True):
                keep_types(optimizer, state)

    def _around_resume_start(
        self,
        trainer: pl.Trainer,
        original: Callable[..., None],
        checkpoint_path: Any = None,
        **options: Any,
    ) -> None:
        """Lightning asks what to resume from."""
        original(checkpoint_path, **options)
        self.made |= as_built(trainer)
        if checkpoint_path:
            self._weigh(str(checkpoint_path))
        restored = self.restored
        if restored is None:
            self._keeper.forget()
            return
        self._keeper.accept(
            restored,
            trainer.strategy.lightning_module_state_dict(),
            ["checkpoint.state_dict."],
            flexible_names(trainer.lightning_module),
        )
        with self._keeper.not_repeated():
            self.outputs.adopt(restored.state["outputs"], joins=self._keeper.joins)
        checkpoint = loops.without_loader_states(restored.state["checkpoint"])
        if loops.finished_progress(trainer, checkpoint):
            checkpoint["loops"] = loops.before_the_end(checkpoint["loops"])
        trainer._checkpoint_connector._loaded_checkpoint = checkpoint
        warnings.filterwarnings(
            "ignore", message="You're resuming from a checkpoint that ended before"
        )

    def _weigh(self, path: str) -> None:
        """Lightning has loaded a checkpoint, too: give the snapshot up if that one counts more.

        One that the user named does, unless it was for the start that an agent now repeats. One
        that Lightning found by itself does if it is newer.
        """
        step = self._trainer._checkpoint_connector._loaded_checkpoint["global_step"]
        restored = self.restored
        if restored is not None:
            why = f"fit(ckpt_path={path!r}) was asked for"
            if self._keeper.joins:
                return
            if path in _found_by_lightning(self._trainer):
                if restored.step >= step:
                    return
                why = f"{path} is of step {step}"
            elif int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") or 0) > 0:
                return
            if self._trainer.is_global_zero:
                say(f"{why}: the snapshot of step {restored.step} in {restored.origin} is given up")
        self.restored = None
        self.lightnings = (path, step)
        self.data.forget()
        self.searches.forget()

    def go_on(self, fetcher: Any, extras: Extras) -> Restored | None:
        """The iterator of an epoch is there, nothing fetched: be where the snapshot was."""
        restored, self.restored = self.restored, None
        if restored is None:
            return None
        self.searches.forget()
        trainer, data, state = self._trainer, self.data, restored.state
        loops.restore_progress(trainer, state["checkpoint"]["loops"])
        loops.end_restart(trainer)
        data.catch_up(fetcher)
        restore_metrics(trainer, state["metrics"])
        self.outputs.show_epoch()
        lost = extras.restore(state["extras"], state["checkpoint"]["optimizer_states"])
        self._order_unchecked = True
        restore_rng(restored.rng)
        repeated = "validation is repeated" if state["validation_pending"] else ""
        sums = first_sum_differs(trainer.strategy.model, trainer.world_size)
        inexact = [note for note in (data.note, sums, lost) if note]
        self._keeper.announce(
            restored, exact=not inexact, note="; ".join(filter(None, [repeated, *inexact]))
        )
        return restored

    def announce_without(self) -> None:
        """The line of a start that goes on from no snapshot."""
        keeper = self._keeper
        if self.lightnings is None:
            keeper.announce(None)
        elif keeper.place.rank == 0:
            start = Start(keeper.config, keeper.identity, keeper.fit, keeper.place.world_size)
            start.goes_on_from(keeper.journal, *self.lightnings, whose="Lightning")

    def announce_idle(self) -> None:
        """The line of a start that has nothing to train: it was asked for less than there is."""
        keeper, restored = self._keeper, self.restored
        if keeper.place.rank != 0:
            return
        why = "this fit was asked for no step"
        if restored is not None:
            why = (
                f"the snapshot of step {restored.step} in {restored.origin} is behind all that "
                "this fit was asked for; it is kept"
            )
        elif self.lightnings is not None:
            path, step = self.lightnings
            why = f"{path}, of step {step}, is behind all that this fit was asked for"
        say(f"run {keeper.identity.run_id} · nothing to do: {why}")

    def check_order(self) -> None:
        """The first batch of a resumed epoch is there: its sampler has drawn everything again."""
        if not self._order_unchecked:
            return
        self._order_unchecked = False
        if verdict := self.data.verdict():
            keeper = self._keeper
            say(f"not exact: {verdict}")
            keeper.journal.write(
                "degraded",
                run=keeper.identity.run_id,
                rank=keeper.place.rank,
                kind="order",
                text=verdict,
            )


def _found_by_lightning(trainer: pl.Trainer) -> set[str]:
    """Paths that a fit without ``ckpt_path`` resumes from: of a requeued job, or of an error."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found = {str(c.ckpt_path) for c in callbacks if isinstance(c, OnExceptionCheckpoint)}
    requeued = trainer._checkpoint_connector._hpc_resume_path
    return found if requeued is None else {*found, requeued}
