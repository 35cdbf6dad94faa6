"""What a module is besides its ``state_dict``: kept with a snapshot, and put back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch

from mnemo.session.generators import KINDS, get_states, set_states
from mnemo.session.modules import Modules, is_torchs, join
from mnemo.session.settings import Settings

_no_generators: set[type] = set()
"""Types of attributes that were looked at."""


class Unsaved:
    """Of one module: flags, random generators, and what was changed since this was made.

    That is buffers outside the state dict, and settings of torch's own layers.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        modules = list(module.named_modules())
        self._untouched = {n: _identity(b) for n, b in _buffers(modules)}
        self._settings = Settings(modules)

    def state(self, modules: Modules) -> dict[str, Any]:
        """Everything, by reference.

        Args:
            modules: The module's, by path; see `ModuleTree`.
        """
        evaluating, frozen, buffers, generators = [], [], {}, {}
        for path, child in modules:
            own = child.__dict__  # torch's attribute look-up takes twice as long
            if not child.training:  # what TorchScript has compiled keeps it elsewhere
                evaluating.append(path)
            for name, parameter in own["_parameters"].items():
                if parameter is not None and not parameter.requires_grad:
                    frozen.append(join(path, name))
            for name in own["_non_persistent_buffers_set"]:
                buffer = own["_buffers"].get(name)
                if buffer is not None:
                    where = join(path, name)
                    if self._untouched.get(where) != _identity(buffer):
                        buffers[where] = buffer
            if not is_torchs(type(child)):  # type: ignore[arg-type]
                for name, found in _own_generators(child):
                    generators[join(path, name)] = get_states([found])[0]
        return {
            "evaluating": evaluating,
            "frozen": frozen,
            "buffers": buffers,
            "generators": generators,
            "settings": self._settings.changed(modules),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`; what the module does not have any more is left out."""
        modules = list(self._module.named_modules())
        evaluating, frozen = set(state["evaluating"]), set(state["frozen"])
        for path, child in modules:
            child.training = path not in evaluating
            for name, parameter in child._parameters.items():
                if parameter is not None and parameter.is_leaf:
                    trained = join(path, name) not in frozen
                    if parameter.requires_grad != trained:
                        parameter.requires_grad_(trained)
        owners = dict(modules)
        device = next((p.device for p in self._module.parameters()), None)
        for where, saved in state["buffers"].items():
            path, _, name = where.rpartition(".")
            buffers = owners[path]._buffers if path in owners else {}
            if name in buffers:
                buffer = buffers[name]  # None where it was not filled yet
                buffers[name] = saved.to(device) if buffer is None else _filled(buffer, saved)
        for name, generator in _generators(modules):
            if name in state["generators"]:
                set_states([generator], [state["generators"][name]])
        for where, value in state["settings"].items():
            path, _, name = where.rpartition(".")
            if path in owners and name in vars(owners[path]):
                setattr(owners[path], name, value)


_SYNCS: Final = "require_forward_param_sync"


def wrapper_state(model: torch.nn.Module) -> dict[str, Any]:
    """What DDP is about to do: not broadcast buffers, if its last forward was no step's.

    A new process that takes a lost rank's place has to ask for what the others ask for.
    """
    return {name: value for name, value in vars(model).items() if name == _SYNCS}


def restore_wrapper(model: torch.nn.Module, state: dict[str, Any]) -> None:
    """The inverse of `wrapper_state`."""
    vars(model).update(state)


def _buffers(modules: Modules) -> Iterator[tuple[str, torch.Tensor]]:
    for path, child in modules:
        own = child.__dict__
        for name in own["_non_persistent_buffers_set"]:
            buffer = own["_buffers"].get(name)
            if buffer is not None:
                yield join(path, name), buffer


def _generators(modules: Modules) -> Iterator[tuple[str, Any]]:
    for path, child in modules:
        if not is_torchs(type(child)):  # type: ignore[arg-type]
            for name, value in _own_generators(child):
                yield join(path, name), value


def _own_generators(module: torch.nn.Module) -> Sequence[tuple[str, Any]]:
    own = module.__dict__
    # Most have none. Asking for all attributes at once takes a third of the time.
    if _no_generators.issuperset(map(type, own.values())):
        return ()
    found = [(name, value) for name, value in own.items() if isinstance(value, KINDS)]
    _no_generators.update(t for t in map(type, own.values()) if not issubclass(t, KINDS))
    return found


def _filled(buffer: torch.Tensor, saved: torch.Tensor) -> torch.Tensor:
    """``saved`` in ``buffer`` itself, which others may hold as well, where it fits in."""
    same = buffer.shape == saved.shape and buffer.dtype == saved.dtype
    if same and buffer.layout is torch.strided and buffer.is_contiguous():
        with torch.no_grad():
            return buffer.copy_(saved)
    return saved.to(buffer.device)


def _identity(tensor: torch.Tensor) -> tuple[int, int]:
    return id(tensor), tensor._version
