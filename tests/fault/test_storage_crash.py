"""A writer killed by SIGKILL before each of its file system calls and between its chunks."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

from storage_suite import MARKER, Place, content, read, source, steps, write

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
    if name in ("open", "os.mkdir", "os.remove", "os.rmdir") and str(args[0]).startswith(url):
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
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_a_kill_at_any_point_loses_no_complete_checkpoint(tmp_path: Path) -> None:
    before = tmp_path / "before"
    prepared = Place(str(before), {})
    for step in (10, 20):
        write(prepared.open(), step)
    prepared.put(prepared.file(30, "a.bin"), b"left by an earlier attempt")
    prepared.put(prepared.file(30, "c.bin"), b"left by an earlier attempt")
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
        assert read(store, store.get(20)) == content(20)
        if 30 in listed:
            for letter in "ab":
                assert read(store, store.get(30), f"{letter}.bin") == letter.encode() * (2 << 20)
        else:
            marker = Path(url, "run-7", f"step-{30:012d}", MARKER)
            assert not marker.exists() or marker.read_bytes() == b""
        store.write(30, {f"{x}.bin": source(x.encode() * (2 << 20)) for x in "ab"})
        assert steps(store) == [30, 20]
        assert Place(str(url), {}).names() == Place(str(clean), {}).names()
        shutil.rmtree(url)
    assert outcomes == {(20, 10), (30, 20, 10), (30, 20)}, "the kills missed a phase"
