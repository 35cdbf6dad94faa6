from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING

import pytest

from mnemo.errors import LaunchError
from mnemo.launcher import LaunchOptions, options

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("asked", "visible", "ranks"),
    [
        ("3", None, 3),
        ("cpu", "0,1", len(os.sched_getaffinity(0))),
        ("gpu", "0,1,2", 3),
        ("gpu", "GPU-8f3a,-1,2", 1),
        ("auto", "0,1", 2),
        ("auto", "", len(os.sched_getaffinity(0))),
    ],
)
def test_ranks_are_counted(asked: str, visible: str | None, ranks: int) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert options.count_ranks(asked, environ) == ranks


@pytest.mark.parametrize("asked", ["0", "-1", "two", "", "1.5", "99999", "tpu"])
def test_senseless_numbers_of_ranks_are_refused(asked: str) -> None:
    with pytest.raises(LaunchError, match=re.escape(f"--nproc-per-node={asked} is none of")):
        options.count_ranks(asked, {})


def test_gpu_without_a_gpu_is_refused() -> None:
    with pytest.raises(LaunchError, match="no NVIDIA GPU is visible"):
        options.count_ranks("gpu", {"CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.parametrize(
    ("redirects", "only", "hidden"),
    [
        ("0", "", set()),
        ("1", "", {(0, "stdout"), (1, "stdout")}),
        ("3", "", {(0, "stdout"), (0, "stderr"), (1, "stdout"), (1, "stderr")}),
        ("0:2,1:1", "", {(0, "stderr"), (1, "stdout")}),
        ("1:0", "", set()),
        ("0", "0", {(1, "stdout"), (1, "stderr")}),
        ("0", "0, 1", set()),
    ],
)
def test_streams_kept_off_the_terminal(
    redirects: str, only: str, hidden: set[tuple[int, str]]
) -> None:
    assert options.hidden_streams(redirects, only, 2) == hidden


@pytest.mark.parametrize("redirects", ["4", "", "x", "0:4", ":1", "a:1", "0:1,"])
def test_senseless_redirects_are_refused(redirects: str) -> None:
    with pytest.raises(LaunchError, match="--redirects="):
        options.hidden_streams(redirects, "", 2)


def test_a_senseless_filter_is_refused() -> None:
    with pytest.raises(LaunchError, match="--local-ranks-filter=0,x"):
        options.hidden_streams("0", "0,x", 2)


def test_the_command_of_a_rank(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("")

    def command(word: str, *, module: bool = False, no_python: bool = False) -> tuple[str, ...]:
        return options.rank_command(
            word, ["--lr", "1"], module=module, no_python=no_python, environ={}
        )

    assert command(str(script)) == (sys.executable, "-u", str(script), "--lr", "1")
    assert command("a.b", module=True) == (sys.executable, "-u", "-m", "a.b", "--lr", "1")
    assert command("nvidia-smi", no_python=True) == ("nvidia-smi", "--lr", "1")
    with pytest.raises(LaunchError, match="exclude each other"):
        command("a.b", module=True, no_python=True)
    with pytest.raises(LaunchError, match=r"absent\.py does not exist"):
        command(str(tmp_path / "absent.py"))


def test_another_python_can_be_named(tmp_path: Path) -> None:
    command = options.rank_command(
        "m", [], module=True, no_python=False, environ={"PYTHON_EXEC": "/opt/python"}
    )
    assert command == ("/opt/python", "-u", "-m", "m")


@pytest.mark.parametrize(
    ("configured", "environ", "rdzv_id", "run_id"),
    [
        ("mine", {"MNEMO_RUN_ID": "env", "SLURM_JOB_ID": "7"}, "rdzv", "mine"),
        ("", {"MNEMO_RUN_ID": "env", "SLURM_JOB_ID": "7"}, "rdzv", "env"),
        ("", {"SLURM_JOB_ID": "7"}, "rdzv", "7"),
        ("", {}, "rdzv", "rdzv"),
    ],
)
def test_a_stable_identity_is_kept(
    configured: str, environ: dict[str, str], rdzv_id: str, run_id: str
) -> None:
    chosen = options.choose_run_id(
        configured, environ=environ, rdzv_id=rdzv_id, name="n", script="s.py"
    )
    assert chosen == run_id


@pytest.mark.parametrize(
    ("name", "script", "stem"),
    [
        ("gpt-7b", "train.py", "gpt-7b"),
        ("", "dir/train.py", "train"),
        ("", "pkg.train", "pkg.train"),
        ("my run / x", "t.py", "my-run-x"),
        ("", "/", "run"),
    ],
)
def test_a_new_identity_is_readable_and_new(name: str, script: str, stem: str) -> None:
    def chosen() -> str:
        return options.choose_run_id("", environ={}, rdzv_id="none", name=name, script=script)

    assert re.fullmatch(re.escape(stem) + "-[0-9a-f]{6}", chosen())
    assert chosen() != chosen()


def test_negative_restarts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="--max-restarts=-1 is negative"):
        LaunchOptions(command=("x",), run_id="r", ranks=1, log_dir=tmp_path, max_restarts=-1)
