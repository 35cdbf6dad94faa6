"""Kills ranks of one training again and again, and compares with the undisturbed run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from mnemo.faults import Declaration, Fault, Fired, Hook

SCRIPT = Path(__file__).parents[1] / "scripts" / "lightning_small.py"
FLAGS = ("--width=4096",)  # large enough that either rank has chunks to copy
RUN_LIMIT_S = 540


def train(
    out: Path,
    declared: Declaration | None = None,
    *flags: str,
    ranks: int = 2,
    strikes: bool = False,
) -> str:
    """One run under ``mnemo run``, restarted as often as it is killed; what it said."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **(declared.environ() if declared else {})}
    words = [f"--nproc-per-node={ranks}", "--max-restarts=1000", str(SCRIPT), f"--ranks={ranks}"]
    command = [sys.executable, "-c", "from mnemo.cli import main; main()", "run", *words]
    command += [f"--out={out}", *FLAGS, *flags]
    log = out.with_suffix(".log")
    with log.open("wb") as sink:
        process = subprocess.Popen(command, env=environ, stdout=sink, stderr=subprocess.STDOUT)
        striker = threading.Thread(target=_strike, args=(process, declared))
        if strikes:
            striker.start()
        try:
            code = process.wait(RUN_LIMIT_S)
        except BaseException:
            process.terminate()
            process.wait(60)
            raise
        finally:
            if strikes:
                striker.join()
    assert code == 0, f"exit code {code}:\n{log.read_text()[-4000:]}"
    return log.read_text()


def _strike(process: subprocess.Popen[bytes], declared: Declaration | None) -> None:
    """Let the faults that have an instant happen, each its time after the one before."""
    assert declared is not None
    for fault in declared.faults:
        if isinstance(fault.at, Hook):
            continue
        due = time.monotonic() + fault.at
        while process.poll() is None:
            victim = _rank(process.pid, fault.rank)
            if victim is not None and time.monotonic() >= due:
                try:
                    declared.strike(victim, fault)
                    break
                except ProcessLookupError:
                    pass
            time.sleep(0.01)  # the campaign's own clock: the instant is what is random here


def _rank(agent: int, rank: int) -> int | None:
    """Process id of a rank, once it is far enough to have a training to lose."""
    try:
        for child in psutil.Process(agent).children():
            environ = child.environ()
            if environ.get("RANK") == str(rank) and environ.get("MNEMO_ROLE") != "smp":
                return child.pid
    except psutil.Error:
        return None
    return None


def assert_same(undisturbed: Path, disturbed: Path, ranks: int = 2) -> None:
    """Every loss, every batch's data, every epoch's metrics, the end state: bit-identical.

    A step that was computed twice has to come out the same both times.
    """
    for name in ("losses", "epochs"):
        for rank in range(ranks):
            expected = _rows(undisturbed / f"{name}-{rank}.jsonl")
            found = _rows(disturbed / f"{name}-{rank}.jsonl")
            assert found == expected, f"{name} of rank {rank} differ"
    for rank in range(ranks):
        expected = json.loads((undisturbed / f"final-{rank}.json").read_text())
        assert json.loads((disturbed / f"final-{rank}.json").read_text()) == expected


def _rows(path: Path) -> dict[tuple[int, int | None], dict[str, Any]]:
    rows: dict[tuple[int, int | None], dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # half a line of a killed process; the batch was computed again
        key = (row["epoch"], row.get("batch"))
        assert rows.setdefault(key, row) == row, f"{key} came out differently when repeated"
    return rows


def by_phase(fired: list[Fired]) -> Counter[str]:
    """How many kills hit each phase."""
    return Counter(f.phase or "starting" for f in fired)


def hooks(faults: list[Fault]) -> list[Fault]:
    """Faults of one run, in the order of their steps, so that none is passed by."""
    return sorted(faults, key=lambda f: f.at.step or 0 if isinstance(f.at, Hook) else 0)
