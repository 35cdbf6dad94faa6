"""Where each tensor lies in the bulk space, and which part of it this rank copies.

The bulk space has two parts. *Own*: small tensors and those that change while a copy would run
(buffers); copied at once when the snapshot is taken. *Shared*: parameters and optimizer state,
the same on every replica; copied in the background, each replica its share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from mnemo.smp.segment import CHUNK, PAGE, TensorEntry

Bytes = npt.NDArray[np.uint8]

SMALL: Final = 16 * 1024
"""Tensors outside stable parts up to this size, bytes, are copied at once: many of them are made
anew for each snapshot, and keeping track of them costs more."""
_ALIGN: Final = 64


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the tensor's elements fill one stretch of memory, in whatever order."""
    if tensor.is_contiguous():
        return True
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: -strides[d])
    return tensor.permute(order).is_contiguous()


def dtype_name(tensor: torch.Tensor) -> str:
    """As segments name types: ``float32``."""
    return str(tensor.dtype).removeprefix("torch.")


def byte_view(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a dense tensor as 1-D uint8, without a copy."""
    flat = tensor.detach()
    flat = flat.reshape(-1) if flat.is_contiguous() else flat.as_strided((flat.numel(),), (1,))
    return flat.view(torch.uint8)


@dataclass(frozen=True)
class Share:
    """The shared bytes that one of ``replicas`` copies: whole chunks, about equally many."""

    index: int
    replicas: int

    def bounds(self, shared: int) -> tuple[int, int]:
        """Start and stop within ``shared`` bytes."""
        chunks = -(-shared // CHUNK)
        start, stop = (chunks * i // self.replicas * CHUNK for i in (self.index, self.index + 1))
        return min(start, shared), min(stop, shared)


@dataclass(frozen=True)
class Layout:
    """Places of all tensors; offsets and sizes in bytes of the bulk space."""

    entries: tuple[TensorEntry, ...]
    own_size: int
    own_padded: int
    """Where the shared part begins: the own part, up to whole chunks."""
    total: int

    @property
    def shared_size(self) -> int:
        """Bytes of the shared part."""
        return self.total - self.own_padded


def make_layout(tensors: list[tuple[str, torch.Tensor]], own: list[bool]) -> Layout:
    """Give every tensor its place; ``own[i]`` says in which part tensor ``i`` goes."""
    entries: list[TensorEntry | None] = [None] * len(tensors)
    offset = 0

    def place(indexes: list[int]) -> None:
        nonlocal offset
        for i in indexes:
            name, tensor = tensors[i]
            size = tensor.numel() * tensor.element_size()
            align = PAGE if size >= PAGE else _ALIGN
            offset = -(-offset // align) * align
            entries[i] = TensorEntry(
                name,
                dtype_name(tensor),
                tuple(tensor.shape),
                tuple(tensor.stride()),
                offset,
                size,
            )
            offset += size

    place([i for i, is_own in enumerate(own) if is_own])
    own_size = offset
    offset = own_padded = -(-own_size // CHUNK) * CHUNK
    place([i for i, is_own in enumerate(own) if not is_own])
    return Layout(
        tuple(e for e in entries if e is not None), own_size, own_padded, max(offset, own_padded)
    )


def rebuild(entry: TensorEntry, memory: torch.Tensor) -> torch.Tensor:
    """A tensor as ``entry`` describes it, over ``memory`` (1-D uint8 of its size)."""
    dtype = getattr(torch, entry.dtype)
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=dtype)
    return memory.view(dtype).as_strided(entry.shape, entry.strides)
