"""Whether a state may be kept, told by the losses before and after it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from mnemo.errors import SmpError
from mnemo.session.sources import NOTHING
from mnemo.smp import messages as m
from mnemo.smp.board import Position
from mnemo.smp.link import Link


class Losses:
    """One rank's. A loss is looked at when the next snapshot is due: it may still be computed."""

    def __init__(self, link: Link, degraded: Callable[[str, str], None]) -> None:
        self._link = link
        self._degraded = degraded
        self._captured = NOTHING
        """Tick of the newest snapshot."""
        self._first: torch.Tensor | None = None
        """The first loss that was computed with what it holds."""

    def observe(self, loss: torch.Tensor | None) -> None:
        """A step is done."""
        if self._first is None:
            self._first = loss

    def captured(self, tick: int) -> None:
        """A snapshot was taken: the next loss is the first that speaks about it."""
        self._captured, self._first = tick, None

    def allow(self, position: Position, loss: torch.Tensor | None) -> bool:
        """Whether nothing speaks against the state at ``position``, the step with ``loss``.

        If the first loss after the newest snapshot was not finite, that snapshot is void.
        """
        if self._first is not None and not _is_finite(self._first):
            self._degraded(
                "suspect", f"the first loss after snapshot {self._captured // 2} is not finite"
            )
            with contextlib.suppress(SmpError):
                self._link.ask(m.Resume(self._captured - 1), m.Done)
            self._first = None
        elif loss is None or _is_finite(loss):
            return True
        self._degraded(
            "suspect", f"step {position.step} has a non-finite loss: the snapshot before it is kept"
        )
        with contextlib.suppress(SmpError):
            self._link.ask(m.Drop(position.tick), m.Done)
        return False


def _is_finite(loss: torch.Tensor) -> bool:
    return bool(torch.isfinite(loss).all())
