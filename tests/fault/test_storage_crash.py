"""A writer killed by SIGKILL before each of its file system calls and between its chunks."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from storage_suite import MARKER, Place, content, read, source, steps, write

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 2 << 20

# Kills itself at the `at`-th event on the store's files. Python raises an audit event right before
# each open, mkdir, remove and rmdir; chunks add the instants within a file.
WRITER = """
import os, signal, sys
from mnemo.storage import CheckpointStore

url, at, size = sys.argv[1], int(sys.argv[2]), 1 << 20
count = 0

def event():
    global count
    count += 1
    if count == at:
        os.kill(os.getpid(), signal.SIGKILL)

def audit(name, args):
    if name in ("os.mkdir", "os.remove", "os.rmdir"):  # the paths may be relative: see rmtree
        event()
    elif name == "open" and str(args[0]).startswith(url):
        event()

def chunks(letter):
    for _ in range(2):
        event()
        yield letter * size
    event()

store = CheckpointStore(url, run_id="run-7", keep=2)
sys.addaudithook(audit)
store.write(30, {"a.bin": lambda: chunks(b"a"), "b.bin": lambda: chunks(b"b")})
print(count)
"""


def run_writer(url: Path, at: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WRITER, str(url), str(at)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)


def unfinished(place: Place) -> None:
    place.put(place.file(30, "a.bin"), b"left by an earlier attempt")
    place.put(place.file(30, "c.bin"), b"left by an earlier attempt")


def complete(place: Place) -> None:
    place.open(keep=9).write(30, {"a.bin": source(b"a"), "b.bin": source(b"b")})


@pytest.mark.parametrize("earlier", [unfinished, complete])
def test_a_kill_at_any_point_loses_no_complete_checkpoint(
    tmp_path: Path, earlier: Callable[[Place], None]
) -> None:
    before = tmp_path / "before"
    for step in (10, 20):
        write(Place(str(before), {}).open(), step)
    earlier(Place(str(before), {}))
    clean = tmp_path / "clean"
    shutil.copytree(before, clean)
    whole = run_writer(clean, at=0)
    assert whole.returncode == 0, whole.stderr
    outcomes = set()
    for at in range(1, int(whole.stdout) + 1):
        url = tmp_path / f"kill-{at}"
        shutil.copytree(before, url)
        killed = run_writer(url, at)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        store = Place(str(url), {}).open(keep=2)
        listed = steps(store)
        outcomes.add(tuple(listed))
        assert listed in ([20, 10], [30, 20, 10], [30, 20]), f"killed at event {at}"
        for step in set(listed) - {30}:
            assert read(store, store.get(step)) == content(step)
        if 30 in listed:
            a, b = (read(store, store.get(30), name) for name in ("a.bin", "b.bin"))
            assert (a, b) in ((b"a" * SIZE, b"b" * SIZE), (b"a", b"b")), f"killed at event {at}"
        else:
            marker = Path(url, "run-7", f"step-{30:012d}", MARKER)
            assert not marker.exists() or marker.read_bytes() == b""
        store.write(30, {f"{x}.bin": source(x.encode() * SIZE) for x in "ab"})
        assert steps(store) == [30, 20]
        assert Place(str(url), {}).names() == [
            *(f"step-{20:012d}/{name}" for name in (MARKER, "rank-0.bin")),
            *(f"step-{30:012d}/{name}" for name in (MARKER, "a.bin", "b.bin")),
        ]
        shutil.rmtree(url)
    assert outcomes == {(20, 10), (30, 20, 10), (30, 20)}, "the kills missed a phase"
