"""Which bytes of a state are copied when, and where to: made once, used at every snapshot."""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch

from mnemo.smp.segment import CHUNK
from mnemo.snapshot import copier, tree
from mnemo.snapshot.layout import (
    SMALL,
    Bytes,
    Layout,
    byte_view,
    dtype_name,
    is_dense,
    make_layout,
)

_where: Final = operator.methodcaller("data_ptr")


@dataclass
class CopyPlan:
    """A layout, views of the tensors it was made for, and the copies to be done."""

    parts: list[tree.Part]
    members: list[torch.Tensor]
    """Tensors of ``parts``."""
    signature: list[tuple[Any, ...]]
    """Of the tensors outside stable parts."""
    names: list[str]
    layout: Layout
    own: list[int]
    """Numbers of the tensors that are copied at once."""
    shared: list[int]
    numbers: list[str]
    lends: bool
    """The shared tensors are only named, and not copied: they may lie anywhere."""
    pointers: list[int]
    """``data_ptr`` of all tensors, or of those that are copied."""
    loose: list[int]
    """Tensors without one stretch of memory: their sources are copies, made anew each time."""
    sources: list[Bytes | torch.Tensor]
    stage: Bytes
    chunks: list[list[copier.Piece]] | None = None
    """The shared part, piece by piece; None after a tensor has moved."""
    jobs: dict[int, tuple[copier.Job, copier.Job]] = field(default_factory=dict)
    """By segment: how to fill its own and its shared part."""
    witnessed: int = 0
    at_once: list[tuple[Bytes, Bytes | torch.Tensor]] | None = None
    lasting: list[torch.Tensor] | None = None
    """The shared ones among ``members``."""

    def own_moves(self) -> list[tuple[Bytes, Bytes | torch.Tensor]]:
        """The copies that are done at once, into ``stage``."""
        if self.at_once is None:
            places = [(self.layout.entries[i], self.sources[i]) for i in self.own]
            self.at_once = [(self.stage[e.offset : e.offset + e.nbytes], s) for e, s in places]
        return self.at_once

    def reshaped(self) -> list[str]:
        """Names of lasting tensors that lie where they did, but are read in another way now."""
        entries = self.layout.entries[len(self.signature) :]
        return [
            entry.name
            for i, (tensor, entry) in enumerate(
                zip(self.members, entries, strict=True), len(self.signature)
            )
            if tensor.shape != entry.shape
            or dtype_name(tensor) != entry.dtype
            or (tensor.stride() != entry.strides and i not in self.loose)
        ]

    def shared_of(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Those of all ``tensors`` that are copied in the background, in the order of `shared`."""
        fleeting = len(self.signature)
        if self.lasting is None:
            self.lasting = [tensors[i] for i in self.shared if i >= fleeting]
        return [
            tensors[i] for i in self.shared[: len(self.shared) - len(self.lasting)]
        ] + self.lasting

    def is_for(self, taken: tree.TakenApart, signature: list[tuple[Any, ...]]) -> bool:
        """Whether this plan is for these tensors, wherever their memory lies."""
        return (
            self.signature == signature
            and len(self.parts) == len(taken.parts)
            and all(map(operator.is_, self.parts, taken.parts))
        )

    def follow(self, tensors: list[torch.Tensor]) -> bool:
        """Look for the tensors where they are now.

        Returns:
            False if one has another form by now, so that this plan is of no use.
        """
        followed = [tensors[i] for i in self.own] if self.lends else tensors
        pointers = list(map(_where, followed))
        if self.pointers != pointers:
            numbers = self.own if self.lends else range(len(tensors))
            places = zip(numbers, self.pointers, pointers, strict=True)
            moved = [i for i, before, now in places if before != now]
            for i in moved:
                tensor, entry = tensors[i], self.layout.entries[i]
                strides = entry.strides if i in self.loose else tensor.stride()
                if (
                    tensor.shape != entry.shape
                    or strides != entry.strides
                    or dtype_name(tensor) != entry.dtype
                ):
                    return False
                self.sources[i] = _view(tensor)
            self.at_once = None
            if not set(self.own).issuperset(moved):
                self.chunks = None
            self.pointers = pointers
        for i in self.loose:  # copied together again
            self.sources[i] = _view(tensors[i])
            self.at_once = None
        return True

    def chunks_of(self, start: int, stop: int) -> list[list[copier.Piece]]:
        """What the chunks ``[start, stop)`` of the shared part consist of."""
        if self.chunks is None:
            self.jobs.clear()
            layout = self.layout
            self.chunks = copier.pieces_of(
                layout, self.sources, layout.own_padded, layout.total, self.numbers
            )
        return self.chunks[start // CHUNK : -(-stop // CHUNK)]

    def moves(
        self, bulk: Bytes, inode: int, start: int, stop: int
    ) -> tuple[list[list[copier.Piece]], tuple[copier.Job, copier.Job]]:
        """This rank's chunks ``[start, stop)`` of the shared part, and how to fill a segment.

        Args:
            bulk: The segment's bulk.
            inode: What the segment is known by.
            start: First byte of the shared part, at a chunk's border.
            stop: End.
        """
        base = self.layout.own_padded
        chunks = self.chunks_of(start, stop)
        known = self.jobs.get(inode)
        if known is None:
            own = copier.plan_moves(bulk, _stage_chunks(self.stage))
            known = self.jobs[inode] = own, copier.plan_moves(bulk[base:], chunks)
        return chunks, known

    def names_in(self, chunk: list[copier.Piece]) -> list[str]:
        """Names of the shared tensors whose memory ``chunk`` is copied from."""
        found = []
        for piece in chunk:
            for i in self.shared:
                source = self.sources[i]
                if (
                    isinstance(source, np.ndarray)
                    and isinstance(piece.source, np.ndarray)
                    and np.may_share_memory(piece.source, source)
                ):
                    found.append(self.names[i])
        return found


def plan_for(
    known: CopyPlan | None,
    taken: tree.TakenApart,
    volatile: Collection[int],
    watch: tuple[str, ...],
    at_once: Collection[str],
    *,
    lends: bool = False,
) -> tuple[CopyPlan, list[torch.Tensor]]:
    """The plan ``known`` if it is for the same tensors, else a new one; and all tensors.

    Args:
        known: The plan of the snapshot before.
        taken: The state.
        volatile: ``data_ptr`` of tensors that may change before the next update.
        watch: Path prefixes of tensors that must be finite.
        at_once: Paths of tensors that were seen to change.
        lends: Shared tensors are only named, and not copied.
    """
    fleeting = [t for _, t in taken.tensors]
    signature = [
        (name, t.dtype, t.shape, t.stride(), t.device, t.data_ptr() in volatile)
        for name, t in taken.tensors
    ]
    if known is not None and known.is_for(taken, signature):
        current = fleeting + known.members
        if known.follow(current):
            return known, current
    plan = _make_plan(taken, signature, volatile, watch, at_once, lends=lends)
    return plan, fleeting + plan.members


def _make_plan(
    taken: tree.TakenApart,
    signature: list[tuple[Any, ...]],
    volatile: Collection[int],
    watch: tuple[str, ...],
    at_once: Collection[str],
    *,
    lends: bool,
) -> CopyPlan:
    tensors = taken.all_tensors()
    loose = [i for i, (_, t) in enumerate(tensors) if not is_dense(t)]
    dense = [(name, t if is_dense(t) else t.contiguous()) for name, t in tensors]
    fleeting = len(taken.tensors)
    own = [
        t.data_ptr() in volatile
        or (i < fleeting and t.numel() * t.element_size() <= SMALL)
        or name in at_once
        or not is_dense(t)
        or t.is_inference()  # has no version, so a change would not be noticed
        for i, (name, t) in enumerate(tensors)
    ]
    layout = make_layout(dense, own)
    copied = [i for i, o in enumerate(own) if o]
    return CopyPlan(
        parts=taken.parts,
        members=[t for _, t in tensors[fleeting:]],
        signature=signature,
        names=[name for name, _ in dense],
        layout=layout,
        own=copied,
        shared=[i for i, o in enumerate(own) if not o],
        numbers=[_number(name, t, watch) for name, t in dense],
        lends=lends,
        pointers=[tensors[i][1].data_ptr() for i in (copied if lends else range(len(tensors)))],
        loose=loose,
        sources=[_view(t) for _, t in dense],
        stage=np.zeros(layout.own_padded, dtype=np.uint8),
    )


def _stage_chunks(stage: Bytes) -> list[list[copier.Piece]]:
    return [
        [copier.Piece(0, min(CHUNK, len(stage) - i), stage[i : i + CHUNK])]
        for i in range(0, len(stage), CHUNK)
    ]


def _view(tensor: torch.Tensor) -> Bytes | torch.Tensor:
    if not is_dense(tensor):
        tensor = tensor.contiguous()
    view = byte_view(tensor)
    return view if view.is_cuda else view.numpy()


def _number(name: str, tensor: torch.Tensor, watch: tuple[str, ...]) -> str:
    checked = {torch.float32: "float32", torch.float64: "float64"}
    return checked.get(tensor.dtype, "") if watch and name.startswith(watch) else ""
