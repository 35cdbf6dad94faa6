"""``mnemo rollback``: forgets what is newer than a step, so that the next start resumes there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Final

import typer

from mnemo.cli import runs, words
from mnemo.config import load_config
from mnemo.errors import NothingToResumeError, RunInUseError, SmpError
from mnemo.recovery.journal import Journal, journal_path
from mnemo.smp import messages as m
from mnemo.smp.client import SmpClient
from mnemo.storage import CheckpointStore
from mnemo.transport.local import close_all

_PERSISTING_S: Final = 3600.0
"""Longest wait for a checkpoint that is on its way to storage."""


@dataclass(frozen=True)
class FitPlan:
    """What a rollback means for one fit (training) of the run. Steps, newest first."""

    fit: int
    in_memory: tuple[int, ...]
    stored: tuple[int, ...]
    to: int

    @property
    def memory_goes(self) -> list[int]:
        """Snapshots that are forgotten."""
        return [step for step in self.in_memory if step > self.to]

    @property
    def storage_goes(self) -> list[int]:
        """Checkpoints that are deleted."""
        return [step for step in self.stored if step > self.to]

    @property
    def resumes_at(self) -> tuple[int, str] | None:
        """Step that the next start resumes at, and from where; None where nothing is left."""
        left = [(step, "memory") for step in self.in_memory if step <= self.to]
        left += [(step, "storage") for step in self.stored if step <= self.to]
        return max(left, key=lambda found: found[0], default=None)


def rollback(
    run_id: runs.RunId,
    *,
    to: Annotated[int, typer.Option(metavar="STEP", min=0, help="The newest step that stays.")],
    config: runs.ConfigFile = None,
    persist_to: runs.PersistTo = None,
    directory: runs.Directory = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Forget what is newer than a step: the next start resumes at what is left."""
    run, url = runs.find_run(run_id, directory, config, persist_to)
    if run.problem:
        raise SmpError(f"run {run_id} is left alone: {run.problem}")
    if run.pids:
        pids = words.listed(run.pids.values())
        raise RunInUseError(f"run {run_id} is training (process {pids}): end it first")
    found = runs.stores(run_id, url) if url else {}
    with runs.connect(run.paths) if run.status else nullcontext() as client:
        plans = plan(run, client, found, to)
        _require_something_left(run_id, plans, to)
        _confirm(run_id, plans, url, yes=yes)
        if client is not None:
            client.tell(m.Rollback(to), timeout_s=_PERSISTING_S)
    # Listed anew: a checkpoint that was on its way to storage has arrived by now.
    deleted = {
        fit: sorted({step for store in stored for step in _delete(store, to)}, reverse=True)
        for fit, stored in (runs.stores(run_id, url) if url else {}).items()
    }
    journal = Journal(journal_path(load_config(config).run.journal, run_id))
    journal.write(
        "rollback",
        run=run_id,
        to=to,
        fits=[
            {
                "fit": p.fit,
                "step": p.resumes_at and p.resumes_at[0],
                "forgotten": p.memory_goes,
                "deleted": deleted.get(p.fit, []),
            }
            for p in plans
        ],
    )
    for each in plans:
        step, origin = each.resumes_at or (-1, "")
        fit = f", fit {each.fit}," if len(plans) > 1 else ""
        typer.echo(f"the next start of {run_id}{fit} resumes at step {step}, from {origin}")


def plan(
    run: runs.Run, client: SmpClient | None, found: dict[int, tuple[CheckpointStore, ...]], to: int
) -> list[FitPlan]:
    """What rolling back means for each fit of which there is anything.

    Raises:
        StorageError: The storage cannot be read.
    """
    plans = []
    for fit in sorted(run.fits | found.keys()):
        # Before and after a validation, a step has a generation each.
        memory = tuple(dict.fromkeys(_in_memory(client, fit))) if client is not None else ()
        stored = _in_all(found.get(fit, ()))
        if memory or stored:
            plans.append(FitPlan(fit, memory, stored, to))
    return plans


def _in_memory(client: SmpClient, fit: int) -> Iterator[int]:
    """Steps of the committed generations in memory, newest first."""
    below: int | None = None
    while below != 0:
        fetched, fds = client.ask(m.Fetch(below or 0, fit), m.Fetched)
        close_all(fds)
        if fetched.generation is None:
            return
        yield fetched.generation.step
        below = fetched.generation.tick


def _in_all(stores: tuple[CheckpointStore, ...]) -> tuple[int, ...]:
    """Steps of the checkpoints that every node has stored, newest first."""
    steps = [{checkpoint.step for checkpoint in store.checkpoints()} for store in stores]
    return tuple(sorted(set.intersection(*steps), reverse=True)) if steps else ()


def _delete(store: CheckpointStore, to: int) -> list[int]:
    """Delete the checkpoints after step ``to``, newest first; their steps."""
    newer = [checkpoint.step for checkpoint in store.checkpoints() if checkpoint.step > to]
    for step in newer:
        store.delete(step)
    return newer


def _require_something_left(run_id: str, plans: list[FitPlan], to: int) -> None:
    if not plans:
        raise NothingToResumeError(
            f"run {run_id} has no snapshot in memory and no checkpoint that could be found; "
            "say where its checkpoints are with --persist-to or --config"
        )
    for each in plans:
        if each.resumes_at is None:
            oldest = min(each.in_memory + each.stored)
            fit = f", fit {each.fit}," if len(plans) > 1 else ""
            raise NothingToResumeError(
                f"nothing of run {run_id}{fit} is as old as step {to}: the oldest is step {oldest}."
                " Nothing was deleted. To begin anew, start it with run.resume=never"
            )


def _confirm(run_id: str, plans: list[FitPlan], url: str, *, yes: bool) -> None:
    """Say what goes, and have it confirmed if that deletes something that is stored."""
    for each in plans:
        fit = f"fit {each.fit}: " if len(plans) > 1 else ""
        if each.memory_goes:
            typer.echo(f"{fit}forgets in memory: step {words.listed(each.memory_goes[::-1])}")
        if each.storage_goes:
            gone = words.listed(each.storage_goes[::-1])
            typer.echo(f"{fit}deletes from {url}: step {gone}")
    if any(each.memory_goes or each.storage_goes for each in plans):
        if not yes:
            typer.confirm(f"roll {run_id} back?", abort=True)
    else:
        typer.echo("nothing is newer than that")
