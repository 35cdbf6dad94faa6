"""SIGTERM and SIGUSR1 ask for a stop after the current step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

from lightning.pytorch.plugins.environments import SLURMEnvironment


class StopSignals:
    """Handlers for one fit, in the main thread; anywhere else nothing is changed."""

    def __init__(self, request_stop: Callable[[], None]) -> None:
        self._request_stop = request_stop
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Take the signals over. Slurm's own signal stays Lightning's, which requeues by it."""
        if threading.current_thread() is not threading.main_thread():
            return
        wanted = [signal.SIGTERM]
        if not SLURMEnvironment.detect():
            wanted.append(signal.SIGUSR1)
        for number in wanted:
            self._before[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        del number, frame
        self._request_stop()

    def undo(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
