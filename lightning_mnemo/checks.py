"""What has to be right before a fit is protected."""

from __future__ import annotations

import os
import threading

import lightning.pytorch as pl
from lightning.pytorch import callbacks as lightnings
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities.model_helpers import is_overridden

from mnemo.errors import ConfigError, ModelChangedError

_BETWEEN_UPDATES = (
    "BatchSizeFinder",
    "LearningRateFinder",
    "StochasticWeightAveraging",
    "WeightAveraging",
)
"""Callbacks that write parameters; not every version has them all."""


def require_supported(trainer: object, callback: type[pl.Callback]) -> None:
    """Raise where this trainer cannot be protected.

    Args:
        trainer: Whatever called the callback.
        callback: The callback's class, of which there may be one.

    Raises:
        ConfigError: Says what is not supported, and what is.
    """
    if not isinstance(trainer, pl.Trainer):
        kind = type(trainer)
        raise ConfigError(
            f"MnemoCallback works with lightning.pytorch, this Trainer is {kind.__module__}."
            f"{kind.__qualname__}: write 'import lightning.pytorch as pl' instead of "
            "'import pytorch_lightning as pl'"
        )
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    count = sum(isinstance(c, callback) for c in callbacks)
    if count > 1:
        raise ConfigError(f"the Trainer has {count} MnemoCallbacks: give it one")
    strategy = trainer.strategy
    supported = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy))
    if not supported or isinstance(strategy, DeepSpeedStrategy):
        raise ConfigError(
            f"MnemoCallback does not support {type(strategy).__name__}: this version protects a "
            "single device (strategy='auto') and data-parallel training (strategy='ddp'). "
            "Choose one of these, or train without the callback"
        )


def writes_early(trainer: pl.Trainer) -> bool:
    """Whether the user's code runs before a batch, where it may write weights through ``.data``.

    Nothing else would notice that a snapshot's copy is still under way then.
    """
    hook = "on_train_batch_start"
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    users = [
        c
        for c in callbacks
        if not type(c).__module__.startswith(("lightning.", "lightning_mnemo."))
    ]
    return is_overridden(hook, trainer.lightning_module) or any(
        getattr(type(c), hook) is not getattr(pl.Callback, hook) for c in users
    )


def why_not_replaced(trainer: pl.Trainer) -> str:
    """Why a rank of this fit cannot be replaced while the others go on; empty if it can."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if getattr(trainer.strategy, "_process_group_backend", "") != "mnemo":
        return 'needs strategy="mnemo_ddp" and mnemo run'
    if not trainer.lightning_module.automatic_optimization:
        return "optimization is manual"
    if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        return "loaders are made anew (reload_dataloaders_every_n_epochs)"
    writers = tuple(getattr(lightnings, n) for n in _BETWEEN_UPDATES if hasattr(lightnings, n))
    for callback in callbacks:
        if isinstance(callback, writers):
            return f"{type(callback).__name__} writes parameters between two updates"
    return ""


def what_is_off(trainer: pl.Trainer, why_not: str) -> list[str]:
    """What this training lacks, in lines for its start.

    Args:
        trainer: Whose fit it is.
        why_not: Why no rank is replaced; empty if one is.
    """
    lines = []
    if trainer.world_size > 1 and why_not:
        then = "a crash restarts all ranks from memory"
        if "MNEMO_AGENT" not in os.environ:
            then = "a crash ends all ranks, and the next start resumes from memory"
        lines.append(f"replacing a single rank is off: {why_not}; {then}")
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        lines.append(
            "forked or spawned ranks cannot tell a script's fits apart: only one fit may use this "
            "run id (strategy='ddp' has no such limit)"
        )
    if threading.current_thread() is not threading.main_thread():
        lines.append(
            "SIGTERM is not noticed by a fit outside the main thread: it ends the process at once, "
            "and the steps since the last snapshot are computed again"
        )
    return lines


def optimizers_differ(step: int, run_id: str, error: Exception) -> ModelChangedError:
    """The error for optimizers that cannot take the snapshot's state."""
    return ModelChangedError(
        f"the optimizer state in the snapshot of step {step} of run {run_id} does not fit this "
        f"script's optimizers: {error}. Nothing was overwritten. Use another run.id for them, or "
        "run.resume=never to give the old state up"
    )
