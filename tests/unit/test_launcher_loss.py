"""What people and the journal are told of a loss that is over."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from mnemo.launcher.loss import Loss
from mnemo.recovery.control import Back

FAILURE: Any = SimpleNamespace(words="killed by SIGKILL", kind="peer lost")


def told(*back: Back) -> tuple[str, dict[str, Any]]:
    """Of the loss of rank 1, after which the ranks said this."""

    async def made() -> tuple[str, dict[str, Any]]:
        loss = Loss(asyncio.create_task(asyncio.sleep(0)))  # type: ignore[arg-type]
        worker: Any = SimpleNamespace(rank=1, pid=77)
        loss.dead.append((worker, -9, 0.0))
        loss.by[1] = "standby"
        loss.back.update(enumerate(back))
        loss.took("all_back")
        return loss.line([FAILURE]), loss.record([FAILURE])

    return asyncio.run(made())


@pytest.mark.parametrize("inexact", ["", "samples are drawn in loader workers"])
def test_whether_the_new_process_has_all_that_the_lost_one_had(inexact: str) -> None:
    line, record = told(Back(1, 4, {}), Back(1, 4, {}, 0, inexact))
    assert "rank 1 killed by SIGKILL → standby, state from rank 0, " in line
    assert line.endswith(f"0 steps lost, not exact ({inexact})" if inexact else "lost, exact")
    assert (record["exact"], record["note"]) == (not inexact, inexact)
