"""What a rank keeps ready at every boundary, for itself and for others that may be lost.

Its own small state goes to a ledger, which its successor reads; what all replicas share it gives to
the successor of another rank, as long as it holds the values of that boundary.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.nn.parallel import DistributedDataParallel

from mnemo.comm import ddp
from mnemo.errors import ReplayError
from mnemo.smp.ledger import Ledger
from mnemo.smp.link import Link
from mnemo.snapshot.portion import Portions
from mnemo.snapshot.tree import TakenApart

_version: Final = operator.attrgetter("_version")
_BOTH: Final = 2
"""A boundary, and the same behind its validation."""


@dataclass(frozen=True)
class Offer:
    """What all replicas hold alike at a boundary, by reference."""

    tensors: Sequence[torch.Tensor]
    versions: Sequence[int]
    digest: int
    """Of their names and forms."""

    @property
    def is_untouched(self) -> bool:
        """Whether nothing was written to them that torch has counted."""
        return list(map(_version, self.tensors)) == self.versions


class Ready:
    """Of one rank. The training thread writes, another one asks for what can be given."""

    def __init__(
        self, link: Link, name: str, portions: Portions, model: DistributedDataParallel
    ) -> None:
        """Keep nothing yet.

        Args:
            link: To the SMP, which holds the ledger.
            name: Of the ledger's memory, for people.
            portions: Divides the state.
            model: Whose buckets a successor has to have, too.
        """
        self._model: Any = model
        self._buckets: list[list[int]] | None = None
        self._link = link
        self._name = name
        self._portions = portions
        self._ledger: Ledger | None = None
        self._offers: dict[int, Offer] = {}
        """By tick, of those whose update is not passed yet."""
        self._newest = -1
        self._changed = threading.Condition()

    def write(self, tick: int, step: int, taken: TakenApart) -> None:
        """A boundary is reached.

        Raises:
            SmpError, OSError: Nobody holds this rank's ledger.
        """
        page, tensors = self._portions.take(step, self._layout(), taken)
        offer = Offer(tensors, list(map(_version, tensors)), self._portions.digest)
        with self._changed:
            self._offers = dict([*self._offers.items(), (tick, offer)][-_BOTH:])
            self._newest = tick
            self._changed.notify_all()
        if self._ledger is not None and self._ledger.fits(len(page)):
            self._ledger.write(tick, page)
            return
        old, self._ledger = self._ledger, Ledger(self._name, len(page))
        self._ledger.write(tick, page)
        self._link.keep_ledger(self._ledger.fd)
        if old is not None:
            old.close()

    def _layout(self) -> list[list[int]] | None:
        """Of DDP's buckets, which is found out once it stays the same: that takes long."""
        if self._buckets is None:
            self._buckets = ddp.layout(self._model)
        return self._buckets

    def pass_update(self) -> None:
        """Parameters change now: what was kept for others is of no boundary any more."""
        with self._changed:
            self._offers = {}

    def offer(self, tick: int, patience_s: float) -> Offer:
        """What can be given to a rank that begins again at ``tick``, once this one is there, too.

        Raises:
            ReplayError: This rank has gone past it, or does not come there.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._newest >= tick, patience_s)
            found = self._offers.get(tick)
        if found is None:
            past = self._newest > tick or (self._newest == tick and not self._offers)
            what = "has updated its parameters since" if past else "has not come there"
            raise ReplayError(f"the lost rank was at boundary {tick}, and this one {what}")
        return found

    def close(self) -> None:
        """Let go of the ledger, which is the SMP's then; harmless a second time."""
        self.pass_update()
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None
