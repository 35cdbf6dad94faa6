"""Nodes, Stores and a network between them in simulated time: anything may be slow, cut or dead."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mnemo.errors import StoreLostError
from mnemo.membership import Epoch, Machine, Member, Rules, Seal
from mnemo.membership.plan import is_quorum
from mnemo.membership.records import HEAD, Head, State
from mnemo.membership.store import Add, Answer, CompareSet, Get, Host, Op, Set

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator

SEAL = Seal(b"s" * 32, "run")
PATIENCE_S = 1.0
"""How long a node waits for an answer."""
ETCD = "etcd"


class MemoryStore:
    """A Store without any network."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.counts: dict[str, int] = {}

    def apply(self, op: Op) -> Answer:
        if isinstance(op, Get):
            return tuple(self._value(key) for key in op.keys)
        if isinstance(op, Set):
            self.values[op.key] = op.value
            return None
        if isinstance(op, Add):
            self.counts[op.key] = self.counts.get(op.key, 0) + 1
            return self.counts[op.key]
        assert isinstance(op, CompareSet)
        if self.values.get(op.key) == op.expected:
            self.values[op.key] = op.value
        return self.values.get(op.key)

    def _value(self, key: str) -> bytes | None:
        if key in self.counts:
            return str(self.counts[key]).encode()
        return self.values.get(key)


@dataclass(eq=False)
class Node:
    """One agent with its workers."""

    name: str
    machine: Machine
    offset: float
    rate: float
    is_alive: bool = True
    workers: Epoch | None = None
    is_stopping: bool = False
    asleep_until: float = 0.0
    turn: int = 0
    began: float = 0.0

    @property
    def key(self) -> str:
        return self.machine.me.key


@dataclass(eq=False)
class World:
    """All of it."""

    rules: Rules
    random: random.Random
    now: float = 0.0
    nodes: list[Node] = field(default_factory=list)
    stores: dict[str, MemoryStore] = field(default_factory=dict)
    cuts: set[tuple[str, str]] = field(default_factory=set)
    slowness: float = 1.0
    latency: dict[str, float] = field(default_factory=dict)
    """Seconds that all takes besides, each way, from and to a node."""
    decided: dict[int, tuple[str, ...]] = field(default_factory=dict)
    newest: Epoch | None = None
    ran: set[int] = field(default_factory=set)
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _serial: Iterator[int] = field(default_factory=itertools.count)

    # --- what happens to it -------------------------------------------------------------------

    @property
    def first_place(self) -> str:
        return ETCD if self.rules.arbiter else "a"

    def start(self, name: str, *, alone: bool = False) -> Node:
        """An agent on the node ``name``, which has none; ``alone`` it knows the first place only.

        At that place it hosts a Store then, of a lower ballot than the one that was there.
        """
        assert not any(node.is_alive and node.name == name for node in self.nodes)
        incarnation = "-" * alone + str(sum(node.name == name for node in self.nodes))
        store = "" if self.rules.arbiter else name
        me = Member(name, incarnation, name, store)
        rate = self.random.uniform(0.991, 1.009)
        offset = self.random.uniform(-1e6, 1e6)
        others = () if self.rules.arbiter or alone else (n.name for n in self.nodes)
        places = (self.first_place, *others)
        machine = Machine(me, SEAL, self.rules, places, offset + self.now * rate)
        node = Node(name, machine, offset, rate)
        if not self.nodes or (alone and name == self.first_place):
            self.stores[self.first_place] = MemoryStore()
        self.nodes.append(node)
        self._later(self.random.uniform(0, self.rules.beat_s), lambda: self._begin(node))
        return node

    def kill(self, node: Node) -> None:
        """A node is gone, with its workers, and with the Store if it hosts it."""
        node.is_alive, node.workers = False, None
        self.stores.pop(node.name, None)

    def run(self, seconds: float, *, until: Callable[[], bool] = lambda: False) -> bool:
        """Let time pass; whether ``until`` became true."""
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            self.now, _, act = heapq.heappop(self._events)
            act()
            if until():
                return True
        self.now = end
        return until()

    def living(self) -> list[Node]:
        return [node for node in self.nodes if node.is_alive]

    def is_running(self) -> bool:
        """Whether the job goes on, with everybody that it needs."""
        running = [node for node in self.living() if node.workers and not node.is_stopping]
        return len(running) == self.rules.nodes

    def can_decide(self) -> bool:
        """Whether a quorum lives of what was decided, as far as anybody knows or not."""
        keys = {node.key for node in self.living()}
        machines = [node.machine for node in self.living()]
        known = [m.committed for m in machines if m.committed and m._is_in(m.committed)]
        if self.newest is None or not known:
            return False
        last = max(known, key=lambda epoch: epoch.number)
        agreed = [node.machine._accepted for node in self.living()]
        epochs = [self.newest, last, *(e for e in agreed if e and e.number > last.number)]
        return self.rules.arbiter or all(is_quorum(epoch, keys) for epoch in epochs)

    # --- a node -------------------------------------------------------------------------------

    def _later(self, delay: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._serial), act))

    def _local(self, node: Node) -> float:
        return node.offset + self.now * node.rate

    def _begin(self, node: Node) -> None:
        if not self._is_awake(node, lambda: self._begin(node)):
            return
        node.began = self.now
        op = node.machine.begin(self._local(node))
        self._observe(node)
        self._go_on(node, op)

    def _go_on(self, node: Node, op: Op | None) -> None:
        node.turn += 1
        if op is None:
            pause = self.rules.beat_s * self.random.uniform(0.9, 1.1) - (self.now - node.began)
            self._later(max(0.001, pause), lambda: self._begin(node))
            return
        turn = node.turn

        def answered(answer: Answer | StoreLostError) -> None:
            if node.turn != turn:
                return  # too late
            if not self._is_awake(node, lambda: answered(answer)):
                return
            following = node.machine.answer(answer, self._local(node))
            self._observe(node)
            self._go_on(node, following)

        self._send(node, op, answered)

    def _is_awake(self, node: Node, act: Callable[[], None]) -> bool:
        if node.is_alive and node.asleep_until > self.now:
            self._later(node.asleep_until - self.now, act)
            return False
        return node.is_alive

    def sleep(self, node: Node, seconds: float) -> None:
        """A node does nothing for a while, its workers included.

        If it is too late when it wakes up, they are killed before they do anything: that they are
        not in reality is one of the limits in ``docs/membership.md``.
        """
        node.asleep_until = max(node.asleep_until, self.now + seconds)
        self._later(node.asleep_until - self.now, lambda: self._wake(node))

    def _wake(self, node: Node) -> None:
        if node.is_alive and node.asleep_until <= self.now:
            node.machine.tick(self._local(node))
            if node.machine.running is None and node.workers is not None:
                self._stopped(node)

    # --- the network --------------------------------------------------------------------------

    def _delay(self, here: str, there: str) -> float:
        wire = 0.0 if here == there else self.latency.get(here, 0) + self.latency.get(there, 0)
        if self.random.random() < 0.01 * self.slowness:
            return wire + self.random.uniform(0, 8)  # sent again and again
        return wire + self.random.expovariate(200) * self.slowness

    def _send(
        self, node: Node, op: Op, answered: Callable[[Answer | StoreLostError], None]
    ) -> None:
        if isinstance(op, Host):
            assert op.place == node.name
            self.stores[op.place] = MemoryStore()
            self._later(0.05, lambda: answered(None))
            return
        store = self.stores.get(op.place)
        lost = StoreLostError("no answer")
        if store is None or (node.name, op.place) in self.cuts:
            self._later(PATIENCE_S if store else 0.01, lambda: answered(lost))
            return

        def arrive() -> None:
            if self.stores.get(op.place) is not store or (node.name, op.place) in self.cuts:
                return
            host = next((n for n in self.living() if n.name == op.place), None)
            if host and host.asleep_until > self.now:
                self._later(host.asleep_until - self.now, arrive)
                return
            answer = store.apply(op)
            self._read_states(op)
            if (op.place, node.name) not in self.cuts:
                self._later(self._delay(op.place, node.name), lambda: answered(answer))

        self._later(self._delay(node.name, op.place), arrive)
        self._later(PATIENCE_S, lambda: answered(lost))

    # --- what has to hold ---------------------------------------------------------------------

    def _observe(self, node: Node) -> None:
        """The machine may have decided something: have its workers follow."""
        machine, running = node.machine, node.machine.running
        if machine.committed is not None:
            self._has_decided(machine.committed)
        if running is None:
            if node.workers is not None and not node.is_stopping:
                node.is_stopping = True
                self._later(self.random.uniform(0, self.rules.stop_s), lambda: self._stopped(node))
        else:
            if node.workers is None:
                node.workers = running
                self.ran.add(running.number)
                self._check()
            assert node.workers == running, "an epoch began before the one before had ended"
            left = max(0.0, machine.run_until - self._local(node)) / node.rate
            self._later(left + 1e-6, lambda: self._fence(node))

    def _fence(self, node: Node) -> None:
        if self._is_awake(node, lambda: self._fence(node)):
            node.machine.tick(self._local(node))
            if node.machine.running is None:
                self._observe(node)

    def _stopped(self, node: Node) -> None:
        if node.is_alive and node.workers is not None and node.machine.running is None:
            node.workers, node.is_stopping = None, False
            node.machine.stopped(self._local(node))

    def _check(self) -> None:
        """Whatever runs at one instant runs under one epoch, and belongs to it."""
        active = [n for n in self.living() if n.workers and n.asleep_until < self.now]
        epochs = {node.workers for node in active if node.workers}
        numbers = sorted((e.number, [m.key for m in e.members]) for e in epochs)
        assert len(epochs) <= 1, f"{self.now}: several sides go on: {numbers}"
        for node in active:
            assert node.workers is not None
            assert node.workers.rank_of(node.key) is not None, f"{node.key} is no member"
            assert not node.workers.hollow

    def _read_states(self, op: Op) -> None:
        store = self.stores[op.place]
        if isinstance(op, CompareSet) and op.key == HEAD in store.values:
            head = SEAL.unwrap(HEAD, store.values[HEAD], Head)
            if head.state:
                state = SEAL.unwrap(head.state, store.values[head.state], State)
                if state.committed:
                    self._has_decided(state.committed)

    def _has_decided(self, epoch: Epoch) -> None:
        """An epoch's number has one membership, ever."""
        members = tuple(member.key for member in epoch.members)
        assert self.decided.setdefault(epoch.number, members) == members, f"epoch {epoch.number}"
        if self.newest is None or epoch.number > self.newest.number:
            self.newest = epoch
