"""Under Slurm: Lightning requeues the job by its signal, and what counts after that is the newer.

Slurm is its environment variables, the signals it sends, and an ``scontrol`` that writes down what
it is told.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import pytest
from commands import mnemo
from lightning_client import KILLED, Lab, assert_same, kill_at, records
from ports import held_port
from warm import Zygote

from mnemo.faults import Declaration
from mnemo.types import EXIT_STATE_SAVED

TRAIN = Path(__file__).parents[1] / "scripts" / "lightning_train.py"
JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a job, whose ``scontrol`` writes to ``told``."""
    commands = tmp_path / "bin"
    commands.mkdir()
    stub = commands / "scontrol"
    stub.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "told"}\n')
    stub.chmod(0o700)
    return {**JOB, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}


def told(tmp_path: Path) -> list[str]:
    file = tmp_path / "told"
    return file.read_text().splitlines() if file.exists() else []


def batches(out: Path) -> list[int]:
    """Steps after each batch, as they came, repeated ones too."""
    lines = [json.loads(line) for line in (out / "rows-0.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["key"][1] == "batch"]


def killed_after_requeue(
    lab: Lab, tmp_path: Path, job: dict[str, str], every: int, at: str
) -> Path:
    """A life that is asked to be requeued in step 7, goes on, and dies at ``at``."""
    out = tmp_path / "out"
    declared = Declaration(kill_at(at), str(tmp_path / "fired"))
    settings = {"snapshot": {"every": every}}
    life = lab.life("slurm_usr1", out, faults=declared, settings=settings, **job)
    assert life.codes == [KILLED], life.said
    declared.assert_fired()
    assert told(tmp_path) == ["requeue 4711"]
    assert (out / "hpc_ckpt_1.ckpt").exists()
    return out


def test_a_newer_snapshot_counts_more_than_the_requeued_checkpoint(
    lab: Lab, tmp_path: Path, job: dict[str, str]
) -> None:
    """It goes on training until Slurm ends it; that is not lost."""
    lab.life("plain", tmp_path / "alone", mnemo=False)
    out = killed_after_requeue(lab, tmp_path, job, every=1, at="between:10")
    life = lab.life("slurm_usr1", out, **job)
    assert life.codes == [0], life.said
    assert "run 4711 · an earlier life ended → resumed from memory at step" in life.said
    [resumed] = [r for r in records("4711") if r["event"] == "start" and r["resumed"]]
    assert resumed["step"] >= 9
    assert resumed["exact"]
    assert_same(tmp_path / "alone", out)


def test_a_newer_requeued_checkpoint_counts_more_than_the_snapshot(
    lab: Lab, tmp_path: Path, job: dict[str, str]
) -> None:
    out = killed_after_requeue(lab, tmp_path, job, every=4, at="forward:7")
    life = lab.life("slurm_usr1", out, settings={"snapshot": {"every": 4}}, **job)
    assert life.codes == [0], life.said
    assert "hpc_ckpt_1.ckpt is of step 6: the snapshot of step 4 in memory is given up" in life.said
    assert "run 4711 · Lightning goes on from " in life.said
    assert batches(out) == [*range(1, 8), *range(7, 17)]


def test_memory_that_is_gone_is_replaced_by_the_requeued_checkpoint(
    lab: Lab, tmp_path: Path, job: dict[str, str]
) -> None:
    """As after a requeue to another node."""
    out = killed_after_requeue(lab, tmp_path, job, every=1, at="forward:8")
    assert mnemo("clean", "4711").code == 0
    life = lab.life("slurm_usr1", out, **job)
    assert life.codes == [0], life.said
    file = out / "hpc_ckpt_1.ckpt"
    assert f"run 4711 · Lightning goes on from {file} at step 6 · 1 rank · " in life.said
    assert "fresh" not in life.said
    assert "Lightning goes on" in [r for r in records("4711") if r["event"] == "start"][-1]["why"]
    assert batches(out) == [*range(1, 9), *range(7, 17)]


@pytest.mark.parametrize("case", ["slurm_term", "slurm_usr1_not_requeued"])
def test_other_signals_stop_with_the_state_saved(
    lab: Lab, tmp_path: Path, job: dict[str, str], case: str
) -> None:
    lab.life("plain", tmp_path / "alone", mnemo=False)
    out = tmp_path / "out"
    live = functools.partial(lab.life, case, out, settings={"snapshot": {"every": 1000}}, **job)
    life = live()
    assert life.codes == [EXIT_STATE_SAVED], life.said
    assert "asked to stop: step 7 is saved" in life.said
    assert told(tmp_path) == []
    life = live()
    assert life.codes == [0], life.said
    assert "resumed from memory at step 7, 0 steps lost" in life.said
    assert_same(tmp_path / "alone", out)


def test_a_requeue_at_sigterm_stays_lightnings(
    lab: Lab, tmp_path: Path, job: dict[str, str]
) -> None:
    """It ends the fit within step 7 by an exception of its own, which keeps the state too."""
    lab.life("plain", tmp_path / "alone", mnemo=False)
    out = tmp_path / "out"
    life = lab.life("slurm_requeues_at_term", out, **job)
    assert "asked to stop" not in life.said
    assert batches(out)[-1] == 7
    assert told(tmp_path) == ["requeue 4711"]
    life = lab.life("slurm_requeues_at_term", out, **job)
    assert life.codes == [0], life.said
    # It had made step 7, but not come to the boundary behind it.
    assert "resumed from memory at step 6, 1 step lost" in life.said
    assert_same(tmp_path / "alone", out)


def test_two_tasks(zygote: Zygote, lab: Lab, tmp_path: Path, job: dict[str, str]) -> None:
    """As ``srun`` starts them: ranks are known by SLURM_PROCID alone."""
    alone, out = tmp_path / "alone", tmp_path / "out"
    train = [TRAIN, "--strategy=ddp", "--devices=2"]
    assert lab.script(alone, *train, ranks=2, OUT=str(alone), PLAIN="1").codes == [0, 0]
    out.mkdir()
    declared = Declaration(kill_at("backward:5", rank=1), str(tmp_path / "fired"))
    srun = functools.partial(start_tasks, zygote, out, train, {**job, **declared.environ()})
    assert srun() == [KILLED, KILLED]
    assert srun() == [0, 0], (out / "err-0").read_text()
    assert "run 4711 · an earlier life ended → resumed from memory" in (out / "err-0").read_text()
    assert_same(alone, out, ranks=2)


def start_tasks(zygote: Zygote, out: Path, train: list[object], job: dict[str, str]) -> list[int]:
    """Two tasks of one node; when one is killed, so is the other."""
    shared = {**job, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "OUT": str(out)}
    with (
        held_port() as port,
        (out / "err-0").open("a") as first,
        (out / "err-1").open("a") as second,
    ):
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        tasks = [
            zygote.start(
                *train,
                out=err,
                err=err,
                cwd=out,
                environ={**shared, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            )
            for rank, err in enumerate((first, second))
        ]
        with tasks[0] as one, tasks[1] as other:
            code = other.wait()
            if code < 0:
                one.kill()
            return [one.wait(), code]
