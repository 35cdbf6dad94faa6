"""An error that all ranks raise is said by one of them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
from mnemo.config.uncaught import say_once
from mnemo.errors import ConfigError, IdentityError

error = IdentityError("what happened")
say_once(error, here={here})
raise {raises}
"""


def end_of(*, here: bool = True, raises: str = "error", **environ: str) -> tuple[int, str]:
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(here=here, raises=raises)],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not ended.stdout
    return ended.returncode, ended.stderr


@pytest.mark.parametrize(
    ("here", "said"), [(True, "mnemo: IdentityError: what happened\n"), (False, "")]
)
def test_one_rank_says_it_in_one_line(here: bool, said: str) -> None:
    assert end_of(here=here) == (1, said)


def test_any_other_error_has_its_traceback() -> None:
    code, said = end_of(here=False, raises='ConfigError("another")')
    assert code == 1
    assert said.startswith("Traceback")
    assert said.endswith("ConfigError: another\n")


def test_mnemo_run_gets_a_traceback_of_each_rank() -> None:
    code, said = end_of(here=False, MNEMO_AGENT=f"{os.getpid()}-1.0")
    assert code == 1
    assert said.endswith("IdentityError: what happened\n")
    assert said.startswith("Traceback")
