"""Settings of torch's own layers, such as ``Dropout.p``: some have a schedule."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any, Final

import torch

from mnemo.session.modules import INNER, SCALARS, Modules, join, written_as

_LAYERS: Final = ("torch.nn.modules.", "torch.nn.utils.", "torch.ao.")
"""Not the wrappers: those are made anew by each start."""


class Settings:
    """What they were at first is not looked at again; what is not that any more is kept."""

    def __init__(self, modules: Modules) -> None:
        """Take note of what they are.

        Args:
            modules: The model's, by path.
        """
        self._made: dict[str, Any] = {}
        """By path, what they were at first."""
        self._list(modules)

    def changed(self, modules: Modules) -> dict[str, Any]:
        """Those that are not what they were at first; layers added since are taken as they came.

        Args:
            modules: See `ModuleTree`.
        """
        if modules is not self._listed:
            self._list(modules)
        found: dict[str, Any] = {}
        for path, child, get, made in self._rows:
            own = child.__dict__
            try:
                if get(own) == made:
                    continue
            except (KeyError, ValueError, RuntimeError):
                pass  # one was deleted, or is of several numbers now
            for name in _names(child):
                where = join(path, name)
                if not _same(own[name], self._made.get(where, own[name])):
                    found[where] = own[name]
        return found

    def _list(self, modules: Modules) -> None:
        self._listed = modules
        self._rows: list[tuple[str, torch.nn.Module, Callable[[Any], Any], Any]] = []
        for path, child in modules:
            names = _names(child)
            if names:
                own = vars(child)
                made = [
                    self._made.setdefault(join(path, name), _copied(own[name])) for name in names
                ]
                get = operator.itemgetter(*names)  # a third of the time that a loop takes
                self._rows.append((path, child, get, made[0] if len(made) == 1 else tuple(made)))


@functools.cache
def inherited_settings(kind: type[torch.nn.Module]) -> frozenset[str]:
    """What a user's class has of a layer of torch's that it is derived from, by name."""
    names: set[str] = set()
    for base in kind.__mro__:
        own = base.__module__.startswith(_LAYERS) and base is written_as(base)
        if own and base is not torch.nn.Module:
            arguments = inspect.signature(base).parameters.values()
            names |= {a.name for a in arguments if a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)}
            names |= {*getattr(base, "__constants__", ())}
    return frozenset(names)


def _names(module: torch.nn.Module) -> list[str]:
    kind = written_as(type(module))
    own = vars(module)
    if kind.__module__.startswith(_LAYERS):
        return [n for n, v in own.items() if n not in INNER and _is_plain(v)]
    inherited = inherited_settings(kind)  # type: ignore[arg-type]
    return [n for n in inherited if n in own and _is_plain(own[n])] if inherited else []


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(isinstance(part, SCALARS) for part in value)
    if isinstance(value, torch.Tensor):
        return value.ndim == 0 and value.device.type == "cpu"
    return isinstance(value, SCALARS)


def _copied(value: Any) -> Any:
    """What does not change if ``value`` is written to."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return [*value] if isinstance(value, list) else value


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)
