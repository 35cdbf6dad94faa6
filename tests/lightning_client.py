"""Kills Lightning runs of `scripts/lightning_lab.py` and compares them with undisturbed ones."""

from __future__ import annotations

import atexit
import functools
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mnemo.faults import Declaration, Fault, Hook
from mnemo.recovery import journal

LAB = Path(__file__).parent / "scripts" / "lightning_lab.py"
KILLED = -9


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kill_at(*places: str, rank: int = 0, kind: str = "sigkill") -> tuple[Fault, ...]:
    """``"backward:3"``: in the backward pass after three optimizer steps."""
    made = []
    for place in places:
        phase, step = place.split(":")
        made.append(Fault(kind, rank, Hook(phase, int(step))))  # type: ignore[arg-type]
    return tuple(made)


@dataclass
class Life:
    """How one life of a case ended."""

    codes: list[int]
    errors: list[str] = field(repr=False)

    @property
    def said(self) -> str:
        return "\n".join(self.errors)


class Lab:
    """The process that lives are forked from."""

    def __init__(self) -> None:
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
        self._process = subprocess.Popen(
            [sys.executable, str(LAB)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environ,
        )
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the lab died"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def life(
        self,
        case: str,
        out: Path,
        *,
        run_id: str = "",
        ranks: int = 1,
        faults: Declaration | None = None,
        mnemo: bool = True,
        settings: dict[str, Any] | None = None,
        **environ: str,
    ) -> Life:
        """One process (per rank) from start to end."""
        out.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, **environ, "OMP_NUM_THREADS": "1"}
        env.pop("PYTEST_CURRENT_TEST", None)
        if run_id:
            env["MNEMO_RUN_ID"] = run_id
        if faults is not None:
            env.update(faults.environ())
        if ranks > 1:
            env.update(
                WORLD_SIZE=str(ranks),
                LOCAL_WORLD_SIZE=str(ranks),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(free_port()),
                TORCHELASTIC_RUN_ID="none",
                GROUP_RANK="0",
            )
        before = [self._said(out, rank) for rank in range(ranks)]
        request = {
            "case": case,
            "out": str(out),
            "env": env,
            "ranks": ranks,
            "mnemo": mnemo,
            "settings": settings or {},
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        self._answer()
        codes = self._answer()["codes"]
        after = [self._said(out, rank) for rank in range(ranks)]
        return Life(codes, [a[len(b) :] for a, b in zip(after, before, strict=True)])

    @staticmethod
    def _said(out: Path, rank: int) -> str:
        file = out / f"rank-{rank}.err"
        return file.read_text(errors="replace") if file.exists() else ""

    def lives(self, case: str, out: Path, faults: tuple[Fault, ...], **options: Any) -> list[Life]:
        """As many as it takes until the case ends by itself; every fault has happened."""
        declared = Declaration(faults, str(out.with_suffix(".fired")))
        found: list[Life] = []
        while True:
            life = self.life(
                case, out, run_id=options.pop("run_id", out.name), faults=declared, **options
            )
            options.setdefault("run_id", out.name)
            found.append(life)
            if all(code >= 0 for code in life.codes):
                assert life.codes == [0] * len(life.codes), life.said
                declared.assert_fired()
                return found
            assert len(found) <= len(faults), life.said

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=20)
        self._process.stdout.close()


@functools.cache
def shared_lab() -> Lab:
    """The one of this test session: what it imports takes seconds."""
    made = Lab()
    atexit.register(made.close)
    return made


def rows(out: Path, rank: int = 0) -> dict[tuple[Any, ...], dict[str, Any]]:
    """What the recorder wrote, by key. A row that was written again must be what it was."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in (out / f"rows-{rank}.jsonl").read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut off by a kill
        key = tuple(row.pop("key"))
        assert found.setdefault(key, row) == row, differing(found[key], row, key)
    return found


def differing(then: dict[str, Any], now: dict[str, Any], key: object) -> str:
    names = [name for name in then if then.get(name) != now.get(name)]
    return f"{key}: {', '.join(f'{n}: {then.get(n)} != {now.get(n)}' for n in names)}"


def assert_same(undisturbed: Path, other: Path, ranks: int = 1) -> None:
    """Every batch, metric and the end are bit-identical."""
    for rank in range(ranks):
        then, now = rows(undisturbed, rank), rows(other, rank)
        for key in then:
            assert key in now, f"{key} is missing"
            assert then[key] == now[key], differing(then[key], now[key], key)
        assert then.keys() == now.keys()
        assert any(key[1] == "final" for key in then)


def records(run_id: str) -> list[dict[str, Any]]:
    """The run's journal."""
    return journal.read(journal.journal_path(os.environ["MNEMO_RUN__JOURNAL"], run_id))
