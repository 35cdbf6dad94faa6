from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist

import mnemo.comm  # noqa: F401 - registers the backend
from mnemo.config import load_config
from mnemo.errors import ConfigError
from mnemo.session.place import current_place

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def of_mnemo() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("mnemo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_device_of_another_kind() -> None:
    with pytest.raises(ConfigError, match=r"the model is on meta: mnemo keeps .* cpu and cuda dev"):
        current_place(load_config(), replicas=False, device=torch.device("meta"))


@pytest.mark.usefixtures("of_mnemo")
def test_groups_of_another_device_than_the_model() -> None:
    with pytest.raises(ConfigError, match=r"backend is mnemo, which is for CPUs .* on cuda:1: use"):
        current_place(load_config(), replicas=True, device=torch.device("cuda", 1))


@pytest.mark.usefixtures("of_mnemo")
def test_groups_of_the_models_device() -> None:
    place = current_place(load_config(), replicas=True, device=torch.device("cpu"))
    assert (place.rank, place.world_size) == (0, 1)
