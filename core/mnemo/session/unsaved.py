"""What a module is besides its ``state_dict``: kept with a snapshot, and put back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mnemo.session.generators import KINDS, get_states, set_states

Modules = Sequence[tuple[str, torch.nn.Module]]
"""Submodules by path, as ``named_modules`` gives them."""


class Unsaved:
    """Of one module: flags, random generators, buffers that were written since this was made."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._untouched = {n: _identity(b) for n, b in _buffers(modules_of(module))}

    def state(self, modules: Modules) -> dict[str, Any]:
        """Everything, by reference.

        Args:
            modules: The module's, listed by `modules_of`.
        """
        return {
            "evaluating": [path for path, child in modules if not child.training],
            "frozen": [
                join(path, name)
                for path, child in modules
                for name, parameter in child._parameters.items()
                if parameter is not None and not parameter.requires_grad
            ],
            "buffers": {
                name: buffer
                for name, buffer in _buffers(modules)
                if self._untouched.get(name) != _identity(buffer)
            },
            "generators": {name: get_states([found])[0] for name, found in _generators(modules)},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`; what the module does not have any more is left out."""
        modules = modules_of(self._module)
        evaluating, frozen = set(state["evaluating"]), set(state["frozen"])
        for path, child in modules:
            child.training = path not in evaluating
            for name, parameter in child._parameters.items():
                if parameter is not None and parameter.is_leaf:
                    trained = join(path, name) not in frozen
                    if parameter.requires_grad != trained:
                        parameter.requires_grad_(trained)
        owners = dict(modules)
        for name, buffer in _buffers(modules):
            if name in state["buffers"]:
                path, _, own = name.rpartition(".")
                owners[path]._buffers[own] = _filled(buffer, state["buffers"][name])
        for name, generator in _generators(modules):
            if name in state["generators"]:
                set_states([generator], [state["generators"][name]])


def modules_of(module: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """What ``named_modules`` gives, in a fraction of its time."""
    found: dict[int, tuple[str, torch.nn.Module]] = {}
    stack: list[tuple[str, torch.nn.Module | None]] = [("", module)]
    while stack:
        path, parent = stack.pop()
        if parent is not None and id(parent) not in found:
            found[id(parent)] = path, parent
            children = [(join(path, name), child) for name, child in parent._modules.items()]
            stack += reversed(children)
    return list(found.values())


def is_torchs(module: torch.nn.Module) -> bool:
    """Whether torch itself made its class, and knows what of it to save."""
    return type(module).__module__.startswith("torch.")


def join(path: str, name: str) -> str:
    """The path of what a module at ``path`` calls ``name``."""
    return f"{path}.{name}" if path else name


def _buffers(modules: Modules) -> Iterator[tuple[str, torch.Tensor]]:
    for path, child in modules:
        for name in sorted(child._non_persistent_buffers_set):
            buffer = child._buffers.get(name)
            if buffer is not None:
                yield join(path, name), buffer


def _generators(modules: Modules) -> Iterator[tuple[str, Any]]:
    for path, child in modules:
        if not is_torchs(child):
            for name, value in vars(child).items():
                if isinstance(value, KINDS):
                    yield join(path, name), value


def _filled(buffer: torch.Tensor, saved: torch.Tensor) -> torch.Tensor:
    """``saved`` in ``buffer`` itself, which others may hold as well, where it fits in."""
    same = buffer.shape == saved.shape and buffer.dtype == saved.dtype
    if same and buffer.layout is torch.strided and buffer.is_contiguous():
        with torch.no_grad():
            return buffer.copy_(saved)
    return saved.to(buffer.device)


def _identity(tensor: torch.Tensor) -> tuple[int, int]:
    return id(tensor), tensor._version
