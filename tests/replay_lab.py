"""Training whose ranks are replaced while it runs; the test is the agent that sees who is lost.

What a lost rank kept outside itself at each boundary is a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import threading
import traceback
from typing import TYPE_CHECKING, Any, NamedTuple

import comm_lab
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from mnemo import comm
from mnemo.comm import collectives, group, ordered
from mnemo.comm import ddp as comm_ddp
from mnemo.errors import CommError, GroupBrokenError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

STEPS = 6
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"broadcast_buffers": False},
    "buffers broadcast": {},
    "find_unused_parameters": {"find_unused_parameters": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "fp16 hook": {},
    "accumulation": {},
    "synchronised statistics": {},
    "keeps all": {},
}


class Death(NamedTuple):
    """Where a rank ends itself.

    Attributes:
        tick: Boundary after which.
        place: In the step; or "inner", within an operation.
        after: Inner operations of gloo's that it still does.
        end: How; None: it lives, and its links are cut.
    """

    tick: int
    place: str
    after: int = 0
    end: signal.Signals | None = signal.SIGKILL


class Outcome(NamedTuple):
    """Of a rank that trained to the end."""

    losses: list[float]
    hashed: str
    passes: int


class _Model(nn.Module):
    """With dropout, buffers of each rank's own, and a branch that not every step takes."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self._together = variant == "synchronised statistics"
        self.first = nn.Linear(64, 512)
        self.norm = nn.BatchNorm1d(512)
        if variant == "find_unused_parameters":
            self.sometimes = nn.Linear(512, 512)
        self.last = nn.Linear(512, 64)

    def forward(self, x: torch.Tensor, *, branch: bool) -> torch.Tensor:
        x = self.first(x).relu()
        if self._together:  # as SyncBatchNorm, which needs a GPU
            x = x - dist_nn.all_reduce(x.mean(0)) / dist.get_world_size()  # type: ignore[no-untyped-call]
        x = torch.nn.functional.dropout(self.norm(x), 0.1, self.training)
        return self.last(self.sometimes(x) if branch else x)


class Training:
    """Training that keeps its own small state at each boundary."""

    def __init__(self, rank: int, folder: Path, variant: str, death: Death | None) -> None:
        torch.manual_seed(rank)
        self._variant, self._death = variant, death
        self.model = _Model(variant)
        self.ddp = DistributedDataParallel(self.model, bucket_cap_mb=0.05, **VARIANTS[variant])
        if variant == "fp16 hook":
            self.ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        for each in self.model.parameters():  # as after a first step
            state = self._optimizer.state[each]
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(each), torch.zeros_like(each)
        self._ledger = folder / f"rank{rank}"
        self.keeps_all = variant == "keeps all"
        """Whoever comes in a lost one's place has what ranks have alike from there, too."""
        self.rank, self.tick, self._passes = rank, 0, 0
        self._losses: list[float] = []
        self._inner, self._ended = 0, False
        self.on_cut: Callable[[], object] = lambda: None

    def shared(self) -> list[torch.Tensor]:
        """What all ranks have alike."""
        states = [self._optimizer.state[each] for each in self.model.parameters()]
        moments = [each[name] for each in states for name in ("step", "exp_avg", "exp_avg_sq")]
        return [*self.model.parameters(), *moments]

    def keep(self) -> None:
        """A boundary."""
        own = {
            "tick": self.tick,
            "losses": self._losses,
            "random": torch.get_rng_state(),
            "buffers": list(self.model.buffers()),
            "layout": comm_ddp.layout(self.ddp),
            "shared": self.shared() if self.keeps_all else [],
        }
        torch.save(own, self._ledger.with_suffix(".new"))
        self._ledger.with_suffix(".new").rename(self._ledger)
        comm.mark(self.tick)

    def resume(self) -> None:
        """Be where a lost process was."""
        own = torch.load(self._ledger)
        self.tick, self._losses = own["tick"], own["losses"]
        torch.set_rng_state(own["random"])
        with torch.no_grad():
            for each, value in zip(self.model.buffers(), own["buffers"], strict=True):
                each.copy_(value)
            if self.keeps_all:
                for each, value in zip(self.shared(), own["shared"], strict=True):
                    each.copy_(value)
        comm_ddp.adopt(self.ddp, own["layout"])

    def run(self) -> Outcome:
        """To the end."""
        if self._death is not None and self._death.place == "inner":
            self._count_inner()
        while self.tick < STEPS:
            if self.tick % 2 == 1:
                self._validate()
            self._at("loading")
            self._optimizer.zero_grad()
            parts = 2 if self._variant == "accumulation" else 1
            for part in range(parts):
                last = part == parts - 1
                with contextlib.nullcontext() if last else self.ddp.no_sync():
                    loss = self._loss()
                    if last:
                        self._at("backward")
                    loss.backward()
            self._at("before the update")
            if self.tick:
                comm.pass_update(self.tick)
            self._at("in the update")
            self._optimizer.step()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            self._losses.append(mean.item())
            self._at("behind the update")
            self.tick += 1
            self.keep()
            self._at("boundary")
        return Outcome(self._losses, _hash(self.shared()), self._passes)

    def _loss(self) -> torch.Tensor:
        x = torch.randn(16, 64)
        self._at("forward")
        self._passes += 1
        branch = self._variant == "find_unused_parameters" and self.tick % 2 == 0
        loss: torch.Tensor = (self.ddp(x, branch=branch) - x).pow(2).mean()
        return loss

    def _validate(self) -> None:
        """Collectives of a user's."""
        self.model.eval()
        with torch.no_grad():
            loss = (self.ddp(torch.randn(16, 64), branch=False)).pow(2).mean()
        self.model.train()
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, loss.item())
        self._at("validation")
        best = [min(gathered)] if self.rank == 0 else [None]
        dist.broadcast_object_list(best, 0)
        assert best[0] == min(gathered)
        dist.barrier()
        self._losses.append(best[0])

    def _at(self, place: str) -> None:
        """Where a rank may end."""
        death = self._death
        if death is None or (death.tick, death.place) != (self.tick, place):
            return
        self._death = None
        if place == "backward":
            first = next(self.model.parameters())  # its gradient is the last one
            first.register_post_accumulate_grad_hook(lambda _: self._end(death))
        else:
            self._end(death)

    def _end(self, death: Death) -> None:
        if self._ended:
            return  # a hook stays
        self._ended = True
        if death.end is not None:
            os.kill(os.getpid(), death.end)
        else:
            group.groups["0"]._links.cut("the test cut it")
            self.on_cut()

    def _count_inner(self) -> None:
        """End within an operation: when some number of gloo's have been done."""
        real = ordered.ended

        def ended(work: Any) -> None:
            death = self._death
            if death is not None and self.tick >= death.tick:
                if self._inner == death.after:
                    self._death = None
                    self._end(death)
                self._inner += 1
            real(work)

        ordered.ended = collectives.ended = ended  # type: ignore[assignment]


def _hash(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for each in tensors:
        digest.update(each.detach().numpy().tobytes())
    return digest.hexdigest()


class _Member:
    """What a rank does as its agent says."""

    def __init__(self, talk: comm_lab.Talk, training: Training, store: Any) -> None:
        self._talk, self._training, self._store = talk, training, store
        self.live = threading.Event()
        training.on_cut = lambda: talk.say("cut")
        threading.Thread(target=self._obey, daemon=True).start()

    def _obey(self) -> None:
        while True:
            said = self._talk.hear()
            if said[0] == "hold":
                comm.hold(said[1], said[2], f"ranks {said[2]} are lost")
            else:
                threading.Thread(target=self._join, args=said[1:], daemon=True).start()

    def _join(self, epoch: int, members: list[int], joining: dict[int, int]) -> None:
        try:
            source = min(set(range(len(members))) - set(joining), default=-1)
            whole, new = self._training.keeps_all, self._training.rank in joining
            if joining and not whole and (new or self._training.rank == source):
                tensors = self._training.shared()
                comm.handover(epoch, self._store, tensors, source, list(joining))
            comm.reconfigure(epoch, members, self._store, joining, whole=whole and new)
        except GroupBrokenError:
            self._talk.say("aborted")
        except CommError as error:
            self._talk.say(str(error))
        except Exception:  # noqa: BLE001 - told to the test
            self._talk.say(traceback.format_exc())
        else:
            self._talk.say("back")
            self.live.set()


def train(
    rank: int,
    port: int,
    talk: comm_lab.Talk,
    size: int,
    folder: Path,
    variant: str,
    epoch: int,
    death: Death | None,
) -> Outcome:
    """Train to the end; ``epoch`` is that in which this process comes."""
    comm.mode.replaceable, comm.mode.alone = True, epoch > 0
    with comm_lab.group("mnemo", rank, size, port) as store:
        training = Training(rank, folder, variant, death)
        if epoch:
            training.resume()
            talk.say(training.tick)
        member = _Member(talk, training, store)
        if epoch:
            member.live.wait()
        return training.run()


class Agent:
    """Starts ranks, and new ones for those that are lost."""

    def __init__(
        self,
        world: comm_lab.World,
        size: int,
        folder: Path,
        variant: str = "plain",
        deaths: dict[int, Death] | None = None,
    ) -> None:
        self._world, self._given = world, (size, folder, variant)
        self.epoch = 0
        self._members = [0] * size
        self._ticks: dict[int, int] = {}
        self.ranks = [
            world.start(train, rank, *self._given, 0, (deaths or {}).get(rank))
            for rank in range(size)
        ]

    def hold(self, lost: Sequence[int]) -> None:
        """Tell all others, and start new ones."""
        self.epoch += 1
        for rank, each in enumerate(self.ranks):
            if rank not in lost:
                each.tell(("hold", self.epoch, list(lost)))
        for rank in lost:
            self._members[rank] = self.epoch

    def start(self, rank: int, death: Death | None = None) -> int:
        """The new process of a rank, which says at which boundary it begins."""
        self.ranks[rank] = self._world.start(train, rank, *self._given, self.epoch, death)
        self._ticks[rank] = self.ranks[rank].hear()
        return self._ticks[rank]

    def join(self) -> None:
        """Tell all to go on."""
        for each in self.ranks:
            each.tell(("join", self.epoch, self._members, dict(self._ticks)))

    def answers(self, absent: Sequence[int] = ()) -> list[str]:
        """What became of it on each rank that is there."""
        said = {rank: each.hear() for rank, each in enumerate(self.ranks) if rank not in absent}
        self._ticks = {
            rank: tick
            for rank, tick in self._ticks.items()
            if rank in said and said[rank] != "back"
        }
        return list(said.values())

    def replace(self, lost: Sequence[int], *, gone: bool = True) -> list[str]:
        """All of it, once they are gone; what became of it on each rank."""
        for rank in lost if gone else ():
            self.ranks[rank].join()
        self.hold(lost)
        for rank in lost:
            self.start(rank)
        self.join()
        return self.answers()

    def results(self) -> list[Outcome]:
        """Of all ranks, at the end."""
        return [each.result() for each in self.ranks]


def undisturbed(size: int, folder: Path, variant: str = "plain") -> list[Outcome]:
    """The run that all others are compared with."""
    found: list[Outcome] = comm_lab.run_all(train, size, size, folder, variant, 0, None)
    assert len({each.hashed for each in found}) == 1
    return found


def same(found: list[Outcome], expected: list[Outcome]) -> None:
    """See that two runs are the same to the last bit."""
    assert [each.hashed for each in found] == [each.hashed for each in expected]
    assert [each.losses for each in found] == [each.losses for each in expected]
