"""Notices attributes of a module that change while it trains but are in no ``state_dict``."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch
import xxhash

from mnemo.session.modules import INNER, SCALARS, Modules, is_torchs, join
from mnemo.session.settings import inherited_settings
from mnemo.session.surgery import Surgery

_FIRST: Final = 4
_THEN_EVERY: Final = 64
_LARGEST: Final = 100_000
"""Bytes of an attribute that is looked at."""
_SEQUENCES: Final = (list, tuple, deque)
_PLAIN: Final = (*SCALARS, *_SEQUENCES, dict, set, torch.Tensor, np.ndarray)
_UNKNOWN: Final = 0

Attribute = tuple[str, dict[str, Any], str]
"""Path, and where it is found: by which name among which module's attributes."""


class AttributeWatch:
    """Compares plain attributes from snapshot to snapshot, and from one life to the next.

    Numbers and words are looked at in each snapshot; lists, tensors and new attributes in some.
    """

    def __init__(
        self, remedy: str, *, skip: Iterable[str] = (), kinds: tuple[type, ...] = ()
    ) -> None:
        """Nothing is looked at yet.

        Args:
            remedy: How a user can keep an attribute, besides making it a buffer.
            skip: Names of attributes that are none of the user's.
            kinds: Classes of submodules that take care of themselves.
        """
        self._remedy = remedy
        self._skip = INNER | frozenset(skip)
        self._kinds = kinds
        self._looks = 0
        self._base: dict[str, int] = {}
        """Digests when this life began."""
        self._lost: dict[str, int] = {}
        """Digests that an earlier life had and this one could not begin with."""
        self._seen: dict[str, int] = {}
        self._scalars: list[tuple[dict[str, Any], str, Any]] = []
        self._changing: dict[str, Attribute] = {}
        self._surgery = Surgery()

    def begin(self, modules: Modules, saved: Mapping[str, Any] | None = None) -> str:
        """A life begins, with all restored that is.

        What a module does not have yet, or has not filled yet, counts as lost if it was seen to
        change: else it is taken for something that is made when it is needed first.

        Args:
            modules: The model's, by path.
            saved: What `look` gave for the snapshot that is gone on from.

        Returns:
            What is not as it was then, in words; empty if nothing is.
        """
        found = list(self._attributes(modules))
        self._base = _digests(found)
        if saved is None:
            return ""
        filled = {path for path, own, name in found if own[name] is not None}
        self._lost = {
            path: then
            for path, then in saved["then"].items()
            if (then == _UNKNOWN or self._base.get(path) != then)
            and (path in filled or path in saved["changing"])
        }
        parts = (self._words(), self._surgery.begin(modules, saved["surgery"]))
        return "; ".join(filter(None, parts))

    def _words(self) -> str:
        if not self._lost:
            return ""
        many = len(self._lost) > 1
        return (
            f"module attribute{'s' * many} {', '.join(sorted(self._lost))} "
            f"{'are' if many else 'is'} not kept: "
            f"make {'them buffers' if many else 'it a buffer'}, or {self._remedy}"
        )

    def look(self, modules: Modules, *, warn: bool = True) -> dict[str, Any]:
        """At every snapshot; cheap.

        Args:
            modules: The model's, by path.
            warn: Whether to name, once, what changes.

        Returns:
            What the snapshot has to hold, for `begin`.
        """
        self._looks += 1
        due = self._looks <= _FIRST or self._looks % _THEN_EVERY == 0
        if due or any(_differs(own.get(name), value) for own, name, value in self._scalars):
            self._look_closely(modules, warn=warn)
        changed = {path: d for path, d in self._seen.items() if self._base.get(path) != d}
        for path, own, name in self._changing.values():
            changed[path] = _digest(own.get(name), here=True) or _UNKNOWN
        return {
            "then": {**self._lost, **changed},
            "changing": [*self._lost, *self._changing],
            "surgery": self._surgery.look(modules),
        }

    def _look_closely(self, modules: Modules, *, warn: bool) -> None:
        found = list(self._attributes(modules))
        now = _digests(found)
        fresh = [
            attribute
            for attribute in found
            if (path := attribute[0]) not in self._changing
            and path in self._seen
            and path in now
            and now[path] != self._seen[path]
        ]
        self._changing.update((attribute[0], attribute) for attribute in fresh)
        self._seen = now
        self._scalars = [
            (own, name, own[name])
            for path, own, name in found
            if isinstance(own[name], SCALARS) and path not in self._changing
        ]
        if fresh and warn:
            names = ", ".join(sorted(path for path, _, _ in fresh))
            warnings.warn(
                f"mnemo: {names} of {type(modules[0][1]).__name__} change during training but are "
                "in no state_dict: after a resume they start anew. "
                f"Make them buffers, or {self._remedy}",
                stacklevel=2,
            )

    def _attributes(self, modules: Modules) -> Iterator[Attribute]:
        for path, child in modules:
            if is_torchs(type(child)) or isinstance(child, self._kinds):  # type: ignore[arg-type]
                continue
            own = vars(child)
            skip = self._skip | inherited_settings(type(child))  # type: ignore[arg-type]
            for name, value in own.items():
                if name not in skip and isinstance(value, _PLAIN):
                    yield join(path, name), own, name


def _digests(attributes: Iterable[Attribute]) -> dict[str, int]:
    found = ((path, _digest(own[name])) for path, own, name in attributes)
    return {path: digest for path, digest in found if digest is not None}


def _differs(now: Any, then: Any) -> bool:
    return type(now) is not type(then) or (now is not then and bool(now != then))


def _digest(value: Any, *, here: bool = False) -> int | None:
    """Of a plain value of moderate size, the same in any process; None for any other.

    Args:
        value: What to look at.
        here: Do not wait for a device.
    """
    digest = xxhash.xxh3_64()
    try:
        _feed(value, digest, [_LARGEST], here=here)
    except (ValueError, RuntimeError, TypeError):
        return None
    return digest.intdigest()


def _feed(value: Any, digest: Any, left: list[int], *, here: bool) -> None:
    """Add ``value`` to ``digest``; ``left`` is how many bytes there may be.

    Raises:
        ValueError: There are more, or a device would have to be waited for.
        RuntimeError, TypeError: It refers to itself, or torch cannot read it.
    """
    raw = f"{type(value).__qualname__}:".encode()
    parts: Iterable[Any] = ()
    if isinstance(value, torch.Tensor):
        if here and value.device.type != "cpu":
            raise ValueError(value.device)
        _spend(left, value.numel() * value.element_size())
        plain = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        raw += f"{value.dtype}{tuple(value.shape)}".encode() + plain.numpy().tobytes()
    elif isinstance(value, np.ndarray):
        _spend(left, value.nbytes)
        raw += f"{value.dtype}{value.shape}".encode() + value.tobytes()
    elif isinstance(value, SCALARS):
        raw += repr(value).encode()
    elif isinstance(value, dict):
        parts = (part for item in value.items() for part in item)
    elif isinstance(value, _SEQUENCES):
        parts = value
    elif isinstance(value, set):
        parts = sorted(_digest(part, here=here) or _UNKNOWN for part in value)
    _spend(left, len(raw))
    digest.update(raw)
    for part in parts:
        _feed(part, digest, left, here=here)
    digest.update(b";")


def _spend(left: list[int], size: int) -> None:
    left[0] -= size
    if left[0] < 0:
        raise ValueError("too large")
