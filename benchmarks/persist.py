"""What persisting to a slow store costs the training steps: nothing of it is on their path.

25 M parameters with AdamW (300 MB of state) go to a store that takes 10 MB/s, all the time. Steps
are measured in turns with those of the same training while nothing is persisted.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import tempfile
import time
from pathlib import Path

import fsspec
import psutil

from benchmarks.harness import Report, Samples, seconds
from benchmarks.training import Protected, Training

SLOW_STORE = '''
import time
from fsspec.implementations.local import LocalFileOpener, LocalFileSystem

RATE = 10e6

class SlowFile(LocalFileOpener):
    def write(self, data):
        time.sleep(len(memoryview(data).cast("B")) / RATE)
        return super().write(data)

class SlowStore(LocalFileSystem):
    """The local disk, at 10 MB/s."""

    protocol = "slow"

    def _open(self, path, mode="rb", block_size=None, **kwargs):
        if "r" in mode:
            return super()._open(path, mode, block_size, **kwargs)
        return SlowFile(path, mode, fs=self, **kwargs)

    @classmethod
    def _strip_protocol(cls, path):
        return LocalFileSystem._strip_protocol(path.replace("slow://", "file://"))
'''


def run(quick: bool, report: Report) -> None:
    """Fill ``report``."""
    directory = Path(tempfile.mkdtemp(prefix="mnemo-benchmark-"))
    try:
        _install_store(directory)
        _measure(directory, report, rounds=8 if quick else 100)
    finally:
        sys.path.remove(str(directory))
        shutil.rmtree(directory, ignore_errors=True)


def _install_store(directory: Path) -> None:
    """Make ``slow://`` known to fsspec here and in the snapshot process, as a package would."""
    (directory / "mnemo_slow_store.py").write_text(SLOW_STORE)
    info = directory / "mnemo_slow_store-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mnemo-slow-store\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[fsspec.specs]\nslow=mnemo_slow_store:SlowStore\n")
    sys.path.insert(0, str(directory))
    module = importlib.import_module("mnemo_slow_store")
    fsspec.register_implementation("slow", module.SlowStore, clobber=True)


def _measure(directory: Path, report: Report, *, rounds: int) -> None:
    training = Training(blocks=6)
    store = directory / "store"
    with_store = Protected(
        training, snapshot={"every": 10}, persist={"to": f"slow://{store}", "every": "1s"}
    )
    without = Protected(training, snapshot={"every": 10})

    def steps(protected: Protected) -> float:
        def ten() -> None:
            for _ in range(10):
                training.forward_backward()
                protected.keeper.before_update()
                training.update()
                protected.boundary()
            protected.keeper.before_update()  # the next ten are another keeper's

        return seconds(ten)

    for protected in (with_store, without):
        steps(protected)
    own = psutil.Process()
    written = own.io_counters().write_bytes
    persisting, plain = [], []
    for number in range(rounds):
        order = [(persisting, with_store), (plain, without)]
        for taken, protected in order if number % 2 else reversed(order):
            taken.append(steps(protected))
    on_path = own.io_counters().write_bytes - written
    deadline = time.monotonic() + 1  # what has arrived so far is looked at, not waited for
    while not (arrived := _size(store)) and time.monotonic() < deadline:
        time.sleep(0.05)
    without.close()
    with_store.abandon()
    ratio = Samples(persisting).over(Samples(plain))
    low, high = ratio.quartiles
    report.row(
        what="ten steps", ms_persisting=Samples(persisting).median * 1e3,
        ms_plain=Samples(plain).median * 1e3, ratio=ratio.median, q1=low, q3=high,
        mb_arrived=arrived / 1e6,
    )  # fmt: skip
    report.bar("storage_bytes_on_step_path", on_path, 0, "lower")
    report.bar("slow_store_step_ratio", ratio.median, 1.01, "lower")
    report.bar("megabytes_arrived", arrived / 1e6, 1, "higher")


def _size(store: Path) -> int:
    return sum(f.stat().st_size for f in store.rglob("*") if f.is_file())
