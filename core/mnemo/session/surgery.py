"""Notices what a program makes of a module while it trains, and no new start makes again."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from torch.nn.modules.lazy import LazyModuleMixin

from mnemo.session.modules import Modules

_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SHOWN: Final = 4

_Described = dict[str, dict[str, Any]]
"""By path: the name of each submodule's class, and of each of its hooks where it came from."""


class Surgery:
    """Compares submodules and their hooks between snapshots and lives."""

    def __init__(self) -> None:
        self._listed: Modules | None = None
        self._hooks: list[dict[int, Any]] = []
        self._keys: list[int] = []
        """torch numbers all hooks of a process."""
        self._base: _Described | None = None
        """What there was at the first snapshot of this life."""
        self._changed: _Described = {"kinds": {}, "hooks": {}}
        self._lost: _Described = {"kinds": {}, "hooks": {}}

    def begin(self, modules: Modules, saved: Mapping[str, dict[str, Any]]) -> str:
        """A life begins, with all restored that is.

        Args:
            modules: The model's, by path.
            saved: What `look` gave for the snapshot that is gone on from.

        Returns:
            What is not as it was then, in words; empty if nothing is.
        """
        now = _describe(modules)
        # A layer that is still lazy gets its class when it is used.
        waiting = {path for path, child in modules if isinstance(child, LazyModuleMixin)}
        self._lost = {
            part: {
                path: value
                for path, value in saved[part].items()
                if path not in waiting and now[part].get(path) != value
            }
            for part in now
        }
        parts = [
            *(_kind(path, kind) for path, kind in self._lost["kinds"].items()),
            *(
                _hook(path, then, now["hooks"].get(path, []))
                for path, then in self._lost["hooks"].items()
            ),
        ]
        if not parts:
            return ""
        more = len(parts) - _SHOWN
        listed = ", ".join(parts[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
        return f"{listed}: changed while training, and not made again by this start"

    def look(self, modules: Modules) -> _Described:
        """At every snapshot; cheap.

        Returns:
            What the snapshot has to hold, for `begin`.
        """
        relisted = modules is not self._listed
        if relisted:
            self._listed = modules
            self._hooks = [child.__dict__[name] for _, child in modules for name in _HOOKS]
        keys = list(itertools.chain.from_iterable(self._hooks))
        if relisted or keys != self._keys:
            self._keys = keys
            now = _describe(modules)
            if self._base is None:
                self._base = now
            self._changed = {
                part: {
                    path: now[part].get(path)
                    for path in now[part].keys() | then.keys()
                    if now[part].get(path) != then.get(path)
                }
                for part, then in self._base.items()
            }
        return {part: {**self._lost[part], **self._changed[part]} for part in self._changed}


def _describe(modules: Modules) -> _Described:
    hooks = {p: [h for name in _HOOKS for h in vars(child)[name].values()] for p, child in modules}
    return {
        "kinds": {path: type(child).__name__ for path, child in modules},
        "hooks": {path: sorted(map(_origin, found)) for path, found in hooks.items() if found},
    }


def _origin(hook: Any) -> str:
    """Where a hook came from: the same in each life of a program."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    hook = getattr(hook, "__func__", hook)
    code = getattr(hook, "__code__", None)
    named = hook if code is not None else type(hook)
    line = f":{code.co_firstlineno}" if code is not None else ""
    return f"{named.__module__}.{named.__qualname__}{line}"


def _kind(path: str, kind: str | None) -> str:
    return f"{path} was a {kind} by then" if kind else f"{path} had been taken out"


def _hook(path: str, then: list[str] | None, now: list[str]) -> str:
    where = path or "the model"
    gained = Counter(then or []) - Counter(now)
    return f"{where} had a hook" if gained else f"{where} had lost a hook"
