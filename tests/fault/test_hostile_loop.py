"""Loops of one's own under `mnemo.Session`, killed and resumed: nothing is silently different."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from commands import mnemo
from launching import MNEMO

from mnemo.recovery import journal

if TYPE_CHECKING:
    from typing import Protocol

    from warm import Zygote

    class Live(Protocol):
        def __call__(self, kind: str, **environ: str) -> tuple[int, str]: ...


SCRIPT = Path(__file__).parents[1] / "scripts" / "session_hard.py"


@pytest.fixture
def live(zygote: Zygote, tmp_path: Path) -> Live:
    """One life of the script; its exit code and what it said."""

    def start(kind: str, **environ: str) -> tuple[int, str]:
        done = zygote.run(SCRIPT, kind, tmp_path / "out", **{"MNEMO_RUN_ID": "hard", **environ})
        return done.returncode, done.stderr

    return start


def results(tmp_path: Path) -> tuple[object, object]:
    with_mnemo, without = json.loads((tmp_path / "out").read_text())
    return with_mnemo, without


@pytest.mark.parametrize(
    "kind",
    [
        "own generator",
        "iterable",
        "stateful",
        "closure",
        "scaled",
        "evaluated",
        "evaluated, wrapped",
        "unsaved",
    ],
)
def test_a_killed_loop_goes_on_as_if_nothing_had_been(
    live: Live, tmp_path: Path, kind: str
) -> None:
    """Data that mnemo cannot seek in, and a body that goes on behind its step."""
    code, said = live(kind, KILL=str(int(signal.SIGKILL)))
    assert code == -signal.SIGKILL, said
    code, said = live(kind)
    assert code == 0, said
    assert "resumed from memory at step 7" in said
    assert ("read again" in said) == (kind == "iterable")
    assert ("not exact" in said) == (kind in ("iterable", "evaluated, wrapped"))
    with_mnemo, without = results(tmp_path)
    assert with_mnemo == without


def test_the_memory_has_a_new_keeper_long_before_the_next_snapshot(
    live: Live, tmp_path: Path
) -> None:
    """The snapshot process dies, then the trainer, and no snapshot is taken between."""
    environ = {"EVERY": "3", "KILL": str(int(signal.SIGKILL)), "KILL_SMP": "1"}
    code, said = live("stateful", **environ)
    assert code == -signal.SIGKILL, said
    code, said = live("stateful", EVERY="3")
    assert code == 0, said
    assert "resumed from memory at step 6, 1 step lost" in said
    with_mnemo, without = results(tmp_path)
    assert with_mnemo == without


def test_a_loader_that_is_not_its_sampler_is_never_called_exact(live: Live) -> None:
    code, said = live("echoing", KILL=str(int(signal.SIGKILL)))
    assert code == -signal.SIGKILL, said
    code, said = live("echoing")
    assert code == 0, said
    assert "not exact (the loader was iterated over elsewhere" in said


def test_an_attribute_that_starts_anew_is_never_called_exact(live: Live) -> None:
    code, said = live("counted", KILL=str(int(signal.SIGKILL)))
    assert code == -signal.SIGKILL, said
    assert "mnemo: 2.counted of Sequential change during training" in said
    code, said = live("counted")
    assert code == 0, said
    wanted = "module attribute 2.counted is not kept: make it a buffer, or use objects=…"
    assert f"not exact ({wanted})" in said


def test_changed_data_is_never_called_exact(live: Live, tmp_path: Path) -> None:
    code, said = live("own generator", KILL=str(int(signal.SIGKILL)))
    assert code == -signal.SIGKILL, said
    code, said = live("own generator", ROWS="20")
    assert code == 0, said
    assert "not exact (changed: data)" in said
    assert "the order of batches is not the one of the interrupted epoch" in said


def test_sigterm_ends_a_loop_with_its_state_saved(live: Live, tmp_path: Path) -> None:
    code, said = live("own generator", KILL=str(int(signal.SIGTERM)))
    assert code == 75, said
    assert "step 8 is saved" in said
    code, said = live("own generator")
    assert code == 0, said
    assert "resumed from memory at step 8, 0 steps lost" in said


def test_a_run_begun_anew_over_checkpoints_is_resumed_where_it_was(
    live: Live, tmp_path: Path
) -> None:
    """Its snapshots outrank the stored checkpoints in its second and third life too."""
    store = {"MNEMO_PERSIST__TO": str(tmp_path / "store"), "MNEMO_PERSIST__EVERY": "10ms"}
    assert live("stateful", **store)[0] == 0
    kill = {"KILL": str(int(signal.SIGTERM))}
    assert live("stateful", MNEMO_RUN__RESUME="never", **kill, **store)[0] == 75
    for step in (8, 9):
        code, said = live("stateful", KILL_BEHIND=str(step), **kill, **store)
        assert code == 75, said
        assert f"resumed from memory at step {step}, 0 steps lost" in said
    assert mnemo("clean", "hard").code == 0  # the memory is lost: storage has the newest as well
    code, said = live("stateful", **store)
    assert code == 0, said
    assert "resumed from storage at step 10" in said
    with_mnemo, without = results(tmp_path)
    assert with_mnemo == without | {"losses": {n: without["losses"][n] for n in ("11", "12")}}


def test_never_resuming_does_not_mean_the_restarts_of_a_launch(live: Live, tmp_path: Path) -> None:
    """What an earlier launch left is given up; what this launch did is not lost by its crash."""
    code, said = live("stateful", KILL=str(int(signal.SIGKILL)))
    assert code == -signal.SIGKILL, said
    script = tmp_path / "once.sh"
    script.write_text(
        f"[ $TORCHELASTIC_RESTART_COUNT = 0 ] && export KILL=9\n"
        f"exec {sys.executable} {SCRIPT} stateful {tmp_path / 'out'}\n"
    )
    done = subprocess.run(
        [*MNEMO, "run", "run.id=hard", "run.resume=never", "--no-python", "sh", str(script)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    starts = [r for r in journal.read(journal_file()) if r["event"] == "start"]
    assert [(s["resumed"], s.get("step")) for s in starts] == [
        (False, None),
        (False, None),
        (True, 7),
    ]
    with_mnemo, without = results(tmp_path)
    assert with_mnemo == without


def test_checkpoints_that_cannot_be_stored_are_recorded_and_said(
    live: Live, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    store.touch()
    environ = {"MNEMO_PERSIST__TO": str(store), "MNEMO_PERSIST__EVERY": "1ms"}
    code, said = live("stateful", **environ)
    assert code == 0, said
    failures = [
        r["text"] for r in journal.read(journal_file()) if r.get("kind") == "persist failed"
    ]
    assert failures, said
    assert "Not a directory" in failures[0]
    assert f"persist failed: {failures[0]}" in said


def journal_file() -> Path:
    return Path(os.environ["MNEMO_RUN__JOURNAL"]) / "hard.jsonl"
