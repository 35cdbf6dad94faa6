"""One snapshot on its way, as the training thread and the copy thread share it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch

from mnemo.errors import SnapshotError
from mnemo.snapshot.plan import CopyPlan


@dataclass
class Counters:
    """What happened so far. Seconds are of the training thread unless said otherwise."""

    captured: int = 0
    sealed: int = 0
    dropped: int = 0
    torn: int = 0
    suspect: int = 0
    failed: int = 0
    stall_s: float = 0.0
    capture_s: float = 0.0
    copy_s: float = 0.0
    """Seconds of the copy thread in the newest copy."""


@dataclass
class Job:
    """One snapshot on its way."""

    tick: int
    step: int
    plan: CopyPlan
    small: bytes
    position: dict[str, int]
    tensors: list[torch.Tensor]
    versions: list[int]
    before: list[int] | None
    """Digests of this rank's chunks when the snapshot was taken, where it is verified."""
    granted: threading.Event = field(default_factory=threading.Event)
    copied: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)
    cancelled: bool = False
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> None:
        """Copy thread: a buffer is there, from here on an update has to wait.

        Raises:
            CancelledError: It has not waited for that.
        """
        with self._turn:
            if self.cancelled:
                raise CancelledError("no buffer became free in time")
            self.granted.set()

    def give_up(self) -> bool:
        """Training thread: do not wait for it. False if its copy has begun: wait for its end."""
        with self._turn:
            self.cancelled = True
            if not self.granted.is_set():
                self.copied.set()
            return not self.granted.is_set()


class CancelledError(SnapshotError):
    """The training went on without this snapshot."""
