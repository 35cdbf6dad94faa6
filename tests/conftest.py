"""Fixtures of every test: nothing is left behind, and randomness can be repeated."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import zlib
from typing import TYPE_CHECKING

import leaks
import pytest
from hypothesis import settings
from lightning_client import Lab
from warm import Zygote

if TYPE_CHECKING:
    from collections.abc import Iterator

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_keyboard_interrupt() -> None:
    """What the interrupted test holds is ended at once: xdist gives a worker seconds to go."""
    leaks.patience_s = 0.0


@pytest.fixture(scope="session", autouse=True)
def _warm_up(tmp_path_factory: pytest.TempPathFactory) -> None:
    tmp_path_factory.getbasetemp()  # before any test gets a temporary directory of its own
    leaks.warm_up()
    # As in a terminal, also where the tests were started in the background or under nohup.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _collect()


_modules = 0
"""Imported when what there is was last frozen."""


def _collect() -> None:
    """Collect garbage; what has been imported is none, and is not looked at again.

    It takes half a second where torch and Lightning are, after each test.
    """
    global _modules
    gc.collect()
    if len(sys.modules) > _modules:
        _modules = len(sys.modules)
        gc.freeze()


@pytest.fixture(autouse=True)
def no_leaks(_warm_up: None) -> Iterator[None]:
    """Fail a test that leaves a process, thread, file, socket, memory or variable behind.

    The test runs with run directory, journal and TMPDIR in a private place, removed after it.
    """
    with leaks.watch() as left:
        yield
        # What a test leaves to the collector warns here; a failed one's variables would be
        # held by its exception until the next test, and warn there.
        for name in ("last_exc", "last_type", "last_value", "last_traceback"):
            vars(sys).pop(name, None)
        _collect()
    if left and leaks.patience_s:  # what is cut off has no time to tidy up
        pytest.fail("left behind:\n" + "\n".join(f"  {trace}" for trace in left), pytrace=False)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seed of all generators, fixed per test, or MNEMO_TEST_SEED; shown when the test fails."""
    value = int(os.environ.get("MNEMO_TEST_SEED") or zlib.crc32(request.node.nodeid.encode()))
    print(f"seed {value}; repeat with MNEMO_TEST_SEED={value}")
    random.seed(value)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(value)
    return value


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """The process that lives are forked from: what it imports takes seconds."""
    made = Zygote()
    yield made
    made.close()


@pytest.fixture(scope="session")
def lab(zygote: Zygote) -> Lab:
    """Runs Lightning cases."""
    return Lab(zygote)
