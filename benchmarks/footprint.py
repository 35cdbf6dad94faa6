"""Memory that protection takes, on both sides, in the kernel's own accounting.

100 M parameters with AdamW, one rank, a snapshot at every step; ``--quick`` takes 25 M. The
snapshot process holds its buffers as anonymous files: what it takes is the pages allocated to them
plus its own private memory. The trainer maps these pages to write into them. As the snapshot
process does not map them, the kernel counts them in the trainer's USS; they are not the trainer's
and are counted once, with the buffers: *private* is what goes when the trainer is killed, its
anonymous memory. USS and PSS as the kernel gives them stand beside it.
"""

from __future__ import annotations

from pathlib import Path

import psutil

from benchmarks.harness import Report
from benchmarks.training import Protected, Training


def run(quick: bool, report: Report) -> None:
    """Fill ``report``."""
    training = Training(blocks=6 if quick else 24)
    training.step()
    own = psutil.Process()
    before, before_anonymous = own.memory_full_info(), _anonymous()
    protected = Protected(training, snapshot={"every": 1})
    for _ in range(6):
        protected.boundary()
        training.forward_backward()
        protected.keeper.before_update()
        training.update()
    protected.keeper.settle()
    after, after_anonymous = own.memory_full_info(), _anonymous()
    smp_pid = protected.keeper.smp_pid
    smp = psutil.Process(smp_pid).memory_full_info()
    buffers = _allocated(smp_pid)
    protected.close()
    mib = 2**20
    report.row(what="state of the rank", mib=training.nbytes / mib)
    report.row(what="snapshot buffers (pages allocated)", mib=buffers / mib)
    report.row(what="snapshot process, private (USS)", mib=smp.uss / mib)
    report.row(what="snapshot process, proportional (PSS)", mib=smp.pss / mib)
    report.row(what="trainer, private, without", mib=before_anonymous / mib)
    report.row(what="trainer, private, with", mib=after_anonymous / mib)
    report.row(what="trainer, USS, without", mib=before.uss / mib)
    report.row(what="trainer, USS, with (the mapped buffers included)", mib=after.uss / mib)
    report.row(what="trainer, proportional (PSS), with", mib=after.pss / mib)
    report.bar("smp_memory_ratio", (buffers + smp.uss) / training.nbytes, 2.1, "lower")
    report.bar("trainer_private_growth", after_anonymous / before_anonymous, 1.05, "lower")


def _anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def _allocated(pid: int) -> int:
    """Bytes of memory behind the anonymous files that a process holds open, each once."""
    sizes = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if str(entry.readlink()).startswith("/memfd:"):
                found = entry.stat()
                sizes[found.st_ino] = found.st_blocks * 512
        except FileNotFoundError:
            continue
    return sum(sizes.values())
