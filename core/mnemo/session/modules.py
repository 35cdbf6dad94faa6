"""What is asked of a model's modules again and again: which there are, and whose they are."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

Modules = Sequence[tuple[str, torch.nn.Module]]
"""Submodules by path, as ``named_modules`` gives them."""

SCALARS: Final = (int, float, complex, str, bool, type(None), np.generic)
"""Types of attributes that are compared by value."""
INNER: Final = frozenset(vars(torch.nn.Module()))
"""Attributes that every module has."""
_PARAMETRIZED: Final = "torch.nn.utils.parametrize"


class ModuleTree:
    """Submodules of a module, listed anew only where one was added, taken out or exchanged."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._listed: list[tuple[str, torch.nn.Module]] = []
        self._children: list[tuple[torch.nn.Module, list[tuple[str, torch.nn.Module | None]]]] = []
        """What each of them had below itself."""

    def modules(self) -> Modules:
        """As ``named_modules`` gives them, in a third of the time."""
        if not self._listed or any(
            _children(m) != then if then else m.__dict__["_modules"] for m, then in self._children
        ):
            self._listed = list(self._module.named_modules())
            self._children = [(module, _children(module)) for _, module in self._listed]
        return self._listed


@functools.cache
def is_torchs(kind: type[torch.nn.Module]) -> bool:
    """Whether a class is torch's own, so that torch knows what of it to save."""
    return written_as(kind).__module__.startswith("torch.")


def written_as(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The class of a module before torch derived one of its own, to compute its parameters."""
    while kind.__module__ == _PARAMETRIZED and kind.__name__.startswith("Parametrized"):
        kind = kind.__bases__[0]
    return kind


def join(path: str, name: str) -> str:
    """The path of what a module at ``path`` calls ``name``."""
    return f"{path}.{name}" if path else name


def _children(module: torch.nn.Module) -> list[tuple[str, torch.nn.Module | None]]:
    return [*module.__dict__["_modules"].items()]
