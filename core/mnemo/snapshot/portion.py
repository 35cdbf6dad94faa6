"""What of a state is one rank's alone, told apart from what its replicas hold as well.

Written down at every step, so that whoever takes the rank's place has it; the rest is got from a
replica. Together they are what a snapshot of that step would give.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Final

import msgspec
import numpy as np
import torch
import xxhash

from mnemo.errors import IntegrityError
from mnemo.smp.segment import TensorEntry
from mnemo.snapshot import tree
from mnemo.snapshot.layout import Bytes, rebuild
from mnemo.snapshot.plan import CopyPlan, plan_for

_encode: Final = msgspec.msgpack.Encoder().encode


class Form(msgspec.Struct, frozen=True, array_like=True):
    """What is the same from step to step as a rule."""

    tensors: tuple[TensorEntry, ...]
    """All, in order."""
    shared: tuple[int, ...]
    """Numbers of those that replicas hold, too."""
    identity: dict[str, str]
    """Fingerprints, as a snapshot has them."""

    def digest(self) -> int:
        """Of what is shared: the same on ranks that can give each other theirs."""
        forms = [(e.name, e.dtype, e.shape, e.strides) for e in self.shared_entries()]
        return xxhash.xxh3_64_intdigest(_encode(forms))

    def shared_entries(self) -> list[TensorEntry]:
        """What replicas hold, in the order in which it is given."""
        return [self.tensors[i] for i in self.shared]


class Page(msgspec.Struct, frozen=True, array_like=True):
    """One rank's portion of a state."""

    form: Form
    step: int
    """Optimizer steps done."""
    layout: list[list[int]] | None
    """Of DDP's buckets; see `mnemo.comm.ddp`."""
    small: bytes
    """See `mnemo.snapshot.tree.TakenApart.pack`."""
    own: bytes
    """Bytes of the tensors that are not shared, each at its entry's offset."""


_decode: Final = msgspec.msgpack.Decoder(Page).decode


class _AllBut(Collection[int]):
    """Every number but these."""

    def __init__(self, numbers: set[int]) -> None:
        self._numbers = numbers

    def __contains__(self, number: object) -> bool:
        return number not in self._numbers

    def __iter__(self) -> Iterator[int]:
        raise TypeError("there is no end of them")

    def __len__(self) -> int:
        raise TypeError("there is no end of them")


class Portions:
    """Of one rank; `take` is called at each step."""

    def __init__(
        self, identity: dict[str, str], replicated: Callable[[], Iterable[torch.Tensor]]
    ) -> None:
        """Nothing is known yet.

        Args:
            identity: Fingerprints of the run.
            replicated: Gives the tensors that all replicas hold alike between two updates; asked
                when the state has other tensors than before.
        """
        self._identity = identity
        self._replicated = replicated
        self._own = _AllBut(set())
        self._plan: CopyPlan | None = None
        self._encoded = b""
        self.digest = 0
        """`Form.digest` of what was taken last."""

    def take(
        self, step: int, layout: list[list[int]] | None, taken: tree.TakenApart
    ) -> tuple[bytes, list[torch.Tensor]]:
        """The rank's own portion of a state, encoded, and the tensors that are shared.

        The latter are by reference: they hold this state until the next update.
        """
        plan, tensors = plan_for(self._plan, taken, self._own, (), (), lends=True)
        if plan is not self._plan:
            self._own = _AllBut({t.data_ptr() for t in self._replicated()})
            plan, tensors = plan_for(None, taken, self._own, (), (), lends=True)
            self._plan = plan
            form = Form(plan.layout.entries, tuple(plan.shared), self._identity)
            self._encoded = _encode(form)
            self.digest = form.digest()
        for target, source in plan.own_moves():
            if isinstance(source, torch.Tensor):
                torch.from_numpy(target).copy_(source)
            else:
                np.copyto(target, source)
        own = plan.stage[: plan.layout.own_size].tobytes()
        page = _encode([msgspec.Raw(self._encoded), step, layout, taken.pack(), own])
        return page, plan.shared_of(tensors)

    @property
    def own_size(self) -> int:
        """Bytes of tensors that are copied at each step."""
        return 0 if self._plan is None else self._plan.layout.own_size


def open_page(raw: bytes) -> Page:
    """What `Portions.take` has encoded.

    Raises:
        IntegrityError: It was not that.
    """
    try:
        return _decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise IntegrityError(f"the small state of a step cannot be read: {error}") from error


def room_for(form: Form) -> list[torch.Tensor]:
    """Fresh memory for what is shared."""
    sizes = [-(-entry.nbytes // 64) * 64 for entry in form.shared_entries()]
    stretch = torch.from_numpy(np.empty(sum(sizes), dtype=np.uint8))
    parts = torch.split(stretch, sizes)
    return [
        rebuild(entry, part[: entry.nbytes])
        for entry, part in zip(form.shared_entries(), parts, strict=True)
    ]


def join(page: Page, shared: Sequence[torch.Tensor]) -> Any:
    """The whole state.

    Args:
        page: The rank's own portion.
        shared: The rest, as a replica has it.
    """
    given = dict(zip(page.form.shared, shared, strict=True))
    own: Bytes = np.frombuffer(bytearray(page.own), dtype=np.uint8)

    def tensor(number: int) -> torch.Tensor:
        if number in given:
            return given[number]
        entry = page.form.tensors[number]
        return rebuild(entry, torch.from_numpy(own[entry.offset : entry.offset + entry.nbytes]))

    return tree.unpack(page.small, tensor, trusted=True)
