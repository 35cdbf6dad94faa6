"""Writes a generation as a file that others can read: Lightning's, safetensors', torch's."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mnemo.errors import ConfigError, IntegrityError, MissingExtraError, SnapshotError
from mnemo.session.sources import NOTHING, read_sources
from mnemo.smp import messages as m
from mnemo.smp.client import SmpClient
from mnemo.snapshot.listing import join_module_state
from mnemo.snapshot.restore import Source, read_state
from mnemo.storage import CheckpointStore
from mnemo.transport.local import close_all


@dataclass(frozen=True)
class Generation:
    """The state of one step, as rank 0 captured it, put together on the CPU."""

    tick: int
    step: int
    origin: str
    """``memory`` or ``storage``."""
    state: Any


def from_memory(
    client: SmpClient, fit: int, secret: bytes, step: int | None, damaged: list[IntegrityError]
) -> Generation | None:
    """The newest generation in memory that reads back whole, or that of ``step``.

    Args:
        client: To the run's SMP.
        fit: Which training.
        secret: The run's.
        step: None for the newest.
        damaged: Gets what is wrong with those that were passed over.
    """
    below: int | None = None
    while below != 0:
        fetched, fds = client.ask(m.Fetch(below or 0, fit), m.Fetched)
        found = fetched.generation
        try:
            if found is None:
                return None
            below = found.tick
            if step in (None, found.step):
                sources = {s.meta.rank: s for s in map(Source.of_fd, fds)}
                return Generation(
                    found.tick, found.step, "memory", read_state(sources, min(sources), secret)
                )
        except IntegrityError as error:
            damaged.append(error)
        finally:
            close_all(fds)
    return None


def from_storage(
    store: CheckpointStore,
    step: int | None,
    damaged: list[IntegrityError],
    newer_than: int = NOTHING,
) -> Generation | None:
    """The newest checkpoint that reads back whole, or that of ``step``.

    Args:
        store: Where to look.
        step: None for the newest.
        damaged: Gets what is wrong with those that were passed over.
        newer_than: Tick that it has to be newer than.

    Raises:
        StorageError: The store cannot be read.
    """
    for checkpoint in store.checkpoints():
        tick = int(checkpoint.meta.get("tick") or 0)
        if step in (None, checkpoint.step) and tick > newer_than:
            try:
                sources = read_sources(store, checkpoint)
                state = read_state(sources, min(sources), None)
            except IntegrityError as error:
                damaged.append(error)
            else:
                return Generation(tick, checkpoint.step, "storage", state)
    return None


def write_lightning(generation: Generation, out: Path) -> None:
    """Write what ``Trainer.save_checkpoint`` would have written at that step.

    Raises:
        SnapshotError: It was no Lightning run.
        ConfigError: ``out`` cannot be written.
    """
    state = generation.state["state"]
    if "checkpoint" not in state:
        raise SnapshotError(
            "this was no Lightning run, so that no .ckpt can be made of its state: use "
            "--format pt for all of it, or --format safetensors for the model"
        )
    _replace(out, lambda draft: torch.save(state["checkpoint"], draft))


def write_session(generation: Generation, out: Path) -> None:
    """Write the whole state of a `mnemo.Session`, with ``rng``, for ``torch.load``.

    Raises:
        SnapshotError: It was a Lightning run.
        ConfigError: ``out`` cannot be written.
    """
    state = generation.state["state"]
    if "checkpoint" in state:
        raise SnapshotError(
            "this was a Lightning run: use --format ckpt for all of its state, or "
            "--format safetensors for the model"
        )
    whole = {**state, "model": join_module_state(state["model"]), "rng": generation.state["rng"]}
    _replace(out, lambda draft: torch.save(whole, draft))


def write_safetensors(generation: Generation, out: Path) -> list[str]:
    """Write the tensors of the model's ``state_dict``.

    Of those that share memory (tied weights) only the first is written. The metadata maps the name
    of each other one to it, as ``safetensors.torch.save_model`` does and ``load_model`` expects.

    Returns:
        Names of what is no tensor and therefore missing in the file.

    Raises:
        MissingExtraError: safetensors is not installed.
        ConfigError: ``out`` cannot be written.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise MissingExtraError(
            "safetensors is not installed: pip install safetensors, or use another --format"
        ) from error
    state = generation.state["state"]
    model: Mapping[str, Any] = (
        state["checkpoint"]["state_dict"]
        if "checkpoint" in state
        else join_module_state(state["model"])
    )
    kept: dict[tuple[object, ...], str] = {}
    tensors: dict[str, torch.Tensor] = {}
    metadata = {"format": "pt", "step": str(generation.step)}
    for name, value in model.items():
        if not isinstance(value, torch.Tensor):
            continue
        memory = (value.data_ptr(), value.dtype, value.shape, value.stride())
        first = kept.setdefault(memory if value.numel() else (name,), name)
        if first == name:
            tensors[name] = value.contiguous()
        else:
            metadata[name] = first
    _replace(out, lambda draft: save_file(tensors, draft, metadata))
    return [name for name, value in model.items() if not isinstance(value, torch.Tensor)]


def _replace(out: Path, write: Callable[[Path], object]) -> None:
    """Have a draft beside ``out`` written, which takes its place once it is complete."""
    draft = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        write(draft)
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(out)
    except (OSError, RuntimeError) as error:  # torch tells a full disk by a RuntimeError
        raise ConfigError(f"{out} cannot be written: {error}") from error
    finally:
        draft.unlink(missing_ok=True)
