"""``mnemo status``: what is kept of which run on this node, and what a crash would cost."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mnemo.cli import words
from mnemo.cli.check import check
from mnemo.cli.runs import Directory, Run, all_runs, one_run, run_directory

VERSION: Final = 1
"""Of the JSON object. Fields may be added; a change of one that is there raises it."""


def status(
    run_id: Annotated[
        str | None,
        typer.Argument(metavar="RUN_ID", show_default=False, help="Only this run."),
    ] = None,
    *,
    directory: Directory = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verify: Annotated[
        bool, typer.Option("--check", help="Read the snapshots, and say which are damaged.")
    ] = False,
) -> None:
    """Show the runs of this node: where they are, what is kept, what a crash would cost."""
    parent = run_directory(directory)
    runs = [one_run(run_id, parent)] if run_id else all_runs(parent)
    now = time.time()
    described = [describe(run, now, check(run) if verify else {}) for run in runs]
    if as_json:
        found = {"version": VERSION, "time": now, "directory": str(parent), "runs": described}
        typer.echo(json.dumps(found, indent=2))
    elif described:
        show(described, Console(highlight=False))
    else:
        typer.echo(f"no runs in {parent}")


def describe(
    run: Run, now: float, checked: Mapping[int, list[dict[str, Any]]] | None = None
) -> dict[str, Any]:
    """One run as plain data. Sizes in bytes, ages in seconds, `now` in unix seconds.

    ``checked`` is what `mnemo.cli.check.check` has found.
    """
    described: dict[str, Any] = {
        "run": run.paths.run_id,
        "directory": str(run.paths.directory),
        "state": "left over" if run.is_stale else "not answering",
        "problem": run.problem,
        "smp": None,
        "memory_bytes": 0,
        "keep_alive_s": None,
        "kept_for_s": None,
        "counters": {},
        "fits": [],
    }
    told = run.status
    if told is None:
        return described
    return described | {
        "state": _state(told["fits"]),
        "smp": {"pid": told["pid"], "age_s": now - told["started"]},
        "memory_bytes": sum(fit["memory"] for fit in told["fits"]),
        "keep_alive_s": told["keep_alive_s"],
        "kept_for_s": told["kept_for_s"],
        "counters": told["counts"],
        "fits": [_describe_fit(fit, now, (checked or {}).get(fit["fit"])) for fit in told["fits"]],
    }


def _state(fits: list[dict[str, Any]]) -> str:
    """In one word, what the processes do that are connected."""
    connected = [fit for fit in fits if fit["connected"]]
    if not connected:
        return "waiting"
    return "finished" if all(fit["finished"] for fit in connected) else "training"


def _describe_fit(
    fit: dict[str, Any], now: float, checked: list[dict[str, Any]] | None
) -> dict[str, Any]:
    newest, persist, protect = fit["committed"], fit["persist"], fit["protect"]
    stored = persist["newest_step"] if persist and persist["newest_step"] >= 0 else None
    reached = max((p["step"] for p in fit["progress"]), default=0)
    in_memory = newest["step"] if newest else 0
    if checked is not None:
        in_memory = max((found["step"] for found in checked if not found["damaged"]), default=0)
    safe = max(in_memory, stored or 0)
    return {
        "fit": fit["fit"],
        "finished": fit["finished"],
        "members": fit["members"],
        "ranks": [_describe_rank(slot, rank, fit, now) for slot, rank in enumerate(_ranks_of(fit))],
        "newest": newest
        and {
            "tick": newest["tick"],
            "step": newest["step"],
            "age_s": now - newest["time"],
        },
        "checked": checked,
        "memory_bytes": fit["memory"],
        "replicas_differ": fit["differ"],
        "steps_at_risk": max(0, reached - safe),
        "persist": persist
        and {
            "to": persist["to"],
            "newest_step": stored,
            "every_s": persist["every_s"],
            "failure": persist["failure"],
        },
        "protect": protect
        and {
            "nodes": len(protect["group"]),
            "parities": protect["parities"],
            "newest_step": protect["step"] if protect["step"] >= 0 else None,
            "failure": protect["failure"],
        },
    }


def _ranks_of(fit: dict[str, Any]) -> list[int]:
    """This node's ranks; where some have not joined yet, as if it were the only node."""
    joined: list[int] = fit["ranks"]
    return joined if len(joined) == fit["members"] else list(range(fit["members"]))


def _describe_rank(slot: int, rank: int, fit: dict[str, Any], now: float) -> dict[str, Any]:
    at: dict[str, Any] = next((p for p in fit["progress"] if p["slot"] == slot), {})
    sealed = sorted(
        (s["tick"], s["step"])
        for s in fit["segments"]
        if s["rank"] == rank and s["state"] == "SEALED"
    )
    return {
        "rank": rank,
        "pid": fit["connected"].get(str(rank)),
        "step": at.get("step"),
        "epoch": at.get("epoch"),
        "batch": at.get("batch"),
        "age_s": now - at["time"] if at else None,
        "snapshots": [{"tick": tick, "step": step} for tick, step in sealed],
    }


_STYLES: Final = {
    "training": "green",
    "finished": "green",
    "waiting": "yellow",
    "not answering": "red",
}


def show(described: list[dict[str, Any]], console: Console) -> None:
    """Print what `describe` made."""
    for number, run in enumerate(described):
        if number:
            console.print()
        _show_run(run, console)


def _show_run(run: dict[str, Any], console: Console) -> None:
    state, smp = run["state"], run["smp"]
    title = Text.assemble((run["run"], "bold"), " · ", (state, _STYLES.get(state, "dim")))
    if smp:
        title.append(f" · snapshot process {smp['pid']}, up {words.span(smp['age_s'])}")
    console.print(title, soft_wrap=True)
    for fit in run["fits"]:
        if len(run["fits"]) > 1:
            finished = " · finished" if fit["finished"] else ""
            console.print(Padding(f"fit {fit['fit']}{finished}", (0, 0, 0, 2)))
        if fit["newest"] or not fit["finished"]:
            console.print(_indented(_ranks(fit["ranks"])))
            console.print(_indented(_fit_facts(run, fit)))
    facts = _facts()
    if smp is None:
        advice = f"nothing is kept here; mnemo clean {run['run']} removes it"
        facts.add_row("directory", run["directory"])
        facts.add_row("", run["problem"] or advice)
    else:
        facts.add_row("memory", words.size(run["memory_bytes"]))
        facts.add_row("snapshots", _counted(run["counters"]))
        facts.add_row("kept", _kept(run))
    console.print(_indented(facts))


def _indented(table: Table) -> Padding:
    return Padding(table, (0, 0, 0, 2), expand=False)


def _facts() -> Table:
    """An empty table of names and what is said of them; all such tables line up."""
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(style="dim", no_wrap=True, min_width=len("at the next start"))
    facts.add_column(overflow="fold")
    return facts


def _fit_facts(run: dict[str, Any], fit: dict[str, Any]) -> Table:
    facts = _facts()
    newest, persist = fit["newest"], fit["persist"]
    facts.add_row(
        "newest snapshot",
        f"step {newest['step']}, {words.span(newest['age_s'])} old" if newest else "none yet",
    )
    damaged = [found["damaged"] for found in fit["checked"] or () if found["damaged"]]
    for what in damaged:
        facts.add_row("damaged", Text(what, "red"))
    if damaged and len(damaged) == len(fit["checked"]):
        facts.add_row("", Text("no snapshot in memory can be used", "red"))
    if protect := fit["protect"]:
        kept = protect["newest_step"]
        step = "nothing yet" if kept is None else f"step {kept}"
        facts.add_row(
            "protected",
            f"{step}, over {protect['nodes']} nodes, of which {protect['parities']} may be lost",
        )
        if protect["failure"]:
            facts.add_row("", Text(protect["failure"], "red"))
    if persist:
        stored = persist["newest_step"]
        step = "nothing of this process yet" if stored is None else f"step {stored}"
        every = words.span(persist["every_s"])
        facts.add_row("on storage", f"{step}, every {every} to {persist['to']}")
        if persist["failure"]:
            facts.add_row("", Text(persist["failure"], "red"))
    if fit["replicas_differ"]:
        facts.add_row("replicas", Text(f"differ: {fit['replicas_differ']}", "red"))
    unknown = persist and persist["newest_step"] is None and not newest
    repeated = ("up to " if unknown else "") + words.steps(fit["steps_at_risk"])
    if run["state"] == "waiting":
        facts.add_row("at the next start", f"{repeated} will be repeated")
    else:
        facts.add_row("if it dies now", f"{repeated} would be repeated")
    return facts


def _ranks(ranks: list[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("rank", "process", "step", "epoch", "batch"):
        table.add_column(name, justify="right")
    table.add_column("seen", no_wrap=True)
    table.add_column("snapshots in memory")
    for rank in ranks:
        kept = [s["step"] for s in rank["snapshots"]]
        table.add_row(
            str(rank["rank"]),
            Text("gone", "red") if rank["pid"] is None else str(rank["pid"]),
            *("-" if rank[k] is None else str(rank[k]) for k in ("step", "epoch", "batch")),
            "-" if rank["age_s"] is None else f"{words.span(rank['age_s'])} ago",
            f"step {words.listed(kept)}" if kept else "-",
        )
    return table


def _counted(counters: dict[str, int]) -> str:
    text = f"{counters['committed']} taken"
    if counters["persisted"]:
        text += f", {counters['persisted']} of them stored"
    if counters["persist_failed"]:
        text += f", {counters['persist_failed']} could not be stored"
    if counters.get("skipped"):
        text += f", {counters['skipped']} skipped for want of a buffer"
    return text


def _kept(run: dict[str, Any]) -> str:
    if run["state"] == "training":
        return f"{words.span(run['keep_alive_s'])} once nobody is connected"
    if run["state"] == "finished":
        span = words.span(run["keep_alive_s"])
        return f"until the program has ended well, too; {span} more if it does not"
    return f"{words.span(run['kept_for_s'])} more, as nobody is connected; then given back"
