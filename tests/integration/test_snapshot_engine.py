"""Snapshots through a real snapshot process: captured, copied behind the training, restored."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import smp_lab
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemo.errors import IntegrityError
from mnemo.session.sources import MemorySource
from mnemo.smp import messages as m
from mnemo.smp import segment
from mnemo.smp.link import Link
from mnemo.smp.segment import CHUNK, PAGE
from mnemo.snapshot import engine as engine_module
from mnemo.snapshot.engine import SnapshotEngine
from mnemo.snapshot.layout import Share
from mnemo.snapshot.listing import join_module_state, module_state
from mnemo.snapshot.restore import Source, read_state
from mnemo.transport import auth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mnemo.smp.paths import RunPaths

BIG = 3 * CHUNK // 4 + 5
"""Elements of a float32 tensor that spans several chunks and ends within one."""


@dataclass
class Trainer:
    """One rank with its engine."""

    link: Link
    engine: SnapshotEngine
    rank: int
    secret: bytes
    events: list[tuple[str, str]]

    def take(self, tick: int, state: object, **more: Any) -> None:
        """Take a generation and wait until it is sealed or given up."""
        self.engine.capture(tick, tick * 10, state, {"step": tick * 10}, **more)
        assert self.engine.finish(30.0)

    def newest(self, below: int = 0) -> tuple[int, Any] | None:
        """Tick and state of the newest committed generation."""
        fetched, fds = self.link.ask(m.Fetch(below), m.Fetched)
        if fetched.generation is None:
            return None
        try:
            found = [Source.of_fd(fd) for fd in fds]
            sources = {source.meta.rank: source for source in found}
            return fetched.generation.tick, read_state(sources, self.rank, self.secret)
        finally:
            for fd in fds:
                os.close(fd)

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]


@dataclass
class Lab:
    """A run and its ranks, all in this process."""

    paths: RunPaths
    trainers: list[Trainer] = field(default_factory=list)

    def trainer(
        self, rank: int = 0, members: int = 1, share: Share | None = None, **more: Any
    ) -> Trainer:
        events: list[tuple[str, str]] = []
        link = Link(
            self.paths,
            m.Join(0, rank, members, 60.0),
            on_loss=lambda words: events.append(("lost", words)),
        )
        secret = auth.load_or_create_secret(self.paths.secret)
        engine = SnapshotEngine(
            link,
            share or Share(0, 1),
            rank=rank,
            secret=secret,
            identity={"model": "m"},
            on_event=lambda kind, words: events.append((kind, words)),
            **more,
        )
        self.trainers.append(Trainer(link, engine, rank, secret, events))
        return self.trainers[-1]

    def replicas(self, count: int) -> list[Trainer]:
        return [self.trainer(r, count, Share(r, count)) for r in range(count)]


@pytest.fixture
def lab() -> Iterator[Lab]:
    with smp_lab.run_directory() as paths:
        made = Lab(paths)
        try:
            yield made
        finally:
            for trainer in made.trainers:
                trainer.engine.close()
                trainer.link.close()


@pytest.fixture
def during_copy(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Have something done, once, when half of the lazily copied chunks are copied."""

    def once(action: Callable[[], None]) -> None:
        waiting = [action]

        def reach(phase: str, **_: Any) -> None:
            if phase == "mid_copy" and waiting:
                waiting.pop()()

        monkeypatch.setattr(engine_module.faults, "reach", reach)

    return once


def same(one: Any, other: Any) -> bool:
    """Equal to the bit, NaN payloads and all."""
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and (one.dtype, one.shape) == (other.dtype, other.shape)
            and bits(one) == bits(other)
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())


def copied(state: Any) -> Any:
    """A copy that shares no memory."""
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {k: copied(v) for k, v in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(copied(v) for v in state)
    return state


def noise(count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A 1-D tensor of any bits, so of NaN with payloads, infinities, denormals."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, (count,), generator=generator).bool()
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (count * size,), generator=generator, dtype=torch.uint8).view(
        dtype
    )


DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.bool,
    torch.uint8,
    torch.int64,
    torch.complex64,
    torch.complex128,
]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 1000))
    kind = draw(
        st.sampled_from(
            ["plain", "big", "scalar", "empty", "transposed", "strided", "expanded", "channels"]
        )
    )
    if kind == "scalar":
        return noise(1, dtype, seed)[0]
    if kind == "empty":
        return noise(0, dtype, seed).reshape(draw(st.sampled_from([(0,), (3, 0), (0, 2, 1)])))
    if kind == "big":
        return noise(draw(st.integers(20_000, 200_000)), dtype, seed)
    rows = draw(st.sampled_from([3, 7, 257]))
    base = noise(rows * 4 * 5 * 6, dtype, seed)
    if kind == "transposed":
        return base.reshape(rows * 20, 6).t()
    if kind == "strided":
        return base[1::3]
    if kind == "expanded":
        return base[:rows].reshape(rows, 1).expand(rows, 5)
    if kind == "channels":
        return base.reshape(rows, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    return base.reshape(rows, -1)


LEAVES = st.one_of(
    tensors(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5), st.none()
)
STATES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.text(max_size=4), st.integers()), inner, max_size=4),
        st.tuples(inner, inner),
    ),
    max_leaves=8,
)


def test_any_state_comes_back_to_the_bit(lab: Lab) -> None:
    trainer = lab.trainer()
    ticks = iter(range(1, 10_000))

    @given(state=STATES, volatile=st.booleans())
    @settings(max_examples=60, deadline=None, derandomize=True)
    def check(state: Any, volatile: bool) -> None:
        tick = next(ticks)
        pointers = {t.data_ptr() for t in tensors_of(state)} if volatile else set()
        trainer.take(tick, {"state": state}, volatile=pointers)
        assert trainer.events == []
        found = trainer.newest()
        assert found is not None
        assert found[0] == tick
        assert same(found[1], {"state": state})

    check()


def tensors_of(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from tensors_of(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from tensors_of(value)


def test_what_changes_between_two_snapshots_is_in_the_second(lab: Lab) -> None:
    """Views of each kind over memory that is written in place, as by an optimizer."""
    trainer = lab.trainer()
    base = torch.arange(60_000, dtype=torch.float32)
    image = torch.randn(40, 8, 16, 16).contiguous(memory_format=torch.channels_last)
    state = {
        "whole": base,
        "half": base[:30_000],
        "strided": base[::2],
        "columns": base.reshape(300, 200)[:, :50],
        "expanded": base[:3].reshape(3, 1).expand(3, 9000),
        "turned": base.reshape(300, 200).t(),
        "image": image,
        "small": base[:10],
        "scalar": base[7],
    }
    for tick in range(1, 5):
        base.add_(tick)
        image.mul_(1.5)
        expected = copied(state)
        trainer.take(tick, state)
        found = trainer.newest()
        assert found is not None
        assert same(found[1], expected), [k for k in state if not same(found[1][k], expected[k])]
    assert found[1]["image"].is_contiguous(memory_format=torch.channels_last)
    assert trainer.events == []


def test_tied_weights_are_stored_once_and_stay_tied(lab: Lab) -> None:
    trainer = lab.trainer()
    weight = torch.nn.Parameter(torch.randn(BIG))
    trainer.take(1, {"embedding": weight, "head": weight, "again": weight.detach()})
    found = trainer.newest()
    assert found is not None
    assert found[1]["embedding"] is found[1]["head"]
    assert same(found[1]["head"], weight)
    _, fds = trainer.link.ask(m.Fetch(), m.Fetched)
    assert segment.read_header(fds[0]).bulk_size < 1.1 * BIG * 4 + CHUNK
    os.close(fds[0])


# --- sharding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 4])
def test_replicas_share_the_copying(lab: Lab, count: int) -> None:
    trainers = lab.replicas(count)
    weights = [torch.randn(BIG), torch.randn(17), torch.randn(2 * BIG)]
    for tick in (1, 2, 3):
        weights[0].add_(1)
        for t in trainers:
            mine = {"w": weights, "rng": torch.full((3,), t.rank), "rank": t.rank}
            t.take(tick, mine)
        for t in trainers:
            found = t.newest()
            assert found is not None
            assert found[0] == tick
            assert same(found[1], {"w": weights, "rng": torch.full((3,), t.rank), "rank": t.rank})
    total = sum(s["bytes"] for s in lab_status(trainers[0])["segments"])
    assert total < 2 * (3 * BIG * 4 + 2 * count * CHUNK), "each keeps a whole copy"
    assert all(t.events == [] for t in trainers)


def lab_status(trainer: Trainer) -> dict[str, Any]:
    import msgspec

    reply, _ = trainer.link.ask(m.Status(), m.StatusReply)
    found: dict[str, Any] = msgspec.json.decode(reply.body)["fits"][0]
    return found


def test_replicas_that_differ_turn_sharding_off(lab: Lab) -> None:
    trainers = lab.replicas(2)
    weights = [{"a": torch.zeros(BIG), "b": torch.zeros(BIG)} for _ in range(2)]
    weights[1]["b"][7] = 1.0
    for tick in range(1, 5):
        for t, weight in zip(trainers, weights, strict=True):
            t.take(tick, weight)
        if tick == 1:
            assert trainers[0].newest() is None, "a mixture of the two would be restored"
    words = " ".join(words for t in trainers for _, words in t.events)
    assert "rank 0 differs from rank 1 in a or b: from now on every rank keeps a whole" in words
    for t, weight in zip(trainers, weights, strict=True):
        found = t.newest()
        assert found is not None
        assert found[0] == 4
        assert same(found[1], weight)


def test_another_ranks_damaged_part_is_noticed(lab: Lab) -> None:
    trainers = lab.replicas(2)
    weights = {"a": torch.randn(2 * BIG)}
    for tick in (1, 2):
        for t in trainers:
            t.take(tick, weights)
    _, fds = trainers[0].link.ask(m.Fetch(), m.Fetched)
    os.close(fds[0])
    damage(fds[1], 777)
    for t in trainers:
        with pytest.raises(IntegrityError, match="rank 1's snapshot of step 20 fails its checksum"):
            t.newest()
        older = t.newest(below=2)
        assert older is not None
        assert same(older[1], weights)


def damage(fd: int, place: int) -> None:
    """Flip a byte of the bulk; closes ``fd``."""
    before = os.pread(fd, 1, PAGE + place)
    os.pwrite(fd, bytes([before[0] ^ 1]), PAGE + place)
    os.close(fd)


def test_the_generation_before_a_damaged_one_is_used(lab: Lab) -> None:
    trainer = lab.trainer()
    for tick in (1, 2):
        trainer.take(tick, {"w": torch.full((BIG,), float(tick))})
    _, fds = trainer.link.ask(m.Fetch(), m.Fetched)
    damage(fds[0], 1000)
    found = MemorySource(trainer.link, 0, trainer.secret).newest(None, -1)
    assert found is not None
    assert (found.tick, found.step) == (1, 10)
    assert same(found.state, {"w": torch.ones(BIG)})


def test_small_state_under_another_secret_is_refused(lab: Lab) -> None:
    trainer = lab.trainer()
    trainer.take(1, {"w": torch.zeros(3), "x": 1})
    trainer.secret = bytes(32)
    with pytest.raises(IntegrityError, match="fails its MAC"):
        trainer.newest()


# --- the window -----------------------------------------------------------------------------------


@pytest.mark.parametrize("through_data", [False, True])
def test_a_tensor_written_while_it_is_copied_voids_that_snapshot(
    lab: Lab, during_copy: Callable[[Callable[[], None]], None], through_data: bool
) -> None:
    """At once from then on, it may be written in every window."""
    trainer = lab.trainer(verify=True)
    state = {"averaged": torch.zeros(BIG), "w": torch.ones(BIG)}
    trainer.take(1, state)

    def write() -> None:
        target = state["averaged"].data if through_data else state["averaged"]
        target.add_(1.0)

    during_copy(write)
    trainer.take(2, state)
    found = trainer.newest()
    assert found is not None
    assert found[0] == 1, "a torn snapshot counts"
    assert trainer.engine.counters.torn == 1
    assert any("averaged" in words and "copied at once" in words for _, words in trainer.events)
    for tick in (3, 4):
        expected = copied(state)
        during_copy(write)
        trainer.take(tick, state)
        found = trainer.newest()
        assert found is not None
        assert found[0] == tick
        assert same(found[1], expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_parameters_that_are_not_finite_never_replace_those_that_are(
    lab: Lab, value: float
) -> None:
    trainer = lab.trainer()
    state = {"model": {"w": torch.zeros(BIG)}, "seen": torch.full((BIG,), math.inf)}
    trainer.take(1, state, watch=("model",))
    state["model"]["w"][BIG // 2 :] = value
    trainer.take(2, state, watch=("model",))
    found = trainer.newest()
    assert found is not None
    assert found[0] == 1
    assert trainer.engine.counters.suspect == 1
    assert trainer.kinds() == ["suspect"]
    state["model"]["w"].fill_(3e38)  # finite, though their sum is not
    trainer.take(3, state, watch=("model",))
    assert trainer.newest() is not None
    assert trainer.engine.committed == m.Generation(3, 30)


@pytest.mark.parametrize("drop", [False, True])
def test_an_update_that_comes_before_the_copy_is_done(
    lab: Lab, during_copy: Callable[[Callable[[], None]], None], drop: bool
) -> None:
    trainer = lab.trainer(drop_on_overrun=drop)
    state = {"w": torch.zeros(4 * BIG)}
    trainer.take(1, state)
    copying, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        copying.set()
        go_on.wait(10)

    during_copy(hold)
    trainer.engine.capture(2, 20, state, {"step": 20})
    assert copying.wait(10)
    timer = threading.Timer(0.1, go_on.set)
    timer.start()
    stalled = trainer.engine.before_update()
    assert go_on.is_set(), "the tensors may be written while they are copied"
    state["w"].add_(1)
    timer.join()
    assert stalled > 0.01
    assert trainer.engine.finish(10)
    found = trainer.newest()
    assert found is not None
    assert found[0] == (1 if drop else 2)
    assert same(found[1], {"w": torch.zeros(4 * BIG)})
    assert trainer.engine.counters.dropped == int(drop)
    trainer.take(3, state)
    assert trainer.engine.committed == m.Generation(3, 30)


def test_a_buffer_that_does_not_become_free_stops_no_training(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank has stopped sealing: this one gives snapshots up and goes on."""
    monkeypatch.setattr(engine_module, "GRANT_LIMIT_S", 0.05)
    first, second = (lab.trainer(r, 2) for r in range(2))
    state = {"w": torch.zeros(BIG)}
    for trainer in (first, second):
        trainer.take(1, state)
    first.take(2, state)
    begun = time.perf_counter()
    for tick in range(3, 20):
        first.engine.capture(tick, tick * 10, state, {})
        first.engine.before_update()
        state["w"].add_(1)
    assert time.perf_counter() - begun < 5
    assert first.engine.counters.dropped >= 16
    second.take(20, state)
    assert first.engine.finish(10)
    first.take(20, state)
    found = first.newest()
    assert found is not None
    assert found[0] == 20
    assert same(found[1], state)


# --- the snapshot process goes away ---------------------------------------------------------------


def test_it_is_killed_in_mid_copy(
    lab: Lab, during_copy: Callable[[Callable[[], None]], None]
) -> None:
    """The training thread never raises, the committed generation stays, later ones follow."""
    trainer = lab.trainer()
    state = {"w": torch.zeros(BIG)}
    trainer.take(1, state)
    old = trainer.link.smp_pid

    def kill() -> None:
        os.kill(old, signal.SIGKILL)
        smp_lab.wait_for_exit(old)

    during_copy(kill)
    board = trainer.link.board
    trainer.take(2, state)
    board.request_stop()
    assert board is trainer.link.board
    assert board.stop_requested()
    assert trainer.link.smp_pid != old
    assert sorted(trainer.kinds()) == ["lost", "snapshot failed"]
    found = trainer.newest()
    assert found is not None
    assert same(found[1], state)
    for tick in (3, 4, 5):
        state["w"].add_(1)
        trainer.take(tick, state)
        assert trainer.engine.committed == m.Generation(tick, tick * 10)
    found = trainer.newest()
    assert found is not None
    assert same(found[1], state)


def test_it_is_killed_between_two_snapshots(lab: Lab) -> None:
    trainer = lab.trainer()
    state = {"w": torch.zeros(BIG)}
    for tick in range(1, 7):
        if tick % 3 == 0:
            with contextlib.suppress(ProcessLookupError):
                os.kill(trainer.link.smp_pid, signal.SIGKILL)
                smp_lab.wait_for_exit(trainer.link.smp_pid)
        trainer.take(tick, state)
    assert trainer.engine.counters.failed == 2
    found = trainer.newest()
    assert found is not None
    assert found[0] == 5


# --- the layout changes ---------------------------------------------------------------------------


def test_optimizer_state_that_appears_later(lab: Lab) -> None:
    trainer = lab.trainer()
    model = torch.nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(model.parameters())
    for tick in range(1, 5):
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        expected = copied(state)
        trainer.take(tick, state)
        found = trainer.newest()
        assert found is not None
        assert same(found[1], expected)
        trainer.engine.before_update()
        model(torch.ones(1, 300)).sum().backward()
        optimizer.step()
    assert trainer.events == []
    smp_memory = smp_lab.memory_of(trainer.link.smp_pid)
    assert smp_memory < 2.5 * 3 * 4 * 90_300 + 4 * CHUNK, "buffers of the old layout are kept"


def test_tensors_that_move_are_found(lab: Lab) -> None:
    trainer = lab.trainer()
    for tick in range(1, 5):
        state = {"w": torch.full((BIG,), float(tick)), "b": torch.full((5,), float(tick))}
        trainer.take(tick, state)
        found = trainer.newest()
        assert found is not None
        assert same(found[1], state)


def test_parameters_that_change_type_memory_or_shape_are_followed(lab: Lab) -> None:
    trainer = lab.trainer()
    model = torch.nn.Sequential(torch.nn.Linear(40, 300), torch.nn.Linear(300, 40))

    def check(tick: int) -> None:
        trainer.take(tick, {"model": module_state(model)})
        found = trainer.newest()
        assert found is not None
        assert found[0] == tick
        assert same(join_module_state(found[1]["model"]), dict(model.state_dict()))

    check(1)
    for parameter in model.parameters():
        parameter.data = parameter.data + 1
    check(2)
    model.double()
    check(3)
    model[0].weight.data = model[0].weight.data.t().contiguous()
    check(4)
    assert trainer.events == []
    model[1].weight.data = model[1].weight.data.t()  # where it was
    trainer.take(5, {"model": module_state(model)})
    assert trainer.kinds() == ["snapshot failed"]
    assert "1.weight has another shape" in trainer.events[0][1]
    check(6)
