"""Loggers and checkpoint files go on where the snapshot was, so that each step is there once."""

from __future__ import annotations

import csv
import shutil
import struct
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger


class Outputs:
    """What a fit writes to disk besides mnemo's own: logger versions, checkpoint files."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer

    def state(self) -> dict[str, Any]:
        """Identity of every logger's current version."""
        return {"loggers": [_identity(logger) for logger in self._trainer.loggers]}

    def adopt(self, saved: dict[str, Any], step: int) -> None:
        """Continue the versions of the interrupted life. Before any checkpoint callback looks.

        Args:
            saved: From `state`.
            step: Entries of later steps are removed: they will be written again.
        """
        for logger, identity in zip(self._trainer.loggers, saved["loggers"], strict=False):
            if identity is not None and identity["class"] == type(logger).__name__:
                _continue(logger, identity, step, is_writer=self._trainer.is_global_zero)
        for callback in self._trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                _overwrite_repeated(callback)


def _identity(logger: Logger) -> dict[str, Any] | None:
    if isinstance(logger, (TensorBoardLogger, CSVLogger)):
        return {
            "class": type(logger).__name__,
            "version": logger.version,
            "directory": str(logger.log_dir),
        }
    if isinstance(logger, WandbLogger):
        return {"class": type(logger).__name__, "version": logger.version, "directory": None}
    return None


def _continue(logger: Logger, identity: dict[str, Any], step: int, *, is_writer: bool) -> None:
    if isinstance(logger, (TensorBoardLogger, CSVLogger)):
        fresh = Path(logger.log_dir)
        _drop_experiment(logger)
        logger._version = identity["version"]
        if is_writer and fresh != Path(logger.log_dir) and fresh.is_dir():
            shutil.rmtree(
                fresh
            )  # made a moment ago by this very process, which asked for a new version
        directory = Path(identity["directory"])
        if is_writer and directory.is_dir():
            if isinstance(logger, TensorBoardLogger):
                for file in sorted(directory.glob("events.out.tfevents.*")):
                    truncate_events(file, step)
            else:
                _reload_csv(logger, directory / "metrics.csv", step)
    elif isinstance(logger, WandbLogger) and is_writer and identity["version"]:
        _drop_experiment(logger)
        logger._wandb_init["id"] = logger._id = identity["version"]
        logger._wandb_init["resume"] = "allow"


def _drop_experiment(logger: Any) -> None:
    experiment, logger._experiment = logger._experiment, None
    for method in ("close", "finish"):
        end = getattr(experiment, method, None)
        if callable(end):
            end()
            return


def truncate_events(file: Path, step: int) -> None:
    """Drop a TensorBoard file's events of steps from ``step`` on, counted from 0.

    A TFRecord is a length (u64), its CRC (u32), the data, their CRC (u32); records are copied with
    their CRCs. A torn last record, which a killed writer leaves, is dropped too.
    """
    from tensorboard.compat.proto.event_pb2 import Event

    raw = file.read_bytes()
    kept, position = [], 0
    while position + 12 <= len(raw):
        (length,) = struct.unpack_from("<Q", raw, position)
        end = position + 12 + length + 4
        if end > len(raw):
            break
        event = Event.FromString(raw[position + 12 : end - 4])
        if event.step < step or not event.HasField("summary"):
            kept.append(raw[position:end])
        position = end
    content = b"".join(kept)
    if content != raw:
        draft = file.with_name(f".{file.name}.tmp")
        draft.write_bytes(content)
        draft.replace(file)


def _reload_csv(logger: CSVLogger, file: Path, step: int) -> None:
    """The CSV writer rewrites its file from memory: give it the rows that stay."""
    if not file.exists():
        return
    with file.open(newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if int(row.get("step") or 0) < step]
    content = file.read_bytes()
    file.unlink()  # the writer refuses, with a warning, a directory that has one
    experiment = logger.experiment
    del content
    experiment.metrics = [{k: v for k, v in row.items() if v != ""} for row in rows]
    experiment.metrics_keys = sorted({k for row in experiment.metrics for k in row})
    if experiment.metrics:
        experiment.save()


def _overwrite_repeated(callback: ModelCheckpoint) -> None:
    """A checkpoint that is written again after a resume replaces its twin, instead of a ``-v1`` beside it."""
    original = callback.file_exists
    known = {str(p) for p in Path(callback.dirpath).glob("*.ckpt")} if callback.dirpath else set()

    def file_exists(filepath: Any, trainer: pl.Trainer) -> bool:
        path = str(filepath)
        if path in known:
            known.discard(path)
            return False
        return original(filepath, trainer)

    callback.file_exists = file_exists  # type: ignore[method-assign]
