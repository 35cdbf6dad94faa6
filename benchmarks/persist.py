"""What persisting to a slow store costs the training steps: nothing of it is on their path.

25 M parameters with AdamW (300 MB of state) go to a store that takes 10 MB/s, all the time. Single
steps are taken in turns with those of the same training while nothing is persisted, and ten of each
are compared. Ten after ten, the machine's drift from block to block (5 %) hid what is looked for.
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

EVERY = 10
"""Steps from one snapshot to the next, with the store and without."""

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
        training, snapshot={"every": EVERY}, persist={"to": f"slow://{store}", "every": "1s"}
    )
    without = Protected(training, snapshot={"every": EVERY})

    def step(protected: Protected) -> float:
        def one() -> None:
            training.step()
            protected.boundary()
            protected.keeper.before_update()  # the next step is another keeper's

        return seconds(one)

    for protected in (with_store, without):
        for _ in range(EVERY):
            step(protected)
    own = psutil.Process()
    written = own.io_counters().write_bytes
    persisting: list[float] = []
    plain: list[float] = []
    queued = {id(with_store): 0.0, id(without): 0.0}
    for _ in range(rounds):
        took = {id(with_store): 0.0, id(without): 0.0}
        for number in range(EVERY):
            order = [with_store, without]
            for protected in order if number % 2 else reversed(order):
                waited = _run_queue_s()
                took[id(protected)] += step(protected)
                queued[id(protected)] += _run_queue_s() - waited
        persisting.append(took[id(with_store)])
        plain.append(took[id(without)])
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
        run_queue_ms_persisting=queued[id(with_store)] / rounds * 1e3,
        run_queue_ms_plain=queued[id(without)] / rounds * 1e3,
        mb_arrived=arrived / 1e6,
    )  # fmt: skip
    report.bar("storage_bytes_on_step_path", on_path, 0, "lower")
    report.bar("slow_store_step_ratio", ratio.median, 1.01, "lower")
    report.bar("megabytes_arrived", arrived / 1e6, 1, "higher")


def _run_queue_s() -> float:
    """Seconds that this thread has been able to run, while others had the cores."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def _size(store: Path) -> int:
    return sum(f.stat().st_size for f in store.rglob("*") if f.is_file())
