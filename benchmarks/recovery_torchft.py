"""The training of `benchmarks.recovery` under torchft, in which each rank is a replica group."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist
from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo

from benchmarks.recovery_marks import mark
from benchmarks.recovery_plain import Training


def main() -> None:
    """Until killed."""
    mark("imported")
    rank = int(os.environ["RANK"])
    training = Training()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=5)),
        min_replica_size=1,
        load_state_dict=training.load,
        state_dict=training.state,
        replica_id=f"replica{rank}_",
        store_addr="127.0.0.1",
        store_port=store.port,
        rank=0,
        world_size=1,
        port=0,
        lighthouse_addr=os.environ["TORCHFT_LIGHTHOUSE"],
    )
    mark("ready")
    ddp = DistributedDataParallel(manager, training.model)
    optimizer = Optimizer(manager, training.optimizer)
    ranks = int(os.environ["WORLD_SIZE"])
    for window in training.batches(rank, ranks, manager.current_step()):
        optimizer.zero_grad()
        training.backward(ddp, window, manager.current_step() + 1)
        optimizer.step()
        mark("step", step=manager.current_step(), ranks=manager.num_participants())


if __name__ == "__main__":
    main()
