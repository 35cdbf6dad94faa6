"""``mnemo export``: a snapshot or checkpoint as a file that needs no mnemo to be read."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mnemo.cli import runs
from mnemo.errors import (
    ConfigError,
    IntegrityError,
    MnemoError,
    NothingToResumeError,
    SmpError,
)
from mnemo.transport import auth

if TYPE_CHECKING:
    from mnemo.session.export import Generation
    from mnemo.storage import CheckpointStore


class Origin(str, Enum):
    """Where to take the state from."""

    memory = "memory"
    storage = "storage"


class Format(str, Enum):
    """What to write; each is the suffix of its files."""

    ckpt = "ckpt"
    safetensors = "safetensors"
    pt = "pt"


def export(
    run_id: runs.RunId,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", show_default=False, help="The file to write.")
    ],
    *,
    kind: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help="ckpt: for Lightning; safetensors: the model's weights; pt: all of a Session's "
            "state, for torch.load. The default is OUT's suffix.",
        ),
    ] = None,
    origin: Annotated[
        Origin | None, typer.Option("--from", help="The default is whichever has the newest.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(min=0, help="The default is the newest there is.")
    ] = None,
    fit: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Which training of a script with several, from 0; the default is the last "
            "that anything is kept of.",
        ),
    ] = None,
    config: runs.ConfigFile = None,
    persist_to: runs.PersistTo = None,
    directory: runs.Directory = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
) -> None:
    """Write a run's newest state to a file, also while it is training."""
    chosen = kind or _format_of(out)
    _require_writable(out, force=force)
    run, url = runs.find_run(run_id, directory, config, persist_to)
    if run.problem and origin is not Origin.storage:
        raise SmpError(f"{run.problem}. Use --from storage, or end the snapshot process")
    live = set() if origin is Origin.storage else run.fits
    stored = runs.stores(run_id, url) if url and origin is not Origin.memory else {}
    damaged: list[IntegrityError] = []
    found = next(
        (
            newest
            for number in sorted(live | stored.keys(), reverse=True)
            if fit in (None, number)
            and (
                newest := _newest(
                    run, number, number in live, stored.get(number, ()), step, damaged
                )
            )
        ),
        None,
    )
    if found is None:
        places = ["memory"] * bool(live) + [url] * bool(url and origin is not Origin.memory)
        raise _nothing(run_id, step, " or ".join(places) or "memory", damaged)
    for error in damaged:
        typer.echo(f"mnemo: {error}: it is passed over", err=True)
    lacking = _write(found, out, chosen)
    typer.echo(f"step {found.step} of {run_id}, from {found.origin}, written to {out}")
    if lacking:
        typer.echo(f"left out, for safetensors holds tensors alone: {', '.join(lacking)}")


def _format_of(out: Path) -> Format:
    try:
        return Format(out.suffix.removeprefix("."))
    except ValueError:
        raise ConfigError(
            f"{out} does not say what to write: end its name in .ckpt, .safetensors or .pt, "
            "or give --format"
        ) from None


def _require_writable(out: Path, *, force: bool) -> None:
    if not out.parent.is_dir():
        raise ConfigError(f"{out.parent} is not a directory: make it first")
    if out.is_dir():
        raise ConfigError(f"{out} is a directory: name the file to write")
    if out.exists() and not force:
        raise ConfigError(f"{out} exists: name another file, or replace it with --force")


def _newest(
    run: runs.Run,
    fit: int,
    live: bool,
    stored: tuple[CheckpointStore, ...],
    step: int | None,
    damaged: list[IntegrityError],
) -> Generation | None:
    """The newest generation of a fit, or that of ``step``; storage's only if that is newer.

    Of several nodes each has all that replicas hold: the next one's counts only if it is newer.
    """
    from mnemo.session.export import from_memory, from_storage

    found = None
    if live:
        with runs.connect(run.paths) as client:
            secret = auth.load_or_create_secret(run.paths.secret)
            found = from_memory(client, fit, secret, step, damaged)
    for store in stored:
        found = from_storage(store, step, damaged, found.tick if found else -1) or found
    return found


def _nothing(
    run_id: str, step: int | None, places: str, damaged: list[IntegrityError]
) -> MnemoError:
    """The error where nothing could be exported: nothing is there, or all that is, is damaged."""
    wanted = "" if step is None else f" of step {step}"
    if damaged:
        return IntegrityError(
            f"what is kept{wanted} of run {run_id} in {places} is damaged: "
            f"{'; '.join(map(str, damaged))}. --persist-to says where else checkpoints are, --step "
            "chooses another one"
        )
    return NothingToResumeError(
        f"{f'no step {step}' if wanted else 'nothing'} of run {run_id} is kept in {places}; "
        "mnemo status shows what is, --persist-to says where its checkpoints are"
    )


def _write(found: Generation, out: Path, chosen: Format) -> list[str]:
    """Write the file; the names of what it lacks."""
    from mnemo.session.export import write_lightning, write_safetensors, write_session

    if chosen is Format.safetensors:
        return write_safetensors(found, out)
    write = write_lightning if chosen is Format.ckpt else write_session
    write(found, out)
    return []
