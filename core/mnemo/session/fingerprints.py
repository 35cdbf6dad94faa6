"""Fingerprints of what should be the same when a run is resumed, to name what is not."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch

_PLAIN: Final = (bool, int, float, str, tuple)
"""Types of optimizers' settings that are compared."""
_ADDED: Final = "differentiable"
"""What `Optimizer.load_state_dict` adds to the defaults of an optimizer that does not have it."""
_ADDRESS: Final = re.compile(r" at 0x[0-9a-fA-F]+")
_DEEPEST: Final = 20


def fingerprint(text: str) -> str:
    """Sixteen hexadecimal digits that stand for ``text``."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def script_fingerprint() -> str:
    """Of the program that is running: its file's content, or its name where it has none."""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    try:
        return (
            fingerprint(Path(main).read_text(errors="replace"))
            if main
            else fingerprint(sys.argv[0])
        )
    except OSError:
        return fingerprint(str(main))


def optimizer_fingerprint(optimizers: Iterable[torch.optim.Optimizer]) -> str:
    """Of the optimizers' classes, what they were made with, and the sizes of their first groups.

    Those of later groups may have been added while training.
    """
    described = [
        (
            type(o).__qualname__,
            [len(g["params"]) for g in o.param_groups[:1]],
            sorted((k, v) for k, v in o.defaults.items() if isinstance(v, _PLAIN) and k != _ADDED),
        )
        for o in optimizers
    ]
    return fingerprint(repr(described))


def group_fingerprints(optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, str]:
    """Of what was set for each group of parameters, by the words in which a change is reported.

    Ask when the optimizers were just made: schedulers and a resume write into the groups. What an
    optimizer was made with for all of its groups is `optimizer_fingerprint`'s.
    """
    made = list(optimizers)
    return {
        f"parameter group {i}" + (f" of optimizer {n}" if len(made) > 1 else ""): fingerprint(
            repr(_set_for(group, optimizer.defaults))
        )
        for n, optimizer in enumerate(made)
        for i, group in enumerate(optimizer.param_groups)
    }


def _set_for(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What a group has that its optimizer's defaults do not say."""
    known = {"initial_lr": defaults.get("lr"), **defaults}
    now = {name: _plain(value) for name, value in group.items() if name != "params"}
    return sorted((k, v) for k, v in now.items() if v != _plain(known.get(k)))


def _plain(value: Any) -> Any:
    """A setting that can be compared; of a tensor, its number."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    return value if isinstance(value, _PLAIN) else None


def data_fingerprint(loaders: Iterable[Any]) -> str:
    """Of the datasets' classes and lengths, and the batch sizes."""
    described = []
    for loader in loaders:
        dataset = getattr(loader, "dataset", loader)
        dataset = getattr(dataset, "wrapped_dataset", dataset)
        try:
            length = len(dataset)
        except (TypeError, NotImplementedError):
            length = -1
        described.append((type(dataset).__qualname__, length, getattr(loader, "batch_size", None)))
    return fingerprint(repr(described))


def structure_fingerprint(model: torch.nn.Module) -> str:
    """Of a model's layers and their settings. Ask before anything is restored, or trained."""
    return fingerprint(repr([(name, _shown(child)) for name, child in model.named_children()]))


def scheduler_fingerprint(schedulers: Iterable[Any]) -> str:
    """Of learning rate schedulers' classes, and what they were made with.

    Ask when they were just made: some write into themselves.
    """
    return fingerprint(repr([_scheduler(scheduler) for scheduler in schedulers]))


def _scheduler(scheduler: Any) -> Any:
    found: dict[str, Any] = {}
    for name in inspect.signature(type(scheduler)).parameters:
        # Some keep an argument under a name of their own: `LambdaLR`, `SequentialLR`.
        for kept in (name, f"_{name}", f"{name}s"):
            if kept in vars(scheduler) and name not in ("optimizer", "last_epoch"):
                found[name] = vars(scheduler)[kept]
    return type(scheduler).__qualname__, lasting_words(found)


def lasting_words(value: Any, depth: int = 0) -> str:
    """``repr``, but the same in each process: without addresses, and sets in order.

    Args:
        value: Anything.
        depth: How deep it lies in what is described; what lies too deep is only named.
    """
    words = functools.partial(lasting_words, depth=depth + 1)
    kind = type(value).__qualname__
    if depth > _DEEPEST:
        return kind
    if isinstance(value, dict):
        return f"{kind}({sorted((words(k), words(v)) for k, v in value.items())})"
    if isinstance(value, (set, frozenset)):
        return f"{kind}({sorted(map(words, value))})"
    if isinstance(value, (list, tuple)):
        return f"{kind}({[*map(words, value)]})"
    if isinstance(value, functools.partial):
        return f"{kind}({words((value.func, value.args, value.keywords))})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}
        return f"{kind}({words(fields)})"
    if isinstance(value, torch.optim.lr_scheduler.LRScheduler):
        return repr(_scheduler(value))
    if callable(value) and hasattr(value, "__qualname__"):  # a function, a class
        return f"{value.__module__}.{value.__qualname__}"
    return _shown(value)


def _shown(value: Any) -> str:
    try:
        return _ADDRESS.sub("", repr(value))
    except Exception:  # noqa: BLE001 - a user's own class may fail in its own way
        return type(value).__qualname__
