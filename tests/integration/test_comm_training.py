"""DDP in its variants, FSDP2, tensor parallelism and meshes over the backend."""

from __future__ import annotations

import hashlib
import os
import signal
from typing import TYPE_CHECKING, Any

import comm_lab
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from mnemo import comm
from mnemo.errors import GroupBrokenError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "fp16 hook": {},
    "PowerSGD hook": {},
}


class _Model(nn.Module):
    """With a buffer that DDP broadcasts, and a branch that not every step takes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 256)
        self.norm = nn.BatchNorm1d(256)
        self.sometimes = nn.Linear(256, 256)
        self.last = nn.Linear(256, 64)

    def forward(self, x: torch.Tensor, *, branch: bool) -> torch.Tensor:
        x = self.norm(self.first(x).relu())
        return self.last(self.sometimes(x) if branch else x)


def _hash(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for each in tensors:
        digest.update(each.detach().numpy().tobytes())
    return digest.hexdigest()


def _wrap(model: nn.Module, variant: str, bucket_mb: float) -> Any:
    if variant == "PowerSGD hook":
        # Its hooks call collectives from hooks of futures: with several buckets their order is
        # a matter of chance, over plain gloo, too. And it compresses by bucket.
        bucket_mb = 25
    ddp = DistributedDataParallel(model, bucket_cap_mb=bucket_mb, **VARIANTS[variant])
    if variant == "fp16 hook":
        ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif variant == "PowerSGD hook":
        state = powerSGD_hook.PowerSGDState(None, 1, start_powerSGD_iter=2)
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return ddp


def _ddp(
    rank: int,
    port: int,
    talk: comm_lab.Talk,
    size: int,
    backend: str,
    variant: str,
    bucket_mb: float,
    dies_at: int | None,
) -> str:
    del talk
    with comm_lab.group(backend, rank, size, port):
        torch.manual_seed(0)
        model = _Model()
        ddp = _wrap(model, variant, bucket_mb)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(6):
            torch.manual_seed(1000 * step + rank)
            x = torch.randn(16, 64)
            optimizer.zero_grad()
            if step == dies_at and rank == size - 1:
                model.first.weight.register_post_accumulate_grad_hook(
                    lambda _: os.kill(os.getpid(), signal.SIGKILL)
                )
            branch = step % 2 == 0 or variant != "find_unused_parameters"
            loss = (ddp(x, branch=branch) - x).pow(2).mean()
            loss.backward()
            if step == dies_at:
                with pytest.raises(GroupBrokenError):
                    comm.check()
                return "noticed"
            optimizer.step()
        return _hash([*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("variant", VARIANTS)
def test_ddp_is_the_same_in_each_run(variant: str) -> None:
    runs = [
        comm_lab.run_all(_ddp, 3, 3, "mnemo", variant, bucket_mb, None) for bucket_mb in (0.1, 25)
    ]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_are_bit_identical_to_gloo(variant: str) -> None:
    runs = [
        comm_lab.run_all(_ddp, 2, 2, backend, variant, 0.1, None) for backend in ("mnemo", "gloo")
    ]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_death_within_backward_ends_it_and_nothing_else(variant: str) -> None:
    with comm_lab.world() as world:
        *others, _ = world.start_all(_ddp, 3, 3, "mnemo", variant, 0.1, 3)
        assert [each.result() for each in others] == ["noticed"] * 2


def _local(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [each.to_local() if isinstance(each, DTensor) else each for each in parameters]


def _steps(model: nn.Module, seed: Callable[[int], int]) -> str:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    for step in range(3):
        torch.manual_seed(seed(step))
        x = torch.randn(8, 32)
        optimizer.zero_grad()
        (model(x) - x).pow(2).mean().backward()
        if dist.get_backend() == "mnemo":
            comm.check()
        optimizer.step()
    return _hash(_local(model.parameters()))


def _mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))


def _fsdp(rank: int, port: int, talk: comm_lab.Talk, size: int, backend: str) -> str:
    del talk
    with comm_lab.group(backend, rank, size, port):
        model = _mlp()
        for each in (model[0], model[2], model):
            fully_shard(each, mesh=init_device_mesh("cpu", (size,)))
        return _steps(model, lambda step: 1000 * step + rank)


def _tensor_parallel(rank: int, port: int, talk: comm_lab.Talk, size: int, backend: str) -> str:
    del talk
    with comm_lab.group(backend, rank, size, port):
        mesh = init_device_mesh("cpu", (size,))
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        return _steps(parallelize_module(_mlp(), mesh, plan), lambda step: step)


def _mesh(rank: int, port: int, talk: comm_lab.Talk, size: int, backend: str) -> Any:
    del talk, size
    with comm_lab.group(backend, rank, 4, port):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
        sums = []
        for name in ("data", "model"):
            x = torch.tensor([float(rank)])
            dist.all_reduce(x, group=mesh.get_group(name))
            sums.append(x.item())
        if backend == "mnemo":
            world = dist.group.WORLD
            assert world is not None
            pair = [rank // 2 * 2, rank // 2 * 2 + 1]
            split = world.split_group(pair)
            assert isinstance(split, comm.Group)
            x = torch.tensor([float(rank)])
            split.allreduce([x], dist.AllreduceOptions()).wait()
            assert x.item() == sum(pair)
            split.shutdown()
        return sums


@pytest.mark.parametrize("program", [_fsdp, _tensor_parallel])
def test_sharded_models_train_as_over_gloo(program: Callable[..., str]) -> None:
    runs = [comm_lab.run_all(program, 2, 2, backend) for backend in ("mnemo", "gloo")]
    assert runs[0] == runs[1]


def test_groups_of_a_mesh() -> None:
    assert comm_lab.run_all(_mesh, 4, 4, "mnemo") == comm_lab.run_all(_mesh, 4, 4, "gloo")
