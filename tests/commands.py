"""Runs mnemo's commands as a user would, within the test's own process; and runs to use them on."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from mnemo.cli import main

if TYPE_CHECKING:
    from collections.abc import Iterator

    from warm import Life, Zygote

SCRIPT = Path(__file__).parent / "scripts" / "session_small.py"


@dataclass(frozen=True)
class Answer:
    """What a command exited with and said."""

    code: int
    out: str
    err: str


def mnemo(*words: object, stdin: str = "") -> Answer:
    """Run ``mnemo WORDS``."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        mock.patch.object(sys, "argv", ["mnemo", *map(str, words)]),
        mock.patch.object(sys, "stdin", io.StringIO(stdin)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Answer(code, out.getvalue(), err.getvalue())


def status_of(run_id: str) -> dict[str, Any]:
    """The run's entry in ``mnemo status --json``."""
    answer = mnemo("status", run_id, "--json")
    assert answer.code == 0, answer.err
    (run,) = json.loads(answer.out)["runs"]
    assert run["run"] == run_id
    return run  # type: ignore[no-any-return]


@contextlib.contextmanager
def holding(zygote: Zygote, run_id: str, *steps: int, **environ: str) -> Iterator[Life]:
    """A run of `scripts/session_small.py` that holds at the last of ``steps``, one for each fit.

    Killed at the end of the block, which leaves its state in memory.
    """
    reading, writing = map(os.fdopen, os.pipe(), "rw")
    words = ["--hold-at", *steps]
    environ["MNEMO_RUN_ID"] = run_id
    with (
        reading,
        writing,
        tempfile.TemporaryFile("w+") as err,
        zygote.start(SCRIPT, *words, out=writing, err=err, environ=environ) as life,
    ):
        writing.close()
        if f"holding {steps[-1]}\n" not in iter(reading.readline, ""):
            err.seek(0)
            raise AssertionError(err.read())
        yield life
