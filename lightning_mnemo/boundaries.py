"""Where an optimizer step and all that belongs to it is done, and what is kept of it there."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_mnemo import loops
from lightning_mnemo.checkpoint import list_checkpoint
from lightning_mnemo.checks import writes_early
from lightning_mnemo.extras import Extras
from lightning_mnemo.metrics import capture_metrics
from lightning_mnemo.resume import Resume
from mnemo import faults
from mnemo.session.announce import note_interrupted
from mnemo.session.keeper import Keeper
from mnemo.session.modules import ModuleTree
from mnemo.session.stop import leave
from mnemo.smp.board import Position


class Boundaries:
    """Of one fit, on every rank: counts the steps and takes a snapshot where one is due.

    The tick of a step is twice its number; the same step after its validation is one more.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        keeper: Keeper,
        resume: Resume,
    ) -> None:
        """Training begins: everything is restored but the loops' position.

        Args:
            trainer: Whose fit it is.
            keeper: Takes the snapshots.
            resume: Asked to go on when the first epoch begins.
        """
        self._trainer = trainer
        self._keeper = keeper
        self._resume = resume
        self._data = resume.data
        self._outputs = resume.outputs
        self._tree = ModuleTree(trainer.lightning_module)
        self._extras = Extras(trainer)
        self._extras.watch_optimizers(keeper)
        self._number = 0
        self._steps_before = 0
        self._begun = False
        """Whether the line of this start has been said."""
        self.loss: torch.Tensor | None = None
        """Of the newest batch."""

    def install(self, hooks: loops.LoopHooks) -> None:
        """Follow Lightning's loops."""
        loop, apart = self._trainer.fit_loop, self._resume.searches.apart
        hooks.around(loop, "on_advance_start", apart(self._around_epoch_start))
        hooks.around(loop, "on_advance_end", apart(self._around_epoch_end))
        hooks.around(loop.epoch_loop, "on_run_start", apart(self._around_run_start))
        hooks.around(loop.epoch_loop, "on_advance_end", apart(self._batch_done))
        if writes_early(self._trainer):
            hooks.around(loop.epoch_loop, "advance", apart(self._around_advance))

    def undo(self) -> None:
        """The fit is over."""
        self._extras.undo()

    def left_early(self) -> None:
        """An exception ends the fit: whatever it has done since the last boundary is lost."""
        keeper = self._keeper
        if self._begun:
            note_interrupted(
                keeper.journal,
                run=keeper.identity.run_id,
                fit=keeper.fit,
                rank=keeper.place.rank,
                step=self._steps_done(),
            )

    def _around_epoch_start(self, trainer: pl.Trainer, original: Callable[[], None]) -> None:
        if not self._begun:  # every hook that begins a training has run, and none of an epoch
            self._extras.begin()
        original()

    def _around_epoch_end(self, trainer: pl.Trainer, original: Callable[[], None]) -> None:
        self._weights_may_change()
        original()

    def _around_run_start(
        self, trainer: pl.Trainer, original: Callable[[Any], None], fetcher: Any
    ) -> None:
        if self._resume.restored is None:
            self._data.begin_epoch()
        original(fetcher)
        restored = self._resume.go_on(fetcher, self._extras)
        self._begun = True
        self._steps_before = trainer.global_step
        if restored is None:
            return
        self._number = restored.tick // 2 - restored.base
        if restored.state["validation_pending"]:
            loop = trainer.fit_loop.epoch_loop
            self._validate(fetcher, type(loop).on_advance_end.__get__(loop))

    def _around_advance(
        self, trainer: pl.Trainer, original: Callable[[Any], None], fetcher: Any
    ) -> None:
        self._keeper.before_update()
        original(fetcher)

    def _batch_done(
        self, trainer: pl.Trainer, on_advance_end: Callable[[Any], None], fetcher: Any
    ) -> None:
        """A batch, with its logging, is done; validation may follow before the next."""
        self._data.observe(fetcher)
        self._resume.check_order()
        validates = loops.validation_is_next(trainer, fetcher)
        if not self._stepped():
            if validates:
                self._weights_may_change()
            on_advance_end(fetcher)
            return
        self._steps_before = trainer.global_step
        self._number += 1
        if validates:
            self._take(2 * self._number, validation_pending=True)
            self._validate(fetcher, on_advance_end)
        else:
            on_advance_end(fetcher)
            self._take(2 * self._number)
        self._extras.begin_batch()
        faults.reach("between", step=trainer.global_step)

    def _stepped(self) -> bool:
        """Whether the batch that just ended ended with an update."""
        trainer = self._trainer
        if trainer.lightning_module.automatic_optimization:
            return loops.stepped(trainer) and trainer.global_step != self._steps_before
        return self._extras.has_stepped()

    def _validate(self, fetcher: Any, on_advance_end: Callable[[Any], None]) -> None:
        """Validate, and take a snapshot of the same step again, which knows that it is done."""
        self._weights_may_change()
        on_advance_end(fetcher)
        self._take(2 * self._number + 1)

    def _weights_may_change(self) -> None:
        """What runs now may write or exchange weights, and does not count as step time."""
        self._keeper.before_update()
        self._keeper.pause()

    def _take(self, tick: int, *, validation_pending: bool = False) -> None:
        trainer, keeper = self._trainer, self._keeper
        progress = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        position = Position(tick, self._steps_done(), trainer.current_epoch, progress, time.time())
        keeper.boundary(
            position,
            lambda: self._state(validation_pending=validation_pending),
            volatile=self._extras.volatile,
            watch=("checkpoint.state_dict",),
            loss=self.loss,
        )
        if keeper.stopping:
            leave(keeper, trainer.global_step)

    def _steps_done(self) -> int:
        """Of the whole run; Lightning counts none of optimizers stepped behind its back."""
        return self._trainer.global_step or self._number

    def _state(self, *, validation_pending: bool) -> dict[str, Any]:
        """Everything that the next batch depends on, by reference."""
        trainer = self._trainer
        modules = self._tree.modules()
        return {
            "checkpoint": list_checkpoint(trainer),
            "data": self._data.state(),
            "metrics": capture_metrics(trainer, modules),
            "extras": self._extras.state(modules),
            "outputs": self._outputs.state(),
            "searches": self._resume.searches.state(),
            "validation_pending": validation_pending,
        }
