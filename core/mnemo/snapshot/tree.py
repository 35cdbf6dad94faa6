"""A nested state is taken apart into its tensors and a skeleton, and put together again.

The skeleton is the same structure with a marker where each tensor was. It is pickled, so it only
holds what a checkpoint would hold; the tensors go their own, faster way. A part that says that it
is `Stable` is taken apart once and then used again as long as its tensors are the same ones.
"""

from __future__ import annotations

import functools
import io
import operator
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import torch
from torch.nn.parameter import UninitializedParameter

MARK: Final = "\0mnemo.tensor"
_PART: Final = "\0mnemo.part"
_RAW: Final = "\0mnemo.raw"
_PLAIN_TYPES: Final = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)

Named = list[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Stable:
    """A part of a state whose structure is the same as long as its tensors are the same objects."""

    members: list[torch.Tensor]
    """Its tensors, in any order; cheap to list."""
    build: Callable[[], object]
    """Gives the part itself."""
    key: object = None
    """What else it depends on."""


@dataclass(frozen=True)
class Part:
    """A stable part, taken apart: ``skeleton`` pickled, ``tensors`` named with their paths."""

    source: Stable
    skeleton: bytes
    tensors: Named
    whole: bool
    """Whether all its tensors are listed; content that went into the skeleton may change."""

    def is_of(self, stable: Stable) -> bool:
        """Whether nothing has to be listed again. Looks at no tensor: that misses every cache."""
        ours, theirs = self.source.members, stable.members
        return (
            self.whole
            and len(ours) == len(theirs)
            and all(map(operator.is_, ours, theirs))
            and self.source.key == stable.key
        )


@dataclass
class TakenApart:
    """A whole state: the tensors of ``parts`` come after those of the rest."""

    skeleton: Any
    tensors: Named
    parts: list[Part] = field(default_factory=list)
    raws: list[bytes] = field(default_factory=list)
    """Byte strings, which pickle would encode as text."""
    special: int = 0
    """Tensors that are not plain, and stayed in the skeleton."""

    def pack(self) -> bytes:
        """Everything but the tensors' bytes, for `unpack`."""
        skeletons = [pickle.dumps(self.skeleton, protocol=2), *(p.skeleton for p in self.parts)]
        counts = [len(self.tensors), *(len(p.tensors) for p in self.parts)]
        return msgspec.msgpack.encode((counts, skeletons, self.raws))

    def all_tensors(self) -> Named:
        """Tensors in the order of the numbers that `unpack` asks for."""
        return [*self.tensors, *(t for part in self.parts for t in part.tensors)]


def is_plain(value: torch.Tensor) -> bool:
    """Whether the bytes of ``value`` are its whole content."""
    kind = type(value)
    return (
        (kind in _PLAIN_TYPES or _is_mere_parameter(kind))
        and value.layout is torch.strided
        and value.device.type in ("cpu", "cuda")
        and not value.is_conj()
        and not value.is_neg()
        and not value.is_quantized
    )


def once_a_kind(ask: Callable[[type[Any]], bool]) -> Callable[[type[Any]], bool]:
    """``ask``, whose answer is kept; unlike `functools.cache`, typed for classes of torch's."""
    return functools.cache(ask)  # type: ignore[return-value]


@once_a_kind
def _is_mere_parameter(kind: type[torch.Tensor]) -> bool:
    """Whether a user's own kind of parameter behaves as torch's does, and is saved as that."""
    return (
        issubclass(kind, torch.nn.Parameter)
        and kind.__torch_function__ is torch.nn.Parameter.__torch_function__
        and not issubclass(kind, UninitializedParameter)
    )


def take_apart(
    state: object, known: dict[str, Part] | None = None, *, within: bool = False
) -> TakenApart:
    """Replace every plain tensor in nested dicts, lists and tuples by a marker.

    A tensor that occurs twice within a part (tied weights) is listed once.

    Args:
        state: The nested state.
        known: Stable parts by path, taken apart before; kept up to date.
        within: This is a stable part itself, of which only skeleton and tensors are kept.
    """
    known = {} if known is None else known
    taken = TakenApart(None, [])
    seen: dict[tuple[object, ...], int] = {}

    def visit(value: Any, path: str) -> Any:
        kind = type(value)
        if kind is dict:
            return {k: visit(v, f"{path}.{k}" if path else str(k)) for k, v in value.items()}
        if kind is list or kind is tuple:
            return kind([visit(v, f"{path}.{i}") for i, v in enumerate(value)])
        if isinstance(value, torch.Tensor):
            if is_plain(value):
                return {MARK: _list(value, path, taken.tensors, seen)}
            taken.special += 1
            return value
        if kind is bytes and not within:
            taken.raws.append(value)
            return {_RAW: len(taken.raws) - 1}
        if kind is Stable:
            part = known.get(path)
            if part is None or not part.is_of(value):
                part = known[path] = _part(value, path)
            taken.parts.append(part)
            return {_PART: len(taken.parts)}
        if isinstance(value, dict):
            return _like(value, {k: visit(v, f"{path}.{k}") for k, v in value.items()})
        if _is_named_tuple(value):
            named = zip(value._fields, value, strict=True)
            return kind(*(visit(v, f"{path}.{k}") for k, v in named))
        return value

    taken.skeleton = visit(state, "")
    return taken


def _is_named_tuple(value: object) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")


def _part(stable: Stable, path: str) -> Part:
    inner = take_apart({path: stable.build()}, within=True)
    skeleton = pickle.dumps(inner.skeleton[path], protocol=2)
    return Part(stable, skeleton, inner.tensors, whole=not inner.special)


def _list(
    value: torch.Tensor, path: str, tensors: Named, seen: dict[tuple[object, ...], int]
) -> int:
    key = (value.data_ptr(), value.dtype, value.shape, value.stride(), value.device)
    index = seen.get(key) if value.numel() else None
    if index is None:
        index = seen[key] = len(tensors)
        tensors.append((path, value))
    return index


def unpack(raw: bytes, tensor: Callable[[int], torch.Tensor], *, trusted: bool) -> Any:
    """The state that `TakenApart.pack` was called on.

    Args:
        raw: What it gave.
        tensor: Gives the tensor of each number, in the order of `TakenApart.all_tensors`.
        trusted: Whether the bytes' MAC was right, so that classes outside torch's safe list may
            be made.

    Raises:
        pickle.UnpicklingError: A class is needed that only trusted bytes may name.
    """
    form = tuple[list[int], list[bytes], list[bytes]]
    counts, pickles, raws = msgspec.msgpack.decode(raw, type=form)
    skeletons = [_load(p, trusted=trusted) for p in pickles]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    tensor = functools.cache(tensor)  # one for all its names: tied weights stay tied

    def fill(value: Any, start: int) -> Any:
        if isinstance(value, dict):
            if len(value) == 1:
                ((key, content),) = value.items()
                if key == MARK:
                    return tensor(start + content)
                if key == _RAW:
                    return raws[content]
                if key == _PART:
                    return fill(skeletons[content], starts[content])
            return _like(value, {k: fill(v, start) for k, v in value.items()})
        if _is_named_tuple(value):
            return type(value)(*(fill(v, start) for v in value))
        if type(value) in (list, tuple):
            return type(value)(fill(v, start) for v in value)
        return value

    return fill(skeletons[0], 0)


def _load(raw: bytes, *, trusted: bool) -> Any:
    """Open a pickle with torch's restricted unpickler first, which wants its own container."""
    container = io.BytesIO()
    with zipfile.ZipFile(container, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("state/data.pkl", raw)
        archive.writestr("state/version", b"3\n")
        archive.writestr("state/byteorder", b"little")
    for weights_only in (True, False):
        container.seek(0)
        try:
            return torch.load(container, weights_only=weights_only)
        except pickle.UnpicklingError:
            if not trusted or not weights_only:
                raise
    return None


def _like(model: dict[Any, Any], content: dict[Any, Any]) -> dict[Any, Any]:
    """``content`` in a dict of the type of ``model``, with its order and attributes."""
    if type(model) is dict:
        return content
    try:
        made = model.copy()
    except Exception:  # noqa: BLE001 - a user's own mapping may refuse in its own way
        return content
    made.clear()
    made.update(content)
    return made
