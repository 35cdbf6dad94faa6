"""``mnemo confirm-lost``: the operator's word, where too few nodes are left to decide."""

from __future__ import annotations

from typing import Annotated

import typer

from mnemo.cli.runs import Directory, all_runs, one_run, run_directory
from mnemo.errors import ConfigError


def confirm_lost(
    nodes: Annotated[
        list[str],
        typer.Argument(metavar="ADDRESS...", show_default=False, help="Nodes that are dead."),
    ],
    *,
    run_id: Annotated[
        str | None, typer.Option("--run", help="The run, where this node has several.")
    ] = None,
    directory: Directory = None,
) -> None:
    """Vouch that nodes are dead, with all their processes, so that the others may go on.

    If one of them still runs, two halves of the job may go on, each for itself.
    """
    parent = run_directory(directory)
    runs = all_runs(parent) if run_id is None else [one_run(run_id, parent)]
    if len(runs) != 1:
        found = ", ".join(run.paths.run_id for run in runs) or "none"
        raise ConfigError(f"name the run with --run; {parent} has {found}")
    paths = runs[0].paths
    draft = paths.verdicts.with_suffix(".tmp")
    draft.write_text("".join(f"{node}\n" for node in nodes))
    draft.replace(paths.verdicts)
    typer.echo(f"run {paths.run_id}: told mnemo run on this node, if it waits for that")
