"""A rank that dies is replaced while the others go on: they repeat nothing, and no bit differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import campaign
import pytest
from launching import Result, launch

from mnemo.faults import Declaration, Fault, Hook, Kind

SESSION = Path(__file__).parents[1] / "scripts" / "session_replaced.py"
FORWARDS = 30
"""Of one rank of two."""
_REPLACED = "0 steps lost, exact"


def _train(
    out: Path, ranks: int, *faults: Fault, every: int = 1, flags: tuple[str, ...] = ()
) -> Result:
    out.mkdir()
    declared = Declaration(faults, record=str(out / "fired"))
    ended = launch(
        "run.name=lab",
        f"--nproc-per-node={ranks}",
        str(SESSION),
        str(out),
        f"--every={every}",
        *flags,
        cwd=out,
        MNEMO_RUN_ID=out.name,
        MNEMO_RUN__JOURNAL=str(out / "journal"),
        **declared.environ(),
    )
    assert ended.code == 0, ended.err
    declared.assert_fired()
    return ended


def _end(out: Path) -> Any:
    return json.loads((out / "0.json").read_text())


def _notes(out: Path) -> dict[int, list[list[dict[str, Any]]]]:
    """What each process of each rank did, in the order in which they ended."""
    found: dict[int, list[list[dict[str, Any]]]] = {}
    for path in sorted(out.glob("*-*.jsonl"), key=lambda p: p.stat().st_mtime):
        notes = [json.loads(line) for line in path.read_text().splitlines()]
        found.setdefault(int(path.name.partition("-")[0]), []).append(notes)
    return found


def _losses(notes: list[dict[str, Any]]) -> list[tuple[int, float, float]]:
    return [(n["step"], n["loss"], n["rng"]) for n in notes if "step" in n]


def _forwards(notes: list[dict[str, Any]]) -> int:
    return sum("forward" in note for note in notes)


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("every", "rank", "phase"),
    [
        *((every, 0, phase) for every in (1, 1000) for phase in ("backward", "loading", "between")),
        *((every, 1, phase) for every in (1, 1000) for phase in ("backward", "forward")),
        (1, 0, "update"),
        (1, 1, "updated"),
        (1, 1, "behind"),
    ],
)
def test_a_rank_of_two(tmp_path: Path, every: int, rank: int, phase: str) -> None:
    """Its buffers, its random numbers and its place in the data are those of the lost one.

    Parameters come from the snapshot of the boundary; or, where none was taken, from another rank,
    which has them until it updates its own.
    """
    calm, struck = tmp_path / "calm", tmp_path / "struck"
    _train(calm, 2)
    ended = _train(struck, 2, Fault("sigkill", rank, Hook(phase, 5)), every=every)
    assert _end(struck) == _end(calm)
    expected, found = _notes(calm), _notes(struck)
    (left,) = found[1 - rank]
    assert _forwards(left) == FORWARDS
    assert _losses(left) == _losses(expected[1 - rank][0])
    lost, joined = found[rank]
    assert _losses(lost) + _losses(joined) == _losses(expected[rank][0])
    assert _forwards(lost) + _forwards(joined) <= FORWARDS + 2  # its own micro-batches
    assert f"rank {rank} killed by SIGKILL → " in ended.err
    assert ("state from memory" if every == 1 else f"state from rank {1 - rank}") in ended.err
    assert _REPLACED in ended.err
    assert "restart" not in ended.err.partition("logs in")[2]


@pytest.mark.campaign
@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_of_three_twice(tmp_path: Path, rank: int) -> None:
    calm, struck = tmp_path / "calm", tmp_path / "struck"
    _train(calm, 3)
    faults = (
        Fault("sigkill", rank, Hook("backward", 2)),
        Fault("sigkill", 1, Hook("forward", 6)),
    )
    ended = _train(struck, 3, *faults)
    assert _end(struck) == _end(calm)
    assert ended.err.count(_REPLACED) == 2


@pytest.mark.campaign
def test_what_cannot_be_replaced_starts_again_from_memory(tmp_path: Path) -> None:
    """Where parameters may be half updated, and no snapshot has those of before."""
    calm, struck = tmp_path / "calm", tmp_path / "struck"
    _train(calm, 2)
    ended = _train(struck, 2, Fault("sigkill", 1, Hook("update", 5)), every=3)
    assert _end(struck) == _end(calm)
    assert "all 2 ranks restart" in ended.err
    assert "resumed from memory" in ended.err


@pytest.mark.campaign
@pytest.mark.parametrize("made", [0, 3, 5])
def test_a_group_of_another_backend_cannot_go_on_with_a_new_rank(tmp_path: Path, made: int) -> None:
    """Made in the first step, some steps before the loss, or in the very step of the loss."""
    calm, struck = tmp_path / "calm", tmp_path / "struck"
    _train(calm, 2)
    flags = (f"--beside={made}",)
    ended = _train(struck, 2, Fault("sigkill", 1, Hook("forward", 5)), flags=flags)
    assert _end(struck) == _end(calm)
    assert "all 2 ranks restart" in ended.err
    assert "since rank " in ended.err
    assert "needs process groups of backend mnemo, and one has backend gloo" in ended.err
    assert _REPLACED not in ended.err


# --- Lightning ------------------------------------------------------------------------------------

_STRATEGY = "--strategy=mnemo_ddp"


def _struck(
    tmp_path: Path, *places: str, ranks: int = 2, kind: Kind = "sigkill", every: int = 1
) -> str:
    """A fit that is killed at each of ``phase:step:rank``, and ends as one that is not."""
    calm, struck = tmp_path / "calm", tmp_path / "struck"
    flags = (_STRATEGY, f"--every={every}")
    campaign.train(calm, None, *flags, ranks=ranks)
    faults = []
    for place in places:
        phase, step, rank = place.split(":")
        faults.append(Fault(kind, int(rank), Hook(phase, int(step))))
    declared = Declaration(tuple(faults), record=str(tmp_path / "fired"))
    said = campaign.train(struck, declared, *flags, ranks=ranks)
    declared.assert_fired()
    campaign.assert_same(calm, struck, ranks)
    return said


@pytest.mark.campaign
def test_a_fit_with_exceptions(tmp_path: Path) -> None:
    said = _struck(tmp_path, "backward:6:1", "forward:9:0", "between:12:1", kind="exception")
    assert said.count(_REPLACED) == 3
    assert "ranks restart" not in said


@pytest.mark.campaign
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_fit_killed_in_each_phase(tmp_path: Path, ranks: int) -> None:
    last = ranks - 1
    said = _struck(
        tmp_path,
        "forward:3:0",
        f"backward:6:{last}",
        "loading:8:0",
        f"validation:10:{last}",
        "between:12:0",
        f"update:14:{last}",
        "scheduler:16:0",
        f"scheduled:18:{last}",
        ranks=ranks,
    )
    assert said.count(_REPLACED) == 8
    assert "ranks restart" not in said


@pytest.mark.campaign
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_fit_with_few_snapshots_killed_in_each_phase(tmp_path: Path, ranks: int) -> None:
    """Behind the barrier of the update all start again from memory, exactly as well."""
    last = ranks - 1
    said = _struck(
        tmp_path,
        "forward:3:0",
        f"backward:6:{last}",
        "loading:8:0",
        f"validation:10:{last}",
        "between:12:0",
        f"update:14:{last}",
        ranks=ranks,
        every=5,
    )
    assert said.count(_REPLACED) == 5
    assert said.count("ranks restart") == 1
