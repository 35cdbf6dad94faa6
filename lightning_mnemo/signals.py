"""SIGTERM and SIGUSR1 ask for a stop after the current step, with its state kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment


class StopSignals:
    """Handlers for one fit, in the main thread; anywhere else nothing is changed."""

    def __init__(self, request_stop: Callable[[], None]) -> None:
        self._request_stop = request_stop
        self._before: dict[int, Any] = {}

    def install(self, trainer: pl.Trainer) -> None:
        """Take the signals over, but for the one at which Lightning requeues a Slurm job."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in {signal.SIGTERM, signal.SIGUSR1} - {_requeues_at(trainer)}:
            self._before[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        del number, frame
        self._request_stop()

    def undo(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


def _requeues_at(trainer: pl.Trainer) -> int | None:
    """The signal at which Lightning saves a checkpoint itself and calls ``scontrol requeue``."""
    connector = trainer._accelerator_connector  # type: ignore[attr-defined]
    environment = connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return environment.requeue_signal
    return None
