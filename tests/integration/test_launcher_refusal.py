"""A wrong setting in a script: one line and exit code 2 under ``mnemo run``, however many ranks."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest
from launching import Result, launch

if TYPE_CHECKING:
    from pathlib import Path

SAID = "snapshot.evry is not a setting (in the arguments). Did you mean snapshot.every?"
WRONG = 'from mnemo.config import load_config\nload_config(snapshot={"evry": 1})\n'


def run(tmp_path: Path, text: str, *words: str, **environ: str) -> Result:
    (tmp_path / "train.py").write_text(text)
    return launch(*words, "train.py", cwd=tmp_path, **environ)


def assert_refused(ended: Result, said: str) -> None:
    assert ended.code == 2, ended.err
    assert "Traceback" not in ended.err
    assert [line for line in ended.err.splitlines() if said in line] == [f"mnemo: {said}"]
    assert ended.err.endswith(f"mnemo: {said}\n")
    assert len(ended.records("launch")) == 1
    (failure,) = ended.records("failure")
    assert failure["decision"] == "refused"
    assert failure["cause"] == f"found a wrong setting ({said})"
    assert [record["code"] for record in ended.records("end")] == [2]


@pytest.mark.parametrize("words", [(), ("--nproc-per-node=3",), ("--redirects=3",)])
def test_a_wrong_argument(tmp_path: Path, words: tuple[str, ...]) -> None:
    assert_refused(run(tmp_path, WRONG, *words), SAID)


def test_a_wrong_file_that_a_session_names(tmp_path: Path) -> None:
    (tmp_path / "mnemo.yaml").write_text("snapshot: {every: often}\n")
    ended = run(
        tmp_path,
        "import torch, mnemo\nmodel = torch.nn.Linear(1, 1)\n"
        'mnemo.Session("mnemo.yaml", model=model, optimizer=torch.optim.SGD(model.parameters()))\n',
        OMP_NUM_THREADS="1",
    )
    said = "snapshot.every is 'often' (in mnemo.yaml, line 1). Give a whole number, at least 1."
    assert_refused(ended, said)


def test_one_that_is_caught_is_the_scripts_own_affair(tmp_path: Path) -> None:
    text = "try:\n" + textwrap.indent(WRONG, "    ") + "except ValueError: pass\n"
    ended = run(tmp_path, text + 'print("went on")\n')
    assert (ended.code, ended.out) == (0, "went on\n")
    assert SAID not in ended.err


def test_other_errors_have_their_traceback_and_the_scripts_hook(tmp_path: Path) -> None:
    text = (
        'import sys\nsys.excepthook = lambda *e: print("hooked", e[1])\n'
        "from mnemo.config import load_config\nload_config()\n"
    )
    ended = run(tmp_path, text + 'raise ValueError("bad batch")\n', "--max-restarts=0")
    assert (ended.code, ended.out) == (1, "hooked bad batch\n")
    ended = run(tmp_path, text + WRONG)
    assert (ended.code, ended.out) == (2, "")
    assert f"mnemo: {SAID}\n" in ended.err


def test_one_that_is_the_cause_of_another_error(tmp_path: Path) -> None:
    """As a framework's that reads settings from a file of its own."""
    text = "try:\n" + textwrap.indent(WRONG, "    ")
    ended = run(tmp_path, text + 'except ValueError as e: raise TypeError("in x.yaml") from e\n')
    assert_refused(ended, SAID)


def test_wrong_arguments_of_the_scripts_own_are_not_tried_again(tmp_path: Path) -> None:
    text = 'import argparse\np = argparse.ArgumentParser()\np.add_argument("--lr", type=float)\n'
    (tmp_path / "train.py").write_text(text + "p.parse_args()\n")
    ended = launch("train.py", "--lr=high", cwd=tmp_path)
    assert ended.code == 2
    assert "train.py: error: argument --lr: invalid float value: 'high'" in ended.err
    assert "exited with code 2 → a restart would end the same way: exit code 2" in ended.err
    assert len(ended.records("launch")) == 1


@pytest.mark.parametrize(("line", "code"), [("error: 2.5", 3), ("epoch 3", 2)])
def test_any_other_end_may_be_another_one_the_next_time(
    tmp_path: Path, line: str, code: int
) -> None:
    ended = run(tmp_path, f"print({line!r})\nraise SystemExit({code})\n", "--max-restarts=1")
    assert (ended.code, len(ended.records("launch"))) == (code, 2)


def test_a_program_that_a_rank_starts_has_its_own_errors(tmp_path: Path) -> None:
    (tmp_path / "tool.py").write_text(WRONG)
    text = (
        "import subprocess, sys\n"
        'print("tool ended with", subprocess.run([sys.executable, "tool.py"]).returncode)\n'
    )
    ended = run(tmp_path, text)
    assert (ended.code, ended.out) == (0, "tool ended with 1\n")
    assert ended.err.count("Traceback") == 1
    assert f"mnemo.errors.ConfigError: {SAID}\n" in ended.err


def test_without_an_agent_the_message_is_the_last_line(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(WRONG)
    ended = subprocess.run(
        [sys.executable, "train.py"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == f"mnemo.errors.ConfigError: {SAID}"


def test_a_message_that_cannot_be_left_is_a_traceback(tmp_path: Path) -> None:
    text = 'import os\nos.environ["MNEMO_REFUSAL_FILE"] = "/proc/none"\n' + WRONG
    ended = run(tmp_path, text)
    assert ended.code == 1
    assert f"ConfigError: {SAID}" in ended.err
    assert [record["decision"] for record in ended.records("failure")] == ["refused"]
