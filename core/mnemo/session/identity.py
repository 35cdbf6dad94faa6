"""Which run this is, and whether a snapshot fits it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import psutil
import torch
from torch.nn.parameter import is_lazy

from mnemo.config import ResolvedConfig
from mnemo.errors import IdentityError, ModelChangedError
from mnemo.smp.paths import check_run_id
from mnemo.smp.segment import TensorEntry
from mnemo.snapshot.layout import dtype_name
from mnemo.snapshot.tree import is_plain

_SOURCES = ("MNEMO_RUN_ID", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")
_UNSET = ("", "none")
"""torchrun without ``--rdzv-id`` says ``none``: an id that every such job has is no identity."""


@dataclass(frozen=True)
class RunIdentity:
    """A run's id, and whether another launch of the same job would have it too."""

    run_id: str
    stable: bool
    source: str


def resolve_identity(
    config: ResolvedConfig, environ: Mapping[str, str] | None = None
) -> RunIdentity:
    """The run's id: explicit, else from the environment, else new for this launch.

    Ranks of one launch must agree: broadcast rank 0's.

    Raises:
        ConfigError: What the environment gives could not be a directory's name.
    """
    env = os.environ if environ is None else environ
    if config.run.id:
        return RunIdentity(config.run.id, stable=True, source="run.id")
    for name in _SOURCES:
        value = env.get(name, "")
        if value.lower() not in _UNSET:
            return RunIdentity(check_run_id(value), stable=True, source=name)
    prefix = config.run.name or "run"
    return RunIdentity(f"{prefix}-{secrets.token_hex(3)}", stable=False, source="this launch")


def launch_of(environ: Mapping[str, str] | None = None) -> str:
    """What all lives of one launch have in common, empty where nobody restarts this process.

    That is the process that restarts them: `mnemo run` names itself, torchrun is the parent.
    """
    env = os.environ if environ is None else environ
    named = env.get("MNEMO_AGENT", "")
    if named or "TORCHELASTIC_RESTART_COUNT" not in env:
        return named
    parent = psutil.Process().parent()
    return "" if parent is None else f"{parent.pid}-{parent.create_time():.2f}"


def describe_changes(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names of the fingerprints (other than the model's) that are not what they were."""
    return sorted(k for k in now if k in then and then[k] != now[k])


def require_same_world(then: int, world_size: int, run_id: str) -> None:
    """Compare a snapshot's number of ranks with this launch's.

    Raises:
        IdentityError: They differ.
    """
    if then != world_size:
        raise IdentityError(
            f"the snapshot of run {run_id} is of {then} ranks, this launch has "
            f"{world_size}: start as many, give it another run.id, or set run.resume=never to "
            "give the old state up"
        )


def require_same_model(
    entries: Iterable[TensorEntry],
    current: Mapping[str, torch.Tensor],
    prefixes: Sequence[str],
    run_id: str,
    step: int,
    flexible: Collection[str] = (),
) -> None:
    """Compare a snapshot's model tensors with the model that is to be resumed.

    Args:
        entries: The snapshot's tensors.
        current: The model's tensors by name.
        prefixes: What these names are preceded by in the snapshot.
        run_id: For the message.
        step: For the message.
        flexible: See `flexible_names`.

    Raises:
        ModelChangedError: Names, shapes or types differ; lists which.
    """
    then = {
        e.name.removeprefix(p): (e.dtype, tuple(e.shape))
        for e in entries
        for p in prefixes
        if e.name.startswith(p)
    }
    # What is more than its bytes went another way, with all that it needs to be put together.
    plain = {name: tensor for name, tensor in current.items() if is_plain(tensor)}
    now = {name: (dtype_name(t), tuple(t.shape)) for name, t in plain.items()}
    aliases = _aliases(plain)
    differ = [
        f"{name}: {_words(then.get(name))} in the snapshot, {_words(now.get(name))} in the model"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
        and not (name in aliases and name not in then)
        and not (name in flexible and _may_fit(then.get(name), now.get(name)))
    ]
    if differ:
        shown = "; ".join(differ[:8]) + (f"; and {len(differ) - 8} more" if len(differ) > 8 else "")
        raise ModelChangedError(
            f"the snapshot of step {step} of run {run_id} was taken of another model: {shown}. "
            "Nothing was overwritten. Use another run.id for this model, or run.resume=never to "
            "give the old state up"
        )


def flexible_names(model: torch.nn.Module) -> set[str]:
    """Names of tensors that get their shape from what is loaded, where their module sees to it.

    That is parameters that are still lazy, and buffers; ``load_state_dict`` refuses the others.
    """
    return {
        f"{path}.{name}" if path else name
        for path, child in model.named_modules()
        for name in (
            *child._buffers,
            *(n for n, p in child._parameters.items() if p is not None and is_lazy(p)),
        )
    }


def does_not_load(step: int, run_id: str, error: Exception) -> ModelChangedError:
    """The error for a model whose ``load_state_dict`` refuses the snapshot's state."""
    return ModelChangedError(
        f"the snapshot of step {step} of run {run_id} cannot be loaded into this model: {error}. "
        "The snapshot is kept. Use another run.id for this model, or run.resume=never to give the "
        "old state up"
    )


_Form = tuple[str, tuple[int, ...]]


def _may_fit(then: _Form | None, now: _Form | None) -> bool:
    return then is not None and (now is None or then[0] == now[0])


def _aliases(current: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of tensors that share memory with one listed before (tied weights)."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    found = set()
    for name, tensor in current.items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if key in seen:
            found.add(name)
        seen.add(key)
    return found


def _words(described: _Form | None) -> str:
    return "absent" if described is None else f"{described[0]}{list(described[1])}"
