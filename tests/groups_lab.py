"""Groups of members without sockets: what they say to their leader arrives when a test lets it.

Leader, members and what they keep are the real ones. Bytes do not travel: a member's part of an
attempt is done when the test says so.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections import Counter, deque
from contextlib import suppress
from typing import TYPE_CHECKING

from mnemo.erasure.codec import codec
from mnemo.erasure.stripes import Group
from mnemo.errors import PeerLostError
from mnemo.protect import Piece, Shard, leader, member
from mnemo.protect.keeping import Keeping
from mnemo.protect.leader import Follower, Leader
from mnemo.protect.member import Member
from mnemo.protect.messages import Protected
from mnemo.protect.shard import Fragments
from mnemo.transport.address import Address
from mnemo.transport.peer import Rules

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    import pytest

    from mnemo.protect.attempt import Work
    from mnemo.protect.messages import FromLeader, FromMember

BUFFERS = 3
PAGE = 4096
NEVER_S = 1e9
ROUNDS = 1000
TURNS = 30
"""Of the loop, in which all that can be done without the test is done."""


class Parities:
    """Memory that is none."""

    async def take(self, size: int) -> int:
        del size
        return -1

    def give_back(self, fd: int) -> None:
        pass

    def close(self) -> None:
        pass


class Holdings:
    """A node's segments: as many as there are buffers, the oldest that nobody needs overwritten."""

    def __init__(self) -> None:
        self.lives: dict[int, int] = {}
        """Tick to the life that it was taken in."""
        self.pins: Counter[int] = Counter()
        self._fd = os.memfd_create("lab")
        os.truncate(self._fd, PAGE)

    def commit(self, tick: int, life: int) -> None:
        """Have a generation, if there is a buffer for it."""
        held = sorted(self.lives)
        while len(held) >= BUFFERS:
            free = [old for old in held[:-1] if not self.pins[old]]
            if not free:
                return
            held.remove(free[0])
            del self.lives[free[0]]
        self.lives[tick] = life

    def forget_after(self, tick: int) -> None:
        self.lives = {held: life for held, life in self.lives.items() if held <= tick}

    def ticks(self) -> dict[int, int]:
        return {tick: 10 * tick for tick in self.lives}

    def pin(self, tick: int) -> Shard | None:
        if tick not in self.lives:
            return None
        self.pins[tick] += 1
        return Shard([Piece(0, PAGE, 0)], [self._fd])

    def unpin(self, tick: int) -> None:
        self.pins[tick] -= 1

    def allocate(self, size: int) -> int:
        raise NotImplementedError

    def close(self) -> None:
        os.close(self._fd)


class Node:
    """One node; its connection to the leader is a queue each way."""

    def __init__(self, name: str, group: Group, world: World) -> None:
        self.name, self.group, self.world = name, group, world
        self.holdings = Holdings()
        self.up: deque[FromMember] = deque()
        self.down: deque[FromLeader] = deque()
        self.work: tuple[int, asyncio.Future[None]] | None = None
        """Epoch of the attempt that bytes are travelling for, and what ends that."""
        self.follower: Follower | None = None
        self._tell: Callable[[FromLeader], None] | None = None
        self._task: asyncio.Task[None] | None = None
        self.begin()

    # What `Member` wants of `Neighbours`.
    address = Address("127.0.0.1", 1)
    rules = Rules()

    def moved(self, node: str, address: Address) -> None:
        pass

    def begin(self) -> None:
        """A new snapshot process, which keeps nothing yet."""
        self.holdings.pins.clear()
        self.keeping = Keeping(self.holdings, self.name)  # type: ignore[arg-type]
        self.keeping.parities = Parities()  # type: ignore[assignment]
        self.member = Member(
            0,
            self.group,
            self,  # type: ignore[arg-type]
            self.keeping,
            codec(self.group.code),
        )

    @property
    def is_connected(self) -> bool:
        return self._task is not None

    def connect(self) -> None:
        self._task = self.world.loop.create_task(self.member.follow_here(self))  # type: ignore[arg-type]
        self.world.turn()

    def hang_up(self) -> None:
        """What is on its way is lost; the member lets go of its attempt, the leader of it."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        with suppress(asyncio.CancelledError):
            self.world.loop.run_until_complete(task)
        self.up.clear()
        self.down.clear()
        assert self.follower is not None
        self.world.leader.part(self.follower)
        self.world.turn()

    # What `Member` wants of `Leader`.
    def join(self, name: str, tell: Callable[[FromLeader], None]) -> Follower:
        self._tell = tell
        self.follower = self.world.leader.join(name, self._hear_of)
        return self.follower

    def hear(self, follower: Follower, message: FromMember) -> None:
        del follower
        self.up.append(message)

    def _hear_of(self, message: FromLeader) -> None:
        self.world.note(message)
        self.down.append(message)

    def say(self) -> bool:
        """The next word to the leader arrives; False if there is none."""
        if not self.up:
            return False
        assert self.follower is not None
        self.world.leader.hear(self.follower, self.up.popleft())
        self.world.turn()
        return True

    def listen(self) -> bool:
        """The next word of the leader arrives; False if there is none."""
        if not self.down:
            return False
        assert self._tell is not None
        self._tell(self.down.popleft())
        self.world.turn()
        return True

    def finish(self, *, well: bool = True) -> bool:
        """Its part of an attempt is done, as soon as all of its group have begun theirs."""
        if self.work is None:
            return False
        epoch, done = self.work
        mates = [node for node in self.world.nodes if node.group is self.group]
        if well and not all(
            epoch in mate.keeping or (mate.work and mate.work[0] == epoch) for mate in mates
        ):
            return False
        if well:
            done.set_result(None)
        else:
            done.set_exception(PeerLostError(self.name, "the test wants it so"))
        self.world.turn()
        return True

    async def travel(self, work: Work) -> None:
        """In the place of `mnemo.protect.attempt.protect`."""
        plan, epoch = work.plan, work.plan.generation.epoch
        for stripe in range(len(plan.group.nodes)):
            digests = bytes([1]) * plan.digest_bytes(stripe)
            work.fragments.take_table(stripe, memoryview(digests))
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.work = (epoch, done)
        try:
            await done
        finally:
            if self.work == (epoch, done):
                self.work = None

    def close(self) -> None:
        self.hang_up()
        self.keeping.close()
        self.holdings.close()


class World:
    """A run of several groups, which asserts at every instant what it promises.

    Args:
        groups: How many.
        data: Of each group's nodes, as many as have to be left.
        parities: The others.
        patch: Puts the lab in the place of what sends bytes, and of time.
    """

    def __init__(self, groups: int, data: int, parities: int, patch: pytest.MonkeyPatch) -> None:
        names = [f"node{i}" for i in range(groups * (data + parities))]
        self.groups = [Group(tuple(names[i::groups]), parities) for i in range(groups)]
        self.loop = asyncio.new_event_loop()
        self.replaced: set[str] = set()
        """Nodes whose snapshot process died alone since something was protected last."""
        self.protected = -1
        """Newest epoch that was."""
        self.tick, self.life = 0, 1
        self.resuming: dict[str, int] = {}
        """Nodes that have not gone back yet, and to which tick they will."""
        patch.setattr(leader, "RETRY_S", 0.0)
        patch.setattr(leader, "_AHEAD_S", NEVER_S)

        async def travel(work: Work) -> None:
            group, position = work.plan.group, work.fragments.position
            await self.node(group.nodes[position]).travel(work)

        patch.setattr(member, "protect", travel)
        self._lead()
        self.nodes = [Node(name, group, self) for group in self.groups for name in group.nodes]
        for node in self.nodes:
            node.connect()

    def _lead(self) -> None:
        self.leader = Leader(self.groups, 1 << 20, NEVER_S)
        self._leads = self.loop.create_task(self.leader.run())

    def node(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    def turn(self) -> None:
        """Everybody does what they can."""

        async def pause() -> None:
            for _ in range(TURNS):
                await asyncio.sleep(0)

        self.loop.run_until_complete(pause())

    def note(self, message: FromLeader) -> None:
        """The leader speaks: is it the first word of another protected generation?"""
        if isinstance(message, Protected) and message.epoch > self.protected:
            self.protected = message.epoch
            self.replaced.clear()

    # --- what happens -------------------------------------------------------------------------

    def commit(self, late: Collection[str] = ()) -> None:
        """All nodes take the next generation, those that are ``late`` without a buffer for it."""
        if self.resuming:
            return
        self.tick += 1
        for node in self.nodes:
            if node.name not in late:
                node.holdings.commit(self.tick, self.life)
                node.member.look()
        self.turn()

    def go_on(
        self,
        names: Collection[str] | None = None,
        *,
        deaf: Collection[str] = (),
        stuck: Collection[str] = (),
    ) -> None:
        """All words of and to some nodes, or all, arrive, and what they send; until all is done.

        Nothing arrives at those that are ``deaf``, and what those send that are ``stuck`` does not.
        """
        some = [node for node in self.nodes if names is None or node.name in names]
        for _ in range(ROUNDS):
            moved = [
                node.say()
                or (node.name not in deaf and node.listen())
                or (node.name not in stuck and node.finish())
                for node in some
            ]
            if not any(moved):
                return
        raise AssertionError("they go on for ever")

    def replace_process(self, name: str) -> None:
        """A snapshot process dies alone; its ranks hand their segments to the next."""
        node = self.node(name)
        self.replaced.add(name)
        if len(self.replaced) == len(self.nodes):  # nobody knows of any epoch
            self.protected = -1
        self._end(node)
        node.begin()
        if self._is_leader(node):
            self._change_leader()
        for each in self.nodes:
            if not each.is_connected and each.name not in self.resuming:
                each.connect()

    def _end(self, node: Node) -> None:
        node.hang_up()
        self.loop.run_until_complete(node.member.abandon())
        node.keeping.close()

    def _is_leader(self, node: Node) -> bool:
        return node.name == self.groups[0].nodes[0]

    def _change_leader(self) -> None:
        for node in self.nodes:
            node.hang_up()
        self._leads.cancel()
        with suppress(asyncio.CancelledError):
            self.loop.run_until_complete(self._leads)
        self._lead()

    def lose(self, lost: Collection[str]) -> None:
        """Nodes are lost; all ranks start again, and go on from what all have then."""
        found = self.restorable(lost)
        for node in self.nodes:
            if node.name in lost:
                self._end(node)
        if any(self._is_leader(self.node(name)) for name in lost):
            self._change_leader()
            for node in self.nodes:
                if node.name not in lost:
                    node.connect()
        back = {name: self._kept_by_enough(self.node(name).group, lost) for name in lost}
        for name, epochs in back.items():
            node = self.node(name)
            node.holdings.lives.clear()
            node.begin()
            for keeper, epoch in epochs:
                fragments = keeper.keeping.find(epoch)
                tick = fragments.plan.generation.tick
                node.holdings.lives[tick] = keeper.holdings.lives[tick]
                shard = node.holdings.pin(tick)
                assert shard is not None
                position = node.group.nodes.index(name)
                back_again = Fragments(fragments.plan, position, shard, parity=-1)
                back_again.tables.update(fragments.tables)
                node.keeping.add(back_again)
            node.keeping.stand_on(min(node.keeping.ticks, default=-1))
        self.replaced -= set(lost)
        self.tick, self.life = found, self.life + 1
        self.resuming = {node.name: self.tick for node in self.nodes}

    def resume(self, name: str) -> None:
        """A node's ranks go on from where all do."""
        tick, node = self.resuming.pop(name, None), self.node(name)
        if tick is None:
            return
        node.holdings.forget_after(tick)
        if not node.is_connected:
            node.connect()
        self.loop.run_until_complete(node.member.forget_after(tick))
        self.turn()

    # --- what is promised ---------------------------------------------------------------------

    def check(self) -> None:
        """As soon as anything is protected, any losses that were promised to be made up for are.

        A snapshot process that died alone counts as a loss until the next is protected.
        """
        if self.protected >= 0:
            for lost in self.losses():
                assert self.restorable(lost) >= 0, f"{sorted(lost)} are too many"
        for node in self.nodes:
            assert len(node.keeping.ticks) <= 2
            assert sum(map(bool, node.holdings.pins.values())) <= 2

    def losses(self) -> Iterator[set[str]]:
        """All that the parities of every group make up for."""
        each = []
        for group in self.groups:
            gone = self.replaced & set(group.nodes)
            left = [node for node in group.nodes if node not in gone]
            spare = group.parities - len(gone)
            if spare < 0:
                return
            each.append(
                [
                    {*gone, *more}
                    for count in range(spare + 1)
                    for more in itertools.combinations(left, count)
                ]
            )
        for one in itertools.product(*each):
            yield set().union(*one)

    def restorable(self, lost: Collection[str]) -> int:
        """The newest tick that all nodes have after ``lost`` came back; -1 for none."""
        has: list[set[tuple[int, int]]] = []
        for node in self.nodes:
            if node.name in lost:
                enough = self._kept_by_enough(node.group, lost)
                ticks = {keeper.keeping.ticks[epoch]: keeper for keeper, epoch in enough}
                has.append({(tick, by.holdings.lives[tick]) for tick, by in ticks.items()})
            else:
                has.append(set(node.holdings.lives.items()))
        return max(set.intersection(*has), default=(-1, 0))[0]

    def _kept_by_enough(self, group: Group, lost: Collection[str]) -> list[tuple[Node, int]]:
        """Epochs that a rebuild brings back, each with one that keeps it."""
        left = [node for node in self.nodes if node.group is group and node.name not in lost]
        counts = Counter(epoch for node in left for epoch in node.keeping.ticks)
        return [
            (next(node for node in left if epoch in node.keeping), epoch)
            for epoch, count in sorted(counts.items())
            if count >= group.code.k
        ]

    def close(self) -> None:
        for node in self.nodes:
            self.loop.run_until_complete(node.member.abandon())
            node.close()
        self._leads.cancel()
        with suppress(asyncio.CancelledError):
            self.loop.run_until_complete(self._leads)
        self.loop.close()
