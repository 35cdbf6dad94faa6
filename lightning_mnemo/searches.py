"""Lightning's searches for a learning rate or a batch size: they train, and then go back.

Nothing of that is a step of the fit: no snapshot is taken, and a search that a crash interrupts is
begun anew. One whose result a snapshot knows is not repeated: it might find something else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner.lr_finder import _determine_lr_attr_name
from lightning.pytorch.utilities.parsing import lightning_getattr, lightning_setattr

from lightning_mnemo.loops import LoopHooks
from mnemo.session.keeper import Keeper
from mnemo.session.report import say


def only_searches(trainer: pl.Trainer) -> bool:
    """Whether this fit is a ``Tuner``'s, which ends when its search does."""
    return any(finder._early_exit for finder in _finders(trainer))


class Searches:
    """Of one fit, on every rank."""

    def __init__(self, trainer: pl.Trainer, keeper: Keeper) -> None:
        """Prepare.

        Args:
            trainer: Whose fit it is.
            keeper: Waited for before a search changes parameters.
        """
        self._trainer = trainer
        self._keeper = keeper
        self._found: dict[str, Any] | None = None
        self._under_way = False

    def resume_from(self, saved: dict[str, Any]) -> None:
        """Go on with what was found, in place of a search."""
        self._found = saved

    def forget(self) -> None:
        """Search after all; what is searched for in mid-training was never found before."""
        self._found = None

    def install(self, hooks: LoopHooks) -> None:
        """Follow the callbacks that search."""
        for finder in _finders(self._trainer):
            name = "lr_find" if isinstance(finder, LearningRateFinder) else "scale_batch_size"
            hooks.around(finder, name, functools.partial(self._around_search, finder))

    def state(self) -> dict[str, Any]:
        """What is set to what was found, by attribute."""
        module = self._trainer.lightning_module
        names = filter(None, (_attribute(finder, module) for finder in _finders(self._trainer)))
        return {name: lightning_getattr(module, name) for name in names}

    def apart(self, advice: Callable[..., Any]) -> Callable[..., Any]:
        """``advice`` for `LoopHooks.around`, which does not see what a search does."""

        def unless_searching(
            trainer: pl.Trainer, original: Callable[..., Any], *args: Any, **named: Any
        ) -> Any:
            if self._under_way:
                return original(*args, **named)
            return advice(trainer, original, *args, **named)

        return unless_searching

    def _around_search(
        self,
        finder: LearningRateFinder | BatchSizeFinder,
        trainer: pl.Trainer,
        original: Callable[..., None],
        *args: Any,
        **named: Any,
    ) -> None:
        if self._found is not None:
            self._take_over(finder, self._found)
            return
        self._keeper.before_update()
        self._keeper.pause()
        self._under_way = True
        try:
            original(*args, **named)
        finally:
            self._under_way = False

    def _take_over(
        self, finder: LearningRateFinder | BatchSizeFinder, found: dict[str, Any]
    ) -> None:
        trainer = self._trainer
        module = trainer.lightning_module
        if name := _attribute(finder, module):
            lightning_setattr(module, name, found[name])
        what = "learning rate"
        if isinstance(finder, BatchSizeFinder):
            what = "batch size"
            finder.optimal_batch_size = found[name]
            # One that was made to count the steps to come has the size from before the search.
            trainer.fit_loop._combined_loader = None
            trainer.fit_loop.epoch_loop.val_loop._combined_loader = None
        if trainer.is_global_zero:
            say(f"the {what} is not searched again: the run goes on with the one it had")


def _finders(trainer: pl.Trainer) -> list[LearningRateFinder | BatchSizeFinder]:
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [c for c in callbacks if isinstance(c, (LearningRateFinder, BatchSizeFinder))]


def _attribute(finder: LearningRateFinder | BatchSizeFinder, module: pl.LightningModule) -> str:
    """Where it puts what it finds; empty if nowhere."""
    if isinstance(finder, BatchSizeFinder):
        return finder._batch_arg_name
    return _determine_lr_attr_name(module, finder._attr_name) if finder._update_attr else ""
