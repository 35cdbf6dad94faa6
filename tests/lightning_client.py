"""Kills Lightning runs of `scripts/lightning_lab.py` and compares them with undisturbed ones."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import warm
from ports import held_port

from mnemo.faults import Declaration, Fault, Hook
from mnemo.recovery import journal

if TYPE_CHECKING:
    from collections.abc import Callable

    from warm import Zygote

LAB = Path(__file__).parent / "scripts" / "lightning_lab.py"
KILLED = -9


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
    """Runs cases, each rank a process of its own that is forked from the zygote."""

    def __init__(self, zygote: Zygote) -> None:
        self._zygote = zygote

    def life(
        self,
        case: str,
        out: Path,
        *,
        ranks: int = 1,
        mnemo: bool = True,
        settings: dict[str, Any] | None = None,
        **options: Any,
    ) -> Life:
        """One life of a case of `scripts/lightning_cases.py`; see `script` for the options."""
        request = {"case": case, "ranks": ranks, "mnemo": mnemo, "settings": settings or {}}
        return self.script(out, LAB, json.dumps(request), ranks=ranks, **options)

    def script(
        self,
        out: Path,
        *command: object,
        run_id: str = "",
        ranks: int = 1,
        faults: Declaration | None = None,
        **environ: str,
    ) -> Life:
        """One process (per rank) from start to end; when one is killed, so are the others."""
        out.mkdir(parents=True, exist_ok=True)
        if run_id:
            environ["MNEMO_RUN_ID"] = run_id
        if faults is not None:
            environ.update(faults.environ())
        with contextlib.ExitStack() as stack:
            if ranks > 1:
                environ.update(
                    WORLD_SIZE=str(ranks),
                    LOCAL_WORLD_SIZE=str(ranks),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(stack.enter_context(held_port())),
                    TORCHELASTIC_RUN_ID="none",
                    GROUP_RANK="0",
                )
            lives, errors, starts = [], [], []
            for rank in range(ranks):
                if ranks > 1:
                    environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
                sink = stack.enter_context((out / f"rank-{rank}.out").open("a"))
                errors.append(stack.enter_context((out / f"rank-{rank}.err").open("a+")))
                starts.append(errors[-1].tell())
                started = self._zygote.start(
                    *command, out=sink, err=errors[-1], cwd=out, environ=environ
                )
                lives.append(stack.enter_context(started))
            running = set(lives)
            while running:
                ended, _, _ = select.select(running, [], [], warm.TIMEOUT_S)
                assert ended, f"still running after {warm.TIMEOUT_S} s: {out.name}"
                for life in ended:
                    running.remove(life)
                    if life.wait() < 0:
                        for other in running:
                            other.kill()
            for error, start in zip(errors, starts, strict=True):
                error.seek(start)
            return Life([life.wait() for life in lives], [error.read() for error in errors])

    def lives(self, case: str, out: Path, faults: tuple[Fault, ...], **options: Any) -> list[Life]:
        """As many as it takes until the case ends by itself; every fault has happened."""
        return until_it_ends(functools.partial(self.life, case, out, **options), out, faults)


def until_it_ends(live: Callable[..., Life], out: Path, faults: tuple[Fault, ...]) -> list[Life]:
    """Lives of the run that is named as ``out``, until it ends by itself; every fault happened."""
    declared = Declaration(faults, str(out.with_suffix(".fired")))
    found: list[Life] = []
    while True:
        life = live(run_id=out.name, faults=declared)
        found.append(life)
        if all(code >= 0 for code in life.codes):
            assert life.codes == [0] * len(life.codes), life.said
            declared.assert_fired()
            return found
        assert len(found) <= len(faults), life.said


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
