"""Whether ranks of a training can be replaced, and the reason that people are given if not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pytest
import torch.distributed as dist

from mnemo import comm
from mnemo.recovery import control
from mnemo.session import replacing
from mnemo.session.place import Place

if TYPE_CHECKING:
    from collections.abc import Iterator

NO_LINK: Final[Any] = None
PLACE: Final = Place(replicas=True)


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Process groups of this process alone, as under `mnemo run`."""
    monkeypatch.setenv(control.CONTROL_VARIABLE, "77")
    monkeypatch.setattr(comm.mode, "replaceable", True)
    dist.init_process_group("mnemo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_group_of_another_backend_beside_ours() -> None:
    """Its members would wait for the lost one in it for ever."""
    dist.new_group([0])
    dist.new_group([0], backend="gloo")
    begun, why_not = replacing.begin(PLACE, NO_LINK, fit=0)
    assert begun is None
    assert why_not == "needs process groups of backend mnemo, and one has backend gloo"


def test_a_second_training() -> None:
    """That nothing can be replaced in it is not the fault of `mnemo run`, nor of the groups."""
    assert replacing.begin(PLACE, NO_LINK, fit=0) == (
        None,
        "needs mnemo run, and recover.in_process",
    )
    assert replacing.begin(PLACE, NO_LINK, fit=1) == (
        None,
        "this is not the program's first training",
    )
