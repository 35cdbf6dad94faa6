"""``mnemo clean``: gives back what runs that nobody goes on with still hold."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from mnemo.cli import words
from mnemo.cli.runs import Directory, Run, all_runs, connect, one_run, run_directory
from mnemo.errors import ConfigError, MnemoError, RunInUseError, SmpError
from mnemo.smp import messages as m
from mnemo.smp.paths import RunPaths


def clean(
    run_id: Annotated[
        str | None,
        typer.Argument(metavar="RUN_ID", show_default=False, help="Only this run."),
    ] = None,
    *,
    everything: Annotated[
        bool, typer.Option("--all", help="Every run of this node that is not training.")
    ] = False,
    directory: Directory = None,
    force: Annotated[
        bool, typer.Option("--force", help="Give the snapshots of a run up that is training.")
    ] = False,
) -> None:
    """Give the memory of ended runs back, and remove what dead ones left over."""
    if (run_id is None) is not everything:
        raise ConfigError("name one run, or --all: mnemo clean RUN_ID, mnemo clean --all")
    parent = run_directory(directory)
    runs = all_runs(parent) if run_id is None else [one_run(run_id, parent)]
    if not runs:
        typer.echo(f"no runs in {parent}")
    kept = 0
    for run in runs:
        try:
            typer.echo(_clean(run, force=force))
        except MnemoError as error:
            if run_id is not None:
                raise
            kept += 1
            typer.echo(f"mnemo: {error}", err=True)
    if kept:
        raise typer.Exit(1)


def _clean(run: Run, *, force: bool) -> str:
    """Clean one run up; what was freed, in words."""
    name = run.paths.run_id
    if run.problem:
        raise SmpError(f"run {name} is left alone: {run.problem}. Or end its snapshot process")
    if run.status is None:
        _remove_left_over(run.paths)
        return f"{name}: removed {run.paths.directory}, which a dead run had left"
    with connect(run.paths) as client:
        try:
            client.tell(m.Shutdown(force))
        except RunInUseError as error:
            raise RunInUseError(f"{error}, or give its snapshots up with --force") from error
        client.wait_for_end()
    fits = [fit for fit in run.status["fits"] if fit["committed"]]
    given_up = words.listed(fit["committed"]["step"] for fit in fits) if fits else ""
    freed = words.size(sum(fit["memory"] for fit in run.status["fits"]))
    text = f"{name}: freed {freed}" + (f", gave up the snapshot of step {given_up}" if fits else "")
    if run.pids:
        text += "; its ranks go on, and start another snapshot process"
    return text


def _remove_left_over(paths: RunPaths) -> None:
    """Remove the directory of a run whose SMP is dead, under the lock that an SMP would hold.

    Raises:
        SmpError: An SMP is just starting, the lock is none, or something else lies there.
    """
    record = paths.read_record()
    try:
        lock = os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise SmpError(f"{paths.lock} cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if record is not None:
            _remove_socket(Path(record.socket))
        paths.record.with_suffix(".tmp").unlink(missing_ok=True)
        paths.remove()
    except BlockingIOError as error:
        raise SmpError(f"run {paths.run_id} is just starting: it is left alone") from error
    finally:
        os.close(lock)
    if paths.directory.exists():
        others = ", ".join(sorted(os.listdir(paths.directory))[:5])  # noqa: PTH208 - names only
        raise SmpError(
            f"{paths.directory} stays, for it holds what mnemo did not put there: {others}"
        )


def _remove_socket(socket: Path) -> None:
    """Remove a socket that had to lie outside the run directory (see `mnemo.smp.__main__`)."""
    place = socket.parent
    name = re.compile(rf"mnemo-{os.getuid()}-sock-\w+")
    if (
        place.parent == Path(tempfile.gettempdir())
        and name.fullmatch(place.name)
        and place.is_dir()
        and not place.is_symlink()
    ):
        socket.unlink(missing_ok=True)
        place.rmdir()
