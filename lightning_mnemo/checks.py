"""What has to be right before a fit is protected."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy

from mnemo.errors import ConfigError


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
    count = sum(isinstance(c, callback) for c in trainer.callbacks)
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
