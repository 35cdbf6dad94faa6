"""mnemo's settings in a LightningCLI's YAML: taken where they are right, said once where not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from launching import Result, launch
from lightning_client import Lab

SCRIPTS = Path(__file__).parents[1] / "scripts"
CLI = """
trainer:
  accelerator: cpu
  max_epochs: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
    - class_path: lightning_mnemo.MnemoCallback
      init_args: {%s}
"""


def command(out: Path, init_args: str) -> list[str]:
    out.mkdir(exist_ok=True)
    (out / "cli.yaml").write_text(CLI % init_args)
    return [str(SCRIPTS / "lightning_cli.py"), "fit", "--config=cli.yaml"]


def run(out: Path, init_args: str) -> Result:
    """Two ranks of it, under ``mnemo run``."""
    words = command(out, init_args)
    path = os.pathsep.join([str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environ = {"PYTHONPATH": path, "OUT": str(out), "OMP_NUM_THREADS": "1"}
    return launch("--nproc-per-node=2", *words, cwd=out, **environ)


def test_sections_are_arguments(lab: Lab, tmp_path: Path) -> None:
    settings = "run: {name: gpt}, snapshot: {every: 3}"
    life = lab.script(tmp_path, *command(tmp_path, settings), OUT=str(tmp_path))
    assert life.codes == [0], life.said
    assert "mnemo: run gpt-" in life.said
    assert "a snapshot every 3 steps" in life.said


def test_a_wrong_setting_is_said_once(tmp_path: Path) -> None:
    """jsonargparse makes another error of it."""
    ended = run(tmp_path, "snapshot: {evry: 1}")
    assert ended.code == 2, ended.err
    said = "snapshot.evry is not a setting (in the arguments). Did you mean snapshot.every?"
    assert ended.err.splitlines()[-1] == f"mnemo: {said}"
    assert ended.err.count(said) == 1
    assert "Traceback" not in ended.err
    assert len(ended.records("launch")) == 1


@pytest.mark.campaign
def test_what_the_cli_itself_refuses_is_not_tried_again(tmp_path: Path) -> None:
    ended = run(tmp_path, "snapshoot: {every: 1}")
    assert ended.code == 2, ended.err
    assert "Option 'snapshoot.every' is not accepted" in ended.err
    assert "exited with code 2 → a restart would end the same way: exit code 2" in ended.err
    assert len(ended.records("launch")) == 1
    assert [record["decision"] for record in ended.records("failure")] == ["refused"]
