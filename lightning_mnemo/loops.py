"""The places in Lightning's loops that a callback does not reach, patched on their instances.

Lightning 2.4–2.6. Each patch is undone when the fit ends. What is patched and why:

- ``fit_loop.epoch_loop.on_advance_end``: the one moment at which a batch, its logging, its
  validation and its checkpoints are all done, and nothing of the next has begun.
- ``fit_loop.epoch_loop.on_run_start``: the one moment after the iterator was made and before the
  first batch is fetched, where an interrupted epoch can be gone on with.
- ``fit_loop.on_advance_start``: after every hook that begins a training, before any of an epoch.
- ``fit_loop.on_advance_end``: after an epoch's last batch and before any hook that ends the epoch.
- ``fit_loop.setup_data``: where loaders are made, or made anew.
- ``strategy.process_dataloader``: where loaders pass before they are iterated.
- ``strategy.configure_ddp``, ``_run_sanity_check``: what a rank that takes a lost one's place does
  alone, and the others did at their start.
- ``strategy.setup_optimizers``: where optimizers and schedulers are as the program made them.
- ``strategy.load_model_state_dict``, ``strategy.load_optimizer_state_dict``: where a snapshot that
  does not fit is refused.
- ``_checkpoint_connector.resume_start``: where Lightning chooses what to resume from.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl


class LoopHooks:
    """Instance patches of one trainer, for one fit."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._patched: list[tuple[object, str]] = []

    def around(self, target: object, name: str, advice: Callable[..., Any]) -> None:
        """Let ``advice(trainer, original, *args)`` run for method ``name`` of ``target``."""
        original = getattr(target, name)
        setattr(target, name, functools.partial(advice, self._trainer, original))
        self._patched.append((target, name))

    def undo(self) -> None:
        """Remove all patches; the classes' own methods show again."""
        for target, name in reversed(self._patched):
            vars(target).pop(name, None)
        self._patched.clear()


def stepped(trainer: pl.Trainer) -> bool:
    """In automatic optimization: whether the batch that just ended ended with an update."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


@contextlib.contextmanager
def as_of_epoch(trainer: pl.Trainer, epoch: int | None) -> Iterator[None]:
    """Let a loader be made as it was in ``epoch``, and count its age from there; None: now."""
    current = trainer.fit_loop.epoch_progress.current
    now = current.completed
    if epoch is not None:
        current.completed = epoch
    try:
        yield
    finally:
        current.completed = now


def validation_is_next(trainer: pl.Trainer, fetcher: Any) -> bool:
    """Whether ``on_advance_end`` is about to run validation."""
    loop = trainer.fit_loop.epoch_loop
    return bool(loop._should_check_val_fx(fetcher)) and not loop._skip_next_val


def end_restart(trainer: pl.Trainer) -> None:
    """Tell the loops that they are where they say, so that they repeat and skip nothing."""
    fit_loop = trainer.fit_loop
    fit_loop.epoch_loop.restarting = False
    fit_loop._restarting = False
    fit_loop.epoch_loop.reset_restart_stage()


def finished_progress(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> bool:
    """Whether it was taken after the last step: Lightning would skip what follows that."""
    return bool(trainer.max_steps != -1 and checkpoint["global_step"] >= trainer.max_steps)


def before_the_end(saved: dict[str, Any]) -> dict[str, Any]:
    """Loop states of a finished training that do not say so yet.

    Lightning returns at once from a fit whose step limit is reached, without the hooks that end
    the last epoch. The true counts are set by `restore_progress` when the epoch is entered.
    """
    fit = dict(saved["fit_loop"])
    for key, value in fit.items():
        if "optim_step_progress" in key or key.endswith("optim_progress"):
            fit[key] = _zeroed(value)
    return {**saved, "fit_loop": fit}


def _zeroed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _zeroed(v) for k, v in value.items()}
    return 0 if isinstance(value, int) and not isinstance(value, bool) else value


def without_loader_states(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A shallow copy whose loaders Lightning does not position: it would do so a batch too late."""
    fit = dict(checkpoint["loops"]["fit_loop"])
    fit["state_dict"] = {k: v for k, v in fit["state_dict"].items() if k != "combined_loader"}
    return {**checkpoint, "loops": {**checkpoint["loops"], "fit_loop": fit}}


def restore_progress(trainer: pl.Trainer, saved: dict[str, Any]) -> None:
    """Set every counter of the training epoch's loops to what it was."""
    fit = saved["fit_loop"]
    prefix = "epoch_loop."
    state = {k.removeprefix(prefix): v for k, v in fit.items() if k.startswith(prefix)}
    trainer.fit_loop.epoch_loop.load_state_dict(state)
