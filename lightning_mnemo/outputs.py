"""What a fit writes to disk besides mnemo's own: logs and checkpoint files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar

from lightning_mnemo.loggers import logger_states
from mnemo.session.keeper import End

_UNSAVED = (
    "_last_global_step_saved",
    "_last_checkpoint_saved",
    "_defer_save_until_validation",
    "current_score",
)
"""What a `ModelCheckpoint` remembers but does not restore from a checkpoint."""


class Outputs:
    """All of them, for one fit."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._loggers = logger_states(trainer)
        self._patched: list[ModelCheckpoint] = []
        # Not yet what the callbacks make of it when they are set up.
        self._directories = [callback.dirpath for callback in self._checkpoints()]

    def let_rewrite(self) -> None:
        """What LightningCLI's callback wrote in an earlier life is no mistake of the user's."""
        for callback in self._trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "overwrite") and hasattr(callback, "already_saved"):
                callback.overwrite = True

    def state(self) -> dict[str, Any]:
        """How far each has come."""
        return {
            "loggers": [s and {"kind": type(s).__name__, **s.state()} for s in self._loggers],
            "checkpoints": [
                {
                    "directory": callback.dirpath,
                    **{name: getattr(callback, name, None) for name in _UNSAVED},
                }
                for callback in self._checkpoints()
            ],
        }

    def adopt(self, saved: dict[str, Any], *, joins: bool) -> None:
        """Continue those of the interrupted life; callbacks were set up, but not restored.

        Args:
            saved: What `state` gave.
            joins: This process takes a lost rank's place: nobody else is asked for directories.
        """
        writes = self._trainer.is_global_zero
        for logger, state in zip(self._loggers, saved["loggers"], strict=False):
            if logger is not None and state and state["kind"] == type(logger).__name__:
                logger.adopt(state, writes=writes)
        for callback, directory in zip(self._checkpoints(), self._directories, strict=True):
            callback.dirpath = directory
            if not joins:
                callback.setup(self._trainer, self._trainer.lightning_module, "fit")
        for callback, state in zip(self._checkpoints(), saved["checkpoints"], strict=False):
            if joins:
                callback.dirpath = state["directory"]
            vars(callback).update({k: v for k, v in state.items() if hasattr(callback, k)})
            self._overwrite_repeated(callback)

    def attach(self) -> None:
        """Training begins: follow what is written, in the rank that writes."""
        for logger in self._loggers:
            if logger is not None and self._trainer.is_global_zero:
                logger.attach()

    def show_epoch(self) -> None:
        """In the middle of an epoch: the bar was never told that it has begun."""
        bar = self._trainer.progress_bar_callback
        if isinstance(bar, TQDMProgressBar) and not bar.is_disabled:
            shown = bar.train_progress_bar
            total = bar.total_train_batches
            shown.total = None if total == float("inf") else total
            shown.set_description(f"Epoch {self._trainer.current_epoch}")

    def close(self, end: End) -> None:
        """The fit is over."""
        for logger in self._loggers:
            if logger is not None:
                logger.close(end)
        for callback in self._patched:
            vars(callback).pop("file_exists", None)
        self._patched.clear()

    def _checkpoints(self) -> list[ModelCheckpoint]:
        found = self._trainer.checkpoint_callbacks
        return [callback for callback in found if isinstance(callback, ModelCheckpoint)]

    def _overwrite_repeated(self, callback: ModelCheckpoint) -> None:
        """A file that an earlier life wrote is replaced, instead of a ``-v1`` beside it."""
        earlier: set[str] | None = None

        def file_exists(filepath: Any, trainer: pl.Trainer) -> bool:
            nonlocal earlier
            if earlier is None:  # by now the callback knows its directory
                earlier = {str(p) for p in Path(callback.dirpath or "").glob("*.ckpt")}
            files = callback._fs
            exists = files.exists(filepath) and str(filepath) not in earlier
            earlier.discard(str(filepath))
            # The callback's own asks the others: a rank in another's place does as they do.
            callback._fs = SimpleNamespace(exists=lambda _: exists)  # type: ignore[assignment]
            try:
                return type(callback).file_exists(callback, filepath, trainer)
            finally:
                callback._fs = files

        callback.file_exists = file_exists  # type: ignore[method-assign]
        self._patched.append(callback)
