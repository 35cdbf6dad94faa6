"""``mnemo run`` where something of the place is unusual: works, or says what to do in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import MNEMO, launch

SCRIPT = "print('ran')\n"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with a script ``train.py``."""
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path


@pytest.mark.parametrize("umask", ["000", "077"])
def test_run_directories_are_made_private_and_removed_again(place: Path, umask: str) -> None:
    parent = place / "made" / ("d" * 100)  # no socket address has room for it
    script = f"import os; print([oct(os.stat(p).st_mode) for p in {[str(parent), 'made']}])"
    (place / "train.py").write_text(script)
    before = os.umask(int(umask, 8))
    try:
        ended = launch("train.py", cwd=place, MNEMO_RUN__DIR=str(parent))
    finally:
        os.umask(before)
    assert ended.code == 0, ended.err
    assert ended.out == "['0o40700', '0o40700']\n"
    assert not (place / "made").exists()


@pytest.mark.parametrize(
    ("directory", "said"),
    [
        ("/proc/nothing", "cannot be made: No such file or directory. Set run.dir to"),
        ("d" * 300, "cannot be made: File name too long. Set run.dir to"),
        ("train.py", "is not a directory: remove it or set run.dir"),
    ],
)
def test_a_run_directory_that_cannot_be_is_named(place: Path, directory: str, said: str) -> None:
    ended = launch("train.py", cwd=place, MNEMO_RUN__DIR=directory)
    assert ended.code == 1
    assert ended.err.splitlines()[-1].startswith("mnemo: the run directory ")
    assert said in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err


def test_a_working_directory_that_is_gone_is_named(place: Path) -> None:
    gone = place / "gone"
    gone.mkdir()
    code = "import os, sys; os.rmdir(os.getcwd()); os.execv(sys.argv[1], sys.argv[1:])"
    ended = subprocess.run(
        [sys.executable, "-c", code, *MNEMO, "run", str(place / "train.py")],
        cwd=gone,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr == (
        "mnemo: the working directory has been removed: change to one that exists\n"
    )
