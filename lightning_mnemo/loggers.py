"""Loggers go on where the snapshot was, so that each step is there once."""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from lightning_mnemo.event_files import EventTail, rewind
from mnemo.session import afterwards
from mnemo.session.keeper import End


class LoggerState(Protocol):
    """What one logger has written so far, and how to go on from there."""

    def state(self) -> dict[str, Any]:
        """What `adopt` needs; at every snapshot, so it is cheap."""
        ...

    def adopt(self, saved: dict[str, Any], *, writes: bool) -> None:
        """Continue the interrupted life's version; ``writes``: this process writes it."""
        ...

    def attach(self) -> None:
        """In the rank that writes; the logger is as it will be during the fit."""
        ...

    def close(self, end: End) -> None:
        """The fit is over."""
        ...


def logger_states(trainer: pl.Trainer) -> list[LoggerState | None]:
    """One for each logger, None for kinds that take care of themselves or cannot be helped."""
    return [_state_of(logger) for logger in trainer.loggers]


def _state_of(logger: Logger) -> LoggerState | None:
    if isinstance(logger, TensorBoardLogger):
        return _TensorBoard(logger)
    if isinstance(logger, CSVLogger):
        return _Csv(logger)
    if isinstance(logger, WandbLogger):
        return _Wandb(logger)
    return None


class _TensorBoard:
    def __init__(self, logger: TensorBoardLogger) -> None:
        self._logger = logger
        self._tail = EventTail(logger)

    def state(self) -> dict[str, Any]:
        return {
            "version": self._logger.version,
            "directory": str(self._logger.log_dir),
            "events": self._tail.state(),
        }

    def adopt(self, saved: dict[str, Any], *, writes: bool) -> None:
        _continue_version(self._logger, saved, writes=writes)
        if writes:
            rewind(Path(saved["directory"]), saved["events"])
        self._logger._default_hp_metric = False  # it is there

    def attach(self) -> None:
        self._tail.attach()

    def close(self, end: End) -> None:
        self._tail.close()


class _Csv:
    """The writer holds rows back, and deletes the file of a version that is there already."""

    def __init__(self, logger: CSVLogger) -> None:
        self._logger = logger
        self._rows = 0
        """Rows on disk."""
        self._writer: Any = None

    def state(self) -> dict[str, Any]:
        return {
            "version": self._logger.version,
            "directory": str(self._logger.log_dir),
            "rows": self._rows,
            "tail": [] if self._writer is None else [dict(row) for row in self._writer.metrics],
        }

    def adopt(self, saved: dict[str, Any], *, writes: bool) -> None:
        directory = Path(saved["directory"])
        kept = _read_rows(directory, saved["rows"]) if writes else []
        _continue_version(self._logger, saved, writes=writes)
        if not writes:
            return
        (directory / "metrics.csv").unlink(missing_ok=True)
        writer: Any = self._logger.experiment
        writer.metrics = kept
        writer.save()
        writer.metrics = list(saved["tail"])
        self._rows = len(kept)

    def attach(self) -> None:
        writer: Any = self._logger.experiment
        if writer is self._writer:
            return
        self._writer = writer
        save = writer.save

        def save_and_count() -> None:
            self._rows += len(writer.metrics)
            save()
            # A second name keeps the rows from a successor's writer, which begins by deleting.
            with contextlib.suppress(OSError):
                os.link(writer.metrics_file_path, _second_name(Path(writer.log_dir)))

        writer.save = save_and_count

    def close(self, end: End) -> None:
        if self._writer is None:
            return
        vars(self._writer).pop("save", None)
        second_name = _second_name(Path(self._writer.log_dir))
        if end is End.FINISHED:
            afterwards.remove_when_over(second_name)
        elif end is End.GIVEN_UP:
            second_name.unlink(missing_ok=True)
        self._writer = None


def _second_name(directory: Path) -> Path:
    return directory / ".metrics.mnemo.csv"


def _read_rows(directory: Path, count: int) -> list[dict[str, str]]:
    for path in (_second_name(directory), directory / "metrics.csv"):
        if path.exists():
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))[:count]
            path.unlink()
            return [{k: v for k, v in row.items() if v} for row in rows]
    return []


class _Wandb:
    """W&B continues a run by its id. Give the logger one, and no run is opened in vain."""

    def __init__(self, logger: WandbLogger) -> None:
        self._logger = logger

    def state(self) -> dict[str, Any]:
        return {"version": self._logger.version}

    def adopt(self, saved: dict[str, Any], *, writes: bool) -> None:
        logger: Any = self._logger
        if not writes or not saved["version"] or saved["version"] == logger.version:
            return
        fresh = getattr(logger._experiment, "dir", None)
        _drop_experiment(logger)
        if fresh is not None and logger._offline:
            shutil.rmtree(Path(fresh).parent, ignore_errors=True)
        logger._wandb_init.update(id=saved["version"], resume="allow")
        logger._id = saved["version"]

    def attach(self) -> None:
        """Nothing to follow."""

    def close(self, end: End) -> None:
        """Nothing to end."""


def _continue_version(
    logger: TensorBoardLogger | CSVLogger, saved: dict[str, Any], *, writes: bool
) -> None:
    """Go on in the version of the interrupted life; the one made a moment ago is removed."""
    fresh = Path(logger.log_dir)
    _drop_experiment(logger)
    logger._version = saved["version"]
    if writes and fresh != Path(saved["directory"]) and fresh.is_dir():
        shutil.rmtree(fresh)


def _drop_experiment(logger: Any) -> None:
    experiment, logger._experiment = logger._experiment, None
    for method in ("close", "finish"):
        end = getattr(experiment, method, None)
        if callable(end):
            end()
            return
