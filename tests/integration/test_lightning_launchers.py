"""Every way to start a Lightning training: killed, started again, the same in the end."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning_client import KILLED, LAB, Lab, assert_same, kill_at, rows, until_it_ends
from ports import held_port

from mnemo.faults import Declaration
from mnemo.types import EXIT_STATE_SAVED

SCRIPTS = Path(__file__).parents[1] / "scripts"
TRAIN = str(SCRIPTS / "lightning_train.py")
MNEMO = [sys.executable, "-c", "from mnemo.cli import main; main()", "run"]


def start(out: Path, *command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """One start of ``command`` to its end."""
    out.mkdir(exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OUT": str(out), "MNEMO_RUN_ID": "run"}
    env["TMPDIR"] = str(out)  # torch's launchers leave files behind when a rank is killed
    path = os.pathsep.join([str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        command,
        env={**env, "PYTHONPATH": path, **environ},
        cwd=out,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def final(out: Path, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / f"final-{rank}.json").read_text())
    return found


@pytest.fixture(scope="module")
def alone(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks that nobody disturbs, without mnemo."""
    out = tmp_path_factory.mktemp("alone")
    train = [TRAIN, "--strategy=ddp", "--devices=2"]
    life = lab.script(out, *train, ranks=2, OUT=str(out), PLAIN="1")
    assert life.codes == [0, 0], life.said
    return out


def test_mnemo_run(alone: Path, tmp_path: Path) -> None:
    """One command: killed once, asked to stop once, started again."""
    out = tmp_path / "out"
    faults = (*kill_at("forward:2", rank=1), *kill_at("step:5", rank=0, kind="sigterm"))
    declared = Declaration(faults, str(tmp_path / "fired"))
    command = [*MNEMO, "--nproc-per-node=2", TRAIN, "--strategy=ddp", "--devices=2"]
    ended = start(out, *command, **declared.environ())
    assert ended.returncode == EXIT_STATE_SAVED, ended.stderr
    assert "rank 1 killed by SIGKILL" in ended.stderr
    assert re.search("from memory at step [12], [01] steps? lost", ended.stdout + ended.stderr)
    ended = start(out, *command, **declared.environ())
    assert ended.returncode == 0, ended.stderr
    assert ", 0 steps lost" in ended.stdout + ended.stderr
    declared.assert_fired()
    assert_same(alone, out, ranks=2)


@pytest.mark.campaign
def test_a_search_that_is_killed_under_mnemo_run(lab: Lab, tmp_path: Path) -> None:
    """It is no crash loop, and the training is not begun with what half of a search found."""
    out = tmp_path / "out"
    assert lab.life("lr_search", tmp_path / "alone", mnemo=False, ranks=2).codes == [0, 0]
    declared = Declaration(kill_at("search:4", "forward:5", rank=1), str(tmp_path / "fired"))
    request = {"case": "lr_search", "ranks": 2, "mnemo": True, "settings": {}}
    command = [*MNEMO, "--nproc-per-node=2", str(LAB), json.dumps(request)]
    ended = start(out, *command, **declared.environ())
    assert ended.returncode == 0, ended.stderr
    declared.assert_fired()
    assert "the learning rate is not searched again" in ended.stderr
    assert_same(tmp_path / "alone", out, ranks=2)


@pytest.mark.parametrize(
    "strategy",
    [
        "ddp",
        pytest.param("ddp_fork", marks=pytest.mark.campaign),
        pytest.param("ddp_spawn", marks=pytest.mark.campaign),
    ],
)
def test_lightnings_own_launchers(alone: Path, tmp_path: Path, strategy: str) -> None:
    out = tmp_path / "out"
    declared = Declaration(kill_at("forward:3"), str(tmp_path / "fired"))
    command = [sys.executable, TRAIN, f"--strategy={strategy}", "--devices=2"]
    ended = start(out, *command, **declared.environ())
    assert ended.returncode != 0
    ended = start(out, *command, **declared.environ())
    assert ended.returncode == 0, ended.stderr
    assert "resumed from memory at step" in ended.stderr
    off = """replacing a single rank is off: needs strategy="mnemo_ddp" and mnemo run"""
    assert f"{off}; a crash ends all ranks, and the next start resumes" in ended.stderr
    if strategy == "ddp":
        assert_same(alone, out, ranks=2)
        return
    assert "cannot tell a script's fits apart" in ended.stderr
    assert final(out)["parameters"] == final(alone)["parameters"]


@pytest.mark.campaign
def test_torchrun(alone: Path, tmp_path: Path) -> None:
    """Started twice: its own restarts fail now and then with gloo, with and without mnemo.

    torch 2.13 leaves the addresses of the first life in the store that the second one reads.
    """
    out = tmp_path / "out"
    declared = Declaration(kill_at("backward:3", rank=1), str(tmp_path / "fired"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    for _ in range(2):
        with held_port() as port:
            where = f"--master-port={port}"
            ended = start(
                out, *command, where, TRAIN, "--strategy=ddp", "--devices=2", **declared.environ()
            )
    assert ended.returncode == 0, ended.stderr
    assert "resumed from memory at step" in ended.stderr
    declared.assert_fired()
    assert_same(alone, out, ranks=2)


CLI = """
trainer:
  accelerator: cpu
  max_epochs: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
    - class_path: lightning_mnemo.MnemoCallback
      init_args: {config: mnemo.yaml}
"""


def test_lightning_cli(lab: Lab, tmp_path: Path) -> None:
    """The callback by its class path; what the CLI saved of its own arguments is no obstacle."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "cli.yaml").write_text(CLI)
    (out / "mnemo.yaml").write_text("snapshot: {every: 1}\n")
    command = [SCRIPTS / "lightning_cli.py", "fit", "--config=cli.yaml"]
    live = functools.partial(lab.script, out, *command, OUT=str(out))
    first, second = until_it_ends(live, out, kill_at("forward:11"))
    assert first.codes == [KILLED], first.said
    assert (out / "config.yaml").exists()
    assert re.search("from memory at step 1[01], [01] steps? lost", second.said)
    assert final(out)["step"] == 16


def test_the_scripts_rows_are_complete(alone: Path) -> None:
    assert {key[1] for key in rows(alone, 1)} == {"batch", "final"}
