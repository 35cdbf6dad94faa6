"""`mnemo status`: what it makes of what an SMP says, and how that looks."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import mnemo
from rich.console import Console

from mnemo.cli.runs import Run
from mnemo.cli.status import describe, show
from mnemo.smp.paths import RunPaths

NOW = 1_700_000_000.0


def told(**changes: Any) -> dict[str, Any]:
    """What the SMP of a run of two ranks says; rank 1 is a step behind."""
    fit: dict[str, Any] = {
        "fit": 0,
        "finished": False,
        "members": 2,
        "ranks": [0, 1],
        "connected": {"0": 101, "1": 102},
        "committed": {"tick": 80, "step": 40, "time": NOW - 3},
        "differ": "",
        "memory": 5 * 2**20,
        "progress": [
            {"slot": 0, "tick": 84, "step": 42, "epoch": 1, "batch": 9, "time": NOW - 0.5},
            {"slot": 1, "tick": 82, "step": 41, "epoch": 1, "batch": 8, "time": NOW - 0.7},
        ],
        "persist": {"to": "/ckpt", "newest_step": 30, "every_s": 600.0, "failure": ""},
        "protect": None,
        "segments": [
            {"rank": 0, "index": 0, "state": "SEALED", "tick": 82, "step": 41, "bytes": 9},
            {"rank": 0, "index": 1, "state": "SEALED", "tick": 80, "step": 40, "bytes": 9},
            {"rank": 1, "index": 0, "state": "WRITING", "tick": 82, "step": 41, "bytes": 9},
            {"rank": 1, "index": 1, "state": "SEALED", "tick": 80, "step": 40, "bytes": 9},
        ],
    }
    fit.update(changes)
    counts = {"sealed": 83, "committed": 40, "refused": 0, "persisted": 3, "persist_failed": 0}
    return {
        "run": "gpt",
        "pid": 99,
        "started": NOW - 7500,
        "keep_alive_s": 3600.0,
        "kept_for_s": None if fit["connected"] else 1800.0,
        "clients": 3,
        "counts": counts,
        "fits": [fit],
    }


def described(status: dict[str, Any] | None, problem: str = "") -> dict[str, Any]:
    return describe(Run(RunPaths(Path("/run/gpt")), status, problem), NOW)


def shown(*runs: dict[str, Any]) -> list[str]:
    console = Console(file=io.StringIO(), width=100, highlight=False)
    show(list(runs), console)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_ranks_of_one_of_several_nodes() -> None:
    here = told(
        ranks=[4, 5],
        connected={"4": 101, "5": 102},
        segments=[{"rank": 5, "index": 0, "state": "SEALED", "tick": 80, "step": 40, "bytes": 9}],
    )
    (fit,) = described(here)["fits"]
    assert [(rank["rank"], rank["pid"], rank["step"]) for rank in fit["ranks"]] == [
        (4, 101, 42),
        (5, 102, 41),
    ]
    assert fit["ranks"][1]["snapshots"] == [{"tick": 80, "step": 40}]


def test_a_training_run_as_data() -> None:
    run = described(told())
    (fit,) = run["fits"]
    assert (run["state"], run["smp"]) == ("training", {"pid": 99, "age_s": 7500.0})
    assert (run["memory_bytes"], run["kept_for_s"]) == (5 * 2**20, None)
    assert fit["newest"] == {"tick": 80, "step": 40, "age_s": 3.0}
    assert fit["steps_at_risk"] == 2
    assert [rank["pid"] for rank in fit["ranks"]] == [101, 102]
    assert [rank["step"] for rank in fit["ranks"]] == [42, 41]
    assert [[s["step"] for s in rank["snapshots"]] for rank in fit["ranks"]] == [[40, 41], [40]]
    json.dumps(run)


def test_a_training_run_on_the_screen() -> None:
    assert shown(described(told())) == [
        "gpt · training · snapshot process 99, up 2 h 5 min",
        "  rank  process  step  epoch  batch  seen       snapshots in memory",
        "     0      101    42      1      9  0.5 s ago  step 40 and 41",
        "     1      102    41      1      8  0.7 s ago  step 40",
        "  newest snapshot    step 40, 3.0 s old",
        "  on storage         step 30, every 10 min to /ckpt",
        "  if it dies now     2 steps would be repeated",
        "  memory             5.0 MiB",
        "  snapshots          40 taken, 3 of them stored",
        "  kept               60 min once nobody is connected",
    ]


def test_skipped_snapshots_are_counted_on_the_screen() -> None:
    status = told()
    status["counts"]["skipped"] = 7
    text = "\n".join(shown(described(status)))
    assert "40 taken, 3 of them stored, 7 skipped for want of a buffer" in text


def test_a_run_whose_trainer_is_dead() -> None:
    run = described(told(connected={}))
    assert (run["state"], run["kept_for_s"]) == ("waiting", 1800.0)
    assert [rank["pid"] for rank in run["fits"][0]["ranks"]] == [None, None]
    text = "\n".join(shown(run))
    assert "gone" in text
    assert "2 steps will be repeated" in text
    assert "30 min more, as nobody is connected" in text


@pytest.mark.parametrize(
    ("changes", "at_risk"),
    [
        ({"progress": []}, 0),
        ({"committed": None}, 12),
        ({"committed": None, "persist": None}, 42),
        ({"finished": True}, 2),
        ({"finished": True, "committed": None, "persist": None, "progress": []}, 0),
        ({"persist": {"to": "/c", "newest_step": -1, "every_s": 1.0, "failure": ""}}, 2),
    ],
)
def test_steps_at_risk(changes: dict[str, Any], at_risk: int) -> None:
    run = described(told(**changes))
    assert run["fits"][0]["steps_at_risk"] == at_risk
    assert shown(run)


def test_what_a_finished_training_keeps_is_shown() -> None:
    """Its program still runs, or has died in its last part."""
    run = described(told(finished=True))
    assert run["state"] == "finished"
    text = "\n".join(shown(run))
    assert "newest snapshot    step 40" in text
    assert "if it dies now     2 steps would be repeated" in text
    assert "until the program has ended well, too; 60 min more if it does not" in text
    run = described(told(finished=True, connected={}))
    assert run["state"] == "waiting"
    text = "\n".join(shown(run))
    assert "at the next start  2 steps will be repeated" in text
    assert "30 min more, as nobody is connected" in text


def test_what_is_wrong_is_shown() -> None:
    persist = {"to": "/ckpt", "newest_step": -1, "every_s": 600.0, "failure": "disk full"}
    status = told(persist=persist, committed=None, differ="rank 1 differs from rank 0 in w")
    status["counts"]["persist_failed"] = 2
    text = "\n".join(shown(described(status)))
    for said in (
        "disk full",
        "none yet",
        "up to 42 steps",
        "rank 1 differs from rank 0 in w",
        "2 could not be stored",
    ):
        assert said in text


def test_what_other_nodes_keep_is_shown() -> None:
    protect = {"group": list("abcd"), "parities": 2, "step": 38, "failure": ""}
    assert described(told(protect=protect))["fits"][0]["protect"]["newest_step"] == 38
    text = "\n".join(shown(described(told(protect=protect))))
    assert "protected          step 38, over 4 nodes, of which 2 may be lost" in text
    text = "\n".join(
        shown(described(told(protect={**protect, "step": -1, "failure": "node b went away"})))
    )
    assert "protected          nothing yet" in text
    assert "node b went away" in text
    assert "protected" not in "\n".join(shown(described(told())))


def test_several_fits_are_told_apart() -> None:
    status = told()
    over = {"finished": True, "connected": {}, "committed": None}
    status["fits"].insert(0, {**status["fits"][0], "fit": 0, **over})
    status["fits"][1]["fit"] = 1
    lines = shown(described(status))
    assert lines[1] == "  fit 0 · finished"
    assert lines[2] == "  fit 1"
    assert sum("newest snapshot" in line for line in lines) == 1


def test_dead_and_silent_processes() -> None:
    stale, silent = described(None), described(None, "it does not answer")
    assert (stale["state"], silent["state"]) == ("left over", "not answering")
    lines = shown(stale, silent)
    assert lines[0] == "gpt · left over"
    assert "mnemo clean gpt removes it" in lines[2]
    assert lines[3] == ""
    assert lines[4] == "gpt · not answering"
    assert "it does not answer" in lines[6]


def test_no_runs() -> None:
    answer = mnemo("status")
    assert (answer.code, answer.out) == (0, f"no runs in {os.environ['MNEMO_RUN__DIR']}\n")
    found = json.loads(mnemo("status", "--json").out)
    assert (found["version"], found["runs"]) == (1, [])


def test_a_run_that_is_not_there(tmp_path: Path) -> None:
    RunPaths.of("other", tmp_path).make()
    RunPaths.of("other", tmp_path).secret.touch(mode=0o600)
    for words in ((), ("--json",)):
        answer = mnemo("status", "gpt", "--dir", tmp_path, *words)
        assert (answer.code, answer.out) == (1, "")
        assert answer.err.startswith(f"mnemo: no run gpt in {tmp_path}; there are other.")


def test_a_name_that_no_run_can_have() -> None:
    answer = mnemo("status", "../etc")
    assert answer.code == 2
    assert answer.err.startswith("mnemo: run.id '../etc'")


def test_a_record_of_a_process_that_is_another_by_now(tmp_path: Path) -> None:
    paths = RunPaths.of("gpt", tmp_path)
    paths.make()
    paths.secret.write_bytes(b"s" * 32)
    paths.secret.chmod(0o600)
    me = psutil.Process()
    for started, state in ((me.create_time() - 60, "left over"), (NOW * 2, "not answering")):
        record = {"pid": me.pid, "socket": str(paths.socket), "started": started}
        paths.record.write_text(json.dumps(record))
        answer = mnemo("status", "--dir", tmp_path, "--json")
        assert json.loads(answer.out)["runs"][0]["state"] == state


def test_links_and_other_directories_are_no_runs(tmp_path: Path) -> None:
    real = RunPaths.of("real", tmp_path / "elsewhere")
    real.make()
    real.secret.touch()
    parent = tmp_path / "runs"
    parent.mkdir()
    (parent / "link").symlink_to(real.directory)
    (parent / "other").mkdir()
    (parent / "file").touch()
    assert mnemo("status", "--dir", parent).out == f"no runs in {parent}\n"
