"""What a program does behind its training may fail: its state is kept until that went well, too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from commands import mnemo, status_of
from launching import launch
from lightning_client import KILLED, assert_same, kill_at, records

if TYPE_CHECKING:
    from lightning_client import Lab, Life
    from warm import Zygote

SCRIPTS = Path(__file__).parents[1] / "scripts"
SCRIPT = SCRIPTS / "last_part.py"
ENDS = {"exception": 1, "kill": KILLED}


def live(lab: Lab, out: Path, run_id: str = "last", **options: Any) -> Life:
    out.mkdir(exist_ok=True)
    return lab.script(out, SCRIPT, out, run_id=run_id, **options)


def final(out: Path, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / f"final-{rank}.json").read_text())
    return found


def nothing_is_kept() -> bool:
    return mnemo("status").out.startswith("no runs in ")


@pytest.fixture
def alone(lab: Lab, tmp_path: Path) -> dict[str, Any]:
    """What the last part saves when nothing goes wrong."""
    assert live(lab, tmp_path / "alone", run_id="alone").codes == [0]
    return final(tmp_path / "alone")


@pytest.mark.parametrize("how", ENDS)
def test_a_death_in_the_last_part_costs_no_step(
    lab: Lab, tmp_path: Path, alone: dict[str, Any], how: str
) -> None:
    out = tmp_path / "out"
    assert live(lab, out, DIE=how).codes == [ENDS[how]]
    run = status_of("last")
    assert (run["state"], run["fits"][0]["finished"]) == ("waiting", True)
    assert run["fits"][0]["newest"]["step"] == 12
    assert len(run["fits"][0]["ranks"][0]["snapshots"]) == 1
    life = live(lab, out, DIE=how)
    assert life.codes == [0], life.said
    assert "resumed from memory at step 12, 0 steps lost" in life.said
    assert final(out) == {"batches": 0, "saved": alone["saved"]}
    life = live(lab, out)
    assert life.codes == [0]
    assert "fresh (no earlier snapshot)" in life.said  # it ended well: nothing was kept


def test_steps_behind_the_newest_snapshot_are_done_again(
    lab: Lab, tmp_path: Path, alone: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    assert live(lab, out, DIE="kill", EVERY="5").codes == [KILLED]
    life = live(lab, out, EVERY="5")
    assert life.codes == [0], life.said
    assert "resumed from memory at step 10, 2 steps lost" in life.said
    assert final(out) == {"batches": 2, "saved": alone["saved"]}


@pytest.mark.parametrize(("how", "rank"), [("exception", 0), ("kill", 1)])
def test_two_ranks_of_which_one_dies(lab: Lab, tmp_path: Path, how: str, rank: int) -> None:
    """The other one may have ended well before."""
    alone, out = tmp_path / "alone", tmp_path / "out"
    assert live(lab, alone, run_id="alone", ranks=2).codes == [0, 0]
    codes = live(lab, out, ranks=2, DIE=how, DIE_RANK=str(rank)).codes
    assert codes[rank] == ENDS[how]
    assert status_of("last")["fits"][0]["newest"]["step"] == 12
    life = live(lab, out, ranks=2)
    assert life.codes == [0, 0], life.said
    assert "resumed from memory at step 12" in life.errors[0]
    for each in range(2):
        assert final(out, each) == {"batches": 0, "saved": final(alone, each)["saved"]}


@pytest.mark.parametrize(
    ("how", "ranks"), [pytest.param("kill", 1, marks=pytest.mark.campaign), ("exit", 2)]
)
def test_under_mnemo_run(tmp_path: Path, how: str, ranks: int) -> None:
    """Its restart reaches the last part again; a ``sys.exit(1)`` is none that went well either."""
    done = launch(
        "run.id=last",
        f"--nproc-per-node={ranks}",
        str(SCRIPT),
        str(tmp_path),
        cwd=tmp_path,
        DIE=how,
        DIE_RANK=str(ranks - 1),
    )
    assert done.code == 0, done.err
    assert "resumed from memory at step 12, 0 steps lost" in done.out + done.err
    assert [final(tmp_path, rank)["batches"] for rank in range(ranks)] == [0] * ranks
    assert nothing_is_kept()


@pytest.mark.campaign
def test_what_follows_a_child_that_trained_is_covered_by_mnemo_run(tmp_path: Path) -> None:
    """As with Lightning's ddp_fork: the process that trains ends well, the one that saves dies."""
    environ = {"CHILD": "fork", "DIE_BEHIND_CHILD": "exit"}
    done = launch("run.id=last", str(SCRIPT), str(tmp_path), cwd=tmp_path, **environ)
    assert done.code == 0, done.err
    assert final(tmp_path)["batches"] == 0
    assert nothing_is_kept()


def test_mnemo_run_that_gives_up_says_what_is_kept(lab: Lab, tmp_path: Path) -> None:
    done = launch(
        "run.id=last", "--max-restarts=0", str(SCRIPT), str(tmp_path), cwd=tmp_path, DIE="exit"
    )
    assert done.code == 1
    assert "the snapshot of step 12 stays in memory" in done.err
    life = live(lab, tmp_path)
    assert life.codes == [0]
    assert final(tmp_path)["batches"] == 0


@pytest.mark.campaign
def test_an_interpreter_that_ends_by_an_exception(tmp_path: Path) -> None:
    """Whoever shows it: programs replace ``sys.excepthook``."""
    hooked = (
        "import runpy, sys\nsys.excepthook = lambda *error: print('caught', error[1])\n"
        "sys.argv.pop(0)\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    for how, code, said in (("exception", 1, "caught [Errno 28]"), ("", 0, "at step 12")):
        done = subprocess.run(
            [sys.executable, "-c", hooked, SCRIPT, tmp_path],
            env={**os.environ, "MNEMO_RUN_ID": "last", "OMP_NUM_THREADS": "1", "DIE": how},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert said in done.stdout + done.stderr
    assert final(tmp_path)["batches"] == 0


@pytest.mark.parametrize(
    ("child", "how"), [("fork", ""), ("fork", "exception"), ("fork", "exit"), ("spawn", "")]
)
def test_a_child_that_multiprocessing_made(
    lab: Lab, tmp_path: Path, alone: dict[str, Any], child: str, how: str
) -> None:
    """Its end is no end of an interpreter: nothing of atexit runs there."""
    codes = live(lab, tmp_path, CHILD=child, DIE=how).codes
    assert codes == [3 if how else 0]
    if how:
        assert status_of("last")["fits"][0]["newest"]["step"] == 12
        assert live(lab, tmp_path, CHILD=child).codes == [0]
        assert final(tmp_path)["batches"] == 0
    assert final(tmp_path)["saved"] == alone["saved"]


def test_five_trainings_of_one_process_hold_the_memory_of_one(lab: Lab, tmp_path: Path) -> None:
    assert live(lab, tmp_path, FITS="5", DIE="kill").codes == [KILLED]
    kept = json.loads((tmp_path / "memory.json").read_text())
    assert len(kept) == 5
    for each in kept:
        assert each["buffers"] == 1
        assert each["here"] == 0
        assert each["bytes"] <= each["there"] < 1.5 * each["bytes"]
    fits = status_of("last")["fits"]
    assert [fit["newest"] and fit["newest"]["step"] for fit in fits] == [None] * 4 + [12]
    life = live(lab, tmp_path, FITS="5")
    assert life.codes == [0], life.said
    assert life.said.count("fresh (no earlier snapshot)") == 4
    assert final(tmp_path)["batches"] == 0


def test_a_finished_training_is_no_crash_loop(tmp_path: Path) -> None:
    """A last part that always fails is not the fault of the last batch."""
    script = tmp_path / "always.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(SCRIPTS)!r})\n"
        "import last_part\nlast_part.train(0)\nraise SystemExit(9)\n"
    )
    done = launch("run.id=last", "--max-restarts=2", str(script), cwd=tmp_path)
    assert done.code == 9
    assert "the batch itself" not in done.err
    assert "resumed from memory at step 12" in done.out + done.err
    assert mnemo("clean", "last").code == 0


@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        ("plain", 2),
        ("max_steps", 1),
        ("early_stopping", 1),
        ("outputs", 1),
        ("swa", 1),
        *(
            pytest.param(case, 1, marks=pytest.mark.campaign)
            for case in ("plain", "accumulation", "gan", "manual_pending", "lbfgs", "lora")
        ),
        *(
            pytest.param(case, 1, marks=pytest.mark.campaign)
            for case in ("stateful_stream", "max_size_cycle", "generator", "ema", "timer")
        ),
    ],
)
def test_lightning(lab: Lab, tmp_path: Path, case: str, ranks: int) -> None:
    """A rank is killed behind ``trainer.fit``: metrics, files and parameters are those of ever."""
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert lab.life(case, alone, mnemo=False, ranks=ranks).codes == [0] * ranks
    lives = lab.lives(case, killed, kill_at("last_part:0", rank=ranks - 1), ranks=ranks)
    assert len(lives) == 2
    assert_same(alone, killed, ranks=ranks)
    first, second = (r for r in records("killed") if r["event"] == "start")
    assert (first["resumed"], second["resumed"]) == (False, True)
    assert (second["steps_lost"], second["exact"]) == (0, True)
    assert not list(killed.rglob("*-v1*"))


def test_logs_of_a_version_that_the_user_names(lab: Lab, tmp_path: Path) -> None:
    """The CSV writer begins with deleting the file of the finished training."""
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    lab.life("fixed_version", alone, mnemo=False)
    lab.lives("fixed_version", killed, kill_at("last_part:0"))
    file = "csv/version_3/metrics.csv"
    assert (killed / file).read_text() == (alone / file).read_text()
    assert not list(killed.rglob(".*mnemo*"))


def test_the_run_is_in_use_until_the_program_ends(tmp_path: Path, lab: Lab, zygote: Zygote) -> None:
    """Another job of its name is refused, and its memory is not cleaned away."""
    script = tmp_path / "long.py"
    script.write_text(
        f"import signal, sys; sys.path.insert(0, {str(SCRIPTS)!r})\n"
        "import last_part\nlast_part.train(0)\nprint('finished', flush=True)\nsignal.pause()\n"
    )
    read, write = os.pipe()
    with (
        os.fdopen(read) as reading,
        os.fdopen(write, "w") as writing,
        (tmp_path / "err").open("w") as err,
        zygote.start(script, out=writing, err=err, environ={"MNEMO_RUN_ID": "last"}) as life,
    ):
        assert reading.readline() == "finished\n"
        run = status_of("last")
        assert run["state"] == "finished"
        assert run["fits"][0]["ranks"][0]["pid"] == life.pid
        assert "kept               until the program has ended well" in mnemo("status").out
        assert mnemo("clean", "last").code == 1
        second = live(lab, tmp_path / "second")
        assert second.codes == [1]
        assert f"its rank 0 is process {life.pid}, which is alive" in second.said
        os.kill(life.pid, signal.SIGTERM)
        assert life.wait() == -signal.SIGTERM
    assert status_of("last")["state"] == "waiting"
    assert mnemo("clean", "last").code == 0
