"""State of modules and optimizers, listed once and listed again only when the set changes.

``state_dict()`` of a large model takes milliseconds; collecting the tensors that it would hold, to
see whether they are still the same ones, takes a tenth of one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any, Final

import torch

from mnemo.snapshot.tree import Stable, once_a_kind

MODULE_PARTS: Final = ("parameters", "rest")
"""The parts of `module_state`."""


def module_state(module: torch.nn.Module) -> dict[str, Any]:
    """A module's ``state_dict`` in two parts: parameters, and the rest, which may change any time.

    `join_module_state` makes the state dict of it.
    """
    if _has_own_ways(module):
        return {"parameters": {}, "rest": module.state_dict()}
    members: list[torch.Tensor] = []
    rest: dict[str, Any] = {}
    stack = [("", module)]
    while stack:  # torch's own walks make a generator a level, ten times as slow
        prefix, parent = stack.pop()
        own = parent.__dict__  # torch's attribute look-up takes twice as long
        if own["_parameters"]:
            members += [p for p in own["_parameters"].values() if p is not None]
        if own["_buffers"]:
            for name, buffer in own["_buffers"].items():
                if buffer is not None and name not in own["_non_persistent_buffers_set"]:
                    rest[prefix + name] = buffer
        for name, child in own["_modules"].items():
            if child is None:
                continue
            path = f"{prefix}{name}."
            if _has_own_ways(child):
                rest.update(child.state_dict(prefix=path))
            else:
                stack.append((path, child))

    def build() -> dict[str, torch.Tensor]:
        # Not detached: memory given to a parameter anew is to be found through it.
        whole = module.state_dict(keep_vars=True)
        return {name: value for name, value in whole.items() if name not in rest}

    return {"parameters": Stable(members, build, key=len(rest)), "rest": rest}


_BASE: Final = torch.nn.Module


def _has_own_ways(module: torch.nn.Module) -> bool:
    """Whether a module puts more or other things into its state dict than torch would."""
    return bool(
        module._state_dict_hooks or module._state_dict_pre_hooks or _is_special(type(module))
    )


@once_a_kind
def _is_special(kind: type[torch.nn.Module]) -> bool:
    return (
        kind.state_dict is not _BASE.state_dict
        or kind.get_extra_state is not _BASE.get_extra_state
        or kind._save_to_state_dict is not _BASE._save_to_state_dict
    )


def join_module_state(saved: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The state dict that `module_state` was taken of."""
    return {**saved["parameters"], **saved["rest"]}


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's ``state_dict``, whose tensors are listed again only when they changed."""
    tensors = [v for state in optimizer.state.values() for v in state.values()]
    special = (
        optimizer._optimizer_state_dict_pre_hooks or optimizer._optimizer_state_dict_post_hooks
    )
    own = type(optimizer).state_dict is not torch.optim.Optimizer.state_dict
    kinds = set(map(type, tensors))  # to look at each of them takes ten times as long
    if special or own or not all(issubclass(kind, torch.Tensor) for kind in kinds):
        return optimizer.state_dict()
    groups, number = [], 0
    for group in optimizer.param_groups:
        packed = {k: v for k, v in group.items() if k != "params"}
        numbers = range(number, number + len(group["params"]))
        packed["params"] = Stable([], functools.partial(list, numbers), key=numbers)
        number = numbers.stop
        groups.append(packed)
    state = Stable(tensors, lambda: optimizer.state_dict()["state"], key=len(optimizer.state))
    return {"state": state, "param_groups": groups}


def tensors_of(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[torch.Tensor]:
    """All tensors of the optimizers' states."""
    for optimizer in optimizers:
        yield from _tensors_in(list(optimizer.state.values()))


def _tensors_in(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(each)


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """``optimizer.load_state_dict(saved)``, to the bit.

    Raises:
        KeyError, ValueError, TypeError: As torch does where the state does not fit.
    """
    optimizer.load_state_dict(saved)
    keep_types(optimizer, saved)


def keep_types(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Give state the type that it was saved in: torch has just cast it to its parameter's type."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        then, now = saved["state"].get(number), optimizer.state.get(parameter)
        if not isinstance(then, dict) or not isinstance(now, dict):
            continue
        for key, value in then.items():
            cast = now.get(key)
            if isinstance(value, torch.Tensor) and isinstance(cast, torch.Tensor):
                now[key] = cast if cast.dtype == value.dtype else value.to(cast.device)
