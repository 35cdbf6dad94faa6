"""Notices what a program makes of a module while it trains, and no new start makes again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch.nn.modules.lazy import LazyModuleMixin

from mnemo.session.unsaved import Modules

_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SHOWN: Final = 4


class Surgery:
    """Compares classes of submodules and numbers of their hooks between snapshots and lives."""

    def __init__(self) -> None:
        self._listed: Modules | None = None
        self._hooks: list[dict[int, Any]] = []
        self._total = 0
        self._base: dict[str, dict[str, Any]] | None = None
        """What there was at the first snapshot of this life."""
        self._changed: dict[str, dict[str, Any]] = {"kinds": {}, "hooks": {}}
        self._lost: dict[str, dict[str, Any]] = {"kinds": {}, "hooks": {}}

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
            "kinds": {
                path: kind
                for path, kind in saved["kinds"].items()
                if path not in waiting and now["kinds"].get(path) != kind
            },
            "hooks": {
                path: count
                for path, count in saved["hooks"].items()
                if now["hooks"].get(path, 0) < count
            },
        }
        parts = [
            *(f"{path} was a {kind} by then" for path, kind in self._lost["kinds"].items()),
            *(f"{path or 'the model'} had a hook" for path in self._lost["hooks"]),
        ]
        if not parts:
            return ""
        more = len(parts) - _SHOWN
        listed = ", ".join(parts[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
        return f"{listed}: changed while training, and not made again by this start"

    def look(self, modules: Modules) -> dict[str, dict[str, Any]]:
        """At every snapshot; cheap.

        Returns:
            What the snapshot has to hold, for `begin`.
        """
        relisted = modules is not self._listed
        if relisted:
            self._listed = modules
            self._hooks = [child.__dict__[name] for _, child in modules for name in _HOOKS]
        total = sum(map(len, self._hooks))
        if relisted or total != self._total:
            self._total = total
            now = _describe(modules)
            if self._base is None:
                self._base = now
            self._changed = {
                part: {path: v for path, v in now[part].items() if self._base[part].get(path) != v}
                for part in now
            }
        return {part: {**self._lost[part], **self._changed[part]} for part in self._changed}


def _describe(modules: Modules) -> dict[str, dict[str, Any]]:
    hooks = {p: sum(len(vars(child)[name]) for name in _HOOKS) for p, child in modules}
    return {
        "kinds": {path: type(child).__name__ for path, child in modules},
        "hooks": {path: count for path, count in hooks.items() if count},
    }
