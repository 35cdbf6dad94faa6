"""Fixtures of every test: nothing is left behind, and randomness can be repeated."""

from __future__ import annotations

import os
import zlib
from typing import TYPE_CHECKING

import leaks
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session", autouse=True)
def _warm_up(tmp_path_factory: pytest.TempPathFactory) -> None:
    tmp_path_factory.getbasetemp()  # before any test gets a temporary directory of its own
    leaks.warm_up()


@pytest.fixture(autouse=True)
def no_leaks(_warm_up: None) -> Iterator[None]:
    """Fail a test that leaves a process, thread, file, socket, memory or variable behind.

    The test runs with run directory, journal and TMPDIR in a private place, removed after it.
    """
    with leaks.watch() as left:
        yield
    if left:
        pytest.fail("left behind:\n" + "\n".join(f"  {trace}" for trace in left), pytrace=False)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Seed fixed per test, or MNEMO_TEST_SEED; shown when the test fails."""
    value = int(os.environ.get("MNEMO_TEST_SEED") or zlib.crc32(request.node.nodeid.encode()))
    print(f"seed {value}; repeat with MNEMO_TEST_SEED={value}")
    return value
