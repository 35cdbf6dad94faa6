"""Starts ``mnemo run`` as a user would, and reads what it wrote."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnemo.recovery import journal

if TYPE_CHECKING:
    from collections.abc import Iterator

MNEMO = (sys.executable, "-c", "import sys; del sys.path[0]; from mnemo.cli import main; main()")
"""As the command that is installed: nothing is imported from the directory it is called in."""
TIMEOUT_S = 60


@dataclass
class Result:
    code: int
    out: str
    err: str

    def records(self, event: str) -> list[dict[str, Any]]:
        """Journal records of one kind, in order."""
        return [record for record in all_records() if record["event"] == event]


def all_records() -> list[dict[str, Any]]:
    """Every record of the test's only run."""
    paths = list(Path(os.environ["MNEMO_RUN__JOURNAL"]).glob("*.jsonl"))
    assert len(paths) == 1, paths
    return journal.read(paths[0])


def logs(life: int) -> dict[str, str]:
    """What the ranks of a life wrote, by file name."""
    found = Path(os.environ["MNEMO_RUN__JOURNAL"]).glob(f"*/life-{life}/*")
    return {path.name: path.read_text() for path in found}


@contextmanager
def started(*words: str, cwd: Path, **environ: str) -> Iterator[subprocess.Popen[str]]:
    """A running ``mnemo run``, killed at the end of the block if it still runs."""
    process = subprocess.Popen(
        [*MNEMO, "run", *words],
        cwd=cwd,
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def finish(process: subprocess.Popen[str]) -> Result:
    """Wait for its end."""
    out, err = process.communicate(timeout=TIMEOUT_S)
    return Result(process.returncode, out, err)


def launch(*words: str, cwd: Path, **environ: str) -> Result:
    """Run ``mnemo run`` to its end."""
    with started(*words, cwd=cwd, **environ) as process:
        return finish(process)
