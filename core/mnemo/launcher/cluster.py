"""The agents of several nodes: who is there, which life they are in, why it ended.

Who takes part is agreed on in `mnemo.membership`. Beside its records each epoch has a few of the
launcher's own in the same Store: where rank 0 listens, why the life ended, which node is through.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import TYPE_CHECKING, Final

import msgspec

from mnemo.clock import SystemClock
from mnemo.config import format_duration
from mnemo.config.uncaught import EXIT_USAGE
from mnemo.errors import (
    LaunchError,
    MembershipRecordError,
    MnemoError,
    SalvageError,
    StoreLostError,
)
from mnemo.launcher import rendezvous
from mnemo.launcher.endings import End, Endings
from mnemo.launcher.operator import Operator
from mnemo.launcher.restarts import Ended
from mnemo.launcher.said import Said
from mnemo.launcher.salvage import Salvage
from mnemo.launcher.seat import Seat
from mnemo.launcher.team import Report
from mnemo.membership import Driver, Epoch, Machine, Member, Rules, Seal
from mnemo.membership.records import were_lost
from mnemo.types import EXIT_STATE_SAVED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mnemo.launcher.rendezvous import Nodes
    from mnemo.launcher.stores import AgentStores
    from mnemo.smp.paths import RunPaths

_POLL_S: Final = 0.1
_DEPUTIES: Final = 2
_FAREWELL_S: Final = 10.0
"""How long the node that hosts the Store waits for others to read that the job is over."""
_HEARSAY_S: Final = 0.5
"""How long it may take until what failed elsewhere is known here."""
_SILENCE_S: Final = 5.0
"""A wait that takes longer is explained."""
_ONLY_IN_MEMORY: Final = (
    "what is newer than the last checkpoint is in the memory of these nodes alone: start the job "
    "again here within snapshot.keep_alive to go on from there"
)
_LOST_PEER: Final = re.compile(
    r"[Cc]onnection (was )?(reset|refused|closed)|[Bb]roken pipe|[Tt]imed out|NCCL|gloo"
)
"""What ranks say whose peer is gone."""


class Port(msgspec.Struct, frozen=True, array_like=True):
    """Where rank 0 hosts the ranks' store."""

    number: int


class Cluster:
    """One node's `mnemo.launcher.team.Team`, told by `mnemo.membership.Driver`.

    Args:
        me: This node's agent.
        places: Where the run's first Store is expected.
        nodes: How many there are.
        rules: Of the run.
        seal: Of the run.
        stores: Speaks to Stores, and hosts one.
        paths: The run's on this node, where ``mnemo confirm-lost`` leaves its word, too.
        saves: Whether what is kept is stored where nobody takes a lost node's place.
        say: Tells the user.
    """

    def __init__(
        self,
        me: Member,
        places: tuple[str, ...],
        nodes: Nodes,
        *,
        rules: Rules,
        seal: Seal,
        stores: AgentStores,
        paths: RunPaths,
        saves: bool,
        say: Callable[[str], None],
    ) -> None:
        self._me = me
        self._places = places
        self._nodes = nodes
        self._rules = rules
        self._stores = stores
        self._paths = paths
        self._saves = saves
        self._say = say
        self._machine = Machine(me, seal, rules, places, SystemClock().monotonic())
        self._driver = Driver(self._machine, stores, self, rules)
        self._said = Said(stores, self._machine, seal)
        self._endings = Endings(self._said, me.key)
        self._operator = Operator(paths, self._machine, rules, say)
        self._driving: asyncio.Task[None] | None = None
        self._epoch: Epoch | None = None
        """Of the seat that was taken last."""
        self._granted: Epoch | None = None
        """What the ranks may run under now."""
        self._change = asyncio.Event()
        self._changed: Callable[[], None] = self._change.set
        self._warming: asyncio.Future[None] | None = None
        self._earlier: int | None = None
        """The epoch that an earlier launch had ended with, 0 for none; None if not looked for."""
        self._idle = asyncio.Event()
        """No rank runs here."""
        self._came = 0
        """The number of the first epoch that this node belongs to."""

    def __str__(self) -> str:
        spares = self._nodes.spares
        more = f" and {spares} spare{'s' * (spares > 1)}" if spares else ""
        return f" on each of {self._nodes.count} nodes{more}"

    # --- what the driver tells ----------------------------------------------------------------

    def start(self, epoch: Epoch, node_rank: int) -> None:
        """An epoch has begun."""
        if node_rank <= _DEPUTIES:  # may have to host the next Store
            self._warming = self._warming or asyncio.ensure_future(self._stores.warm_up())
        self._granted = epoch
        self._came = self._came or epoch.number
        self._tell()

    async def stop(self) -> None:
        """It has ended."""
        self._granted = None
        self._tell()
        await self._idle.wait()

    def _tell(self) -> None:
        self._change.set()
        self._changed()

    # --- what the agent asks ------------------------------------------------------------------

    def watch(self, changed: Callable[[], None]) -> None:
        """See `Team.watch`."""
        self._changed = changed

    async def take_seat(self, port: int) -> Seat | Ended:
        """See `Team.take_seat`."""
        self._idle.set()
        if self._driving is None:
            await rendezvous.host_first(self._stores, self._places, self._me.store)
            self._driving = asyncio.create_task(self._driver.run())
        while True:
            epoch = await self._next_epoch()
            if isinstance(epoch, Ended):
                return epoch
            rendezvous.require_fit(epoch, self._nodes, self._me.ranks)
            self._idle.clear()
            me = epoch.rank_of(self._me.key)
            assert me is not None
            with contextlib.suppress(StoreLostError):
                if me == 0:
                    await self._said.put(f"port/{epoch.number}", Port(port))
                found = await self._await_port(epoch)
                if found is not None:
                    before, self._epoch = self._epoch, epoch
                    if me:
                        await self._look_for_rank_0(before, epoch, found.number)
                    return Seat(
                        world_size=epoch.world_size,
                        master_addr=epoch.members[0].address,
                        master_port=found.number,
                        restarts=epoch.number - 1,
                        node_rank=me,
                        nodes=len(epoch.members),
                        first_rank=sum(member.ranks for member in epoch.members[:me]),
                        cause=were_lost(epoch.lost),
                    )
            self._idle.set()

    async def _next_epoch(self) -> Epoch | Ended:
        """Wait for it, and say what it is that one waits for; the job's end if that comes first."""
        assert self._driving is not None
        loop = asyncio.get_running_loop()
        said, begun = "", loop.time()
        self._operator.drop_early_words()
        while self._granted is None or self._granted is self._epoch:
            self._change.clear()
            changed = asyncio.ensure_future(self._change.wait())
            await asyncio.wait(
                {changed, self._driving},
                timeout=1.0,
                return_when=asyncio.FIRST_COMPLETED,
            )
            changed.cancel()
            if self._driving.done():
                if isinstance(self._driving.exception(), MembershipRecordError):
                    await self._said.knock(self._places)
                self._driving.result()
                return await self._give_up()
            if (end := await self._end_of_job()) is not None:
                return end
            self._operator.hear()
            if self._machine.is_spare and loop.time() - begun > _SILENCE_S:
                assert self._machine.committed is not None
                rendezvous.require_fit(self._machine.committed, self._nodes, self._me.ranks)
            why = await self._waits_for()
            if why:
                why += self._operator.advice
            if loop.time() - begun > _SILENCE_S and why and why != said:
                self._say(f"waiting: {why}")
                said = why
        return self._granted

    async def _waits_for(self) -> str:
        why = self._machine.waits_for
        if why.endswith(("are here", "takes its place")):
            with contextlib.suppress(StoreLostError):
                if await self._said.have_strangers_come():
                    why += ", and somebody came with another secret (MNEMO_SECRET_FILE)"
        return why

    async def _give_up(self) -> Ended:
        """Nobody took a lost node's place in time.

        Raises:
            LaunchError: There was no life before, of any node.
        """
        words = (
            f"waited {format_duration(self._rules.give_up_s)} (recover.no_spare): "
            f"{await self._waits_for()}"
        )
        epoch, machine = self._epoch, self._machine
        if epoch is None:
            if machine.committed is None:
                raise LaunchError(words)
            return Ended(EXIT_STATE_SAVED, words)
        self._say(words)
        if self._saves:
            try:
                if machine.is_left_out or epoch != machine.committed:
                    raise SalvageError("other nodes may have decided to go on without this one")
                rank = epoch.rank_of(self._me.key)
                assert rank is not None
                said = self._said.below(f"salvage/{epoch.number}")
                salvage = Salvage(self._paths, epoch, rank, said, self._say)
                found = await salvage.run(machine.left)
                self._say(f"step {found.step} of all ranks is in {found.url}")
                with contextlib.suppress(StoreLostError):  # whoever comes now comes too late
                    await self._endings.close(epoch, End(EXIT_STATE_SAVED))
                return Ended(EXIT_STATE_SAVED)
            except MnemoError as error:
                self._say(f"what is left is not stored: {error}")
        return Ended(EXIT_STATE_SAVED, _ONLY_IN_MEMORY)

    async def _end_of_job(self) -> Ended | None:
        """That others have ended it, as a spare learns.

        There may be the end of an earlier launch, which is none of this one's: what is there when
        this agent comes.
        """
        epoch = self._machine.committed
        if not self._machine.place or epoch is None:
            return None
        with contextlib.suppress(StoreLostError):
            end = await self._endings.closed(epoch)
            if self._earlier is None:
                self._earlier = epoch.number if end and self._epoch is None else 0
            if end is not None and epoch.number != self._earlier:
                return Ended(end.code or 0)
        return None

    async def _await_port(self, epoch: Epoch) -> Port | None:
        while self._granted is epoch:
            found = await self._said.read(f"port/{epoch.number}", Port)
            if found is not None:
                return found
            await asyncio.sleep(_POLL_S)
        return None

    async def _look_for_rank_0(self, before: Epoch | None, epoch: Epoch, port: int) -> None:
        """End ``epoch`` if rank 0, where all ranks meet, cannot be reached: they would hang.

        Whoever has just come leaves for it, rank 0's node or this one; all do at a launch. Where
        both were in ``before``, the link may come back.
        """
        first, said = epoch.members[0], False
        came = before is not None and before.rank_of(first.key) is None
        is_launch = before is None and not epoch.lost
        while self._granted is epoch:
            why = await rendezvous.why_unreached(first.address, port, self._me.address)
            if not why:
                return
            cause = (
                f"node {self._me.address} cannot reach node {first.address}, where rank 0 is "
                f"({why}): set network.interface there to the interface that others reach it by"
            )
            if came or is_launch or self.is_newcomer:
                leaves = first.key if came else "" if is_launch else self._me.key
                await self._report(Report(cause=cause, code=EXIT_USAGE), leaves=leaves)
                return
            if not said:
                self._say(cause)
                said = True
            await asyncio.sleep(_POLL_S)

    @property
    def is_over(self) -> bool:
        """See `Team.is_over`."""
        return self._granted is not self._epoch

    @property
    def is_newcomer(self) -> bool:
        """See `Team.is_newcomer`."""
        epoch = self._epoch
        return epoch is not None and bool(epoch.lost) and epoch.number == self._came

    async def why(self) -> Report:
        """See `Team.why`."""
        assert self._epoch is not None
        said = await self._endings.why(self._epoch, is_newcomer=self.is_newcomer)
        return said or Report(cause="", silent=self._machine.silent)

    async def is_elsewhere(self, code: int, tail: Iterable[str]) -> bool:
        """See `Team.is_elsewhere`.

        This node agrees to no other epoch yet: `report` may end the job.
        """
        patience = 0.0
        if code >= 0:
            lost_peer = any(_LOST_PEER.search(line) for line in tail)
            patience = self._rules.node_loss_s + 2.0 if lost_peer else _HEARSAY_S
        deadline = asyncio.get_running_loop().time() + patience
        while not self.is_over and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_POLL_S)
        return self.is_over

    async def report(self, report: Report) -> int | None:
        """See `Team.report`.

        Where it ends the job this node agrees to no other epoch: the end stands at this one.
        """
        return await self._report(report, leaves=self._me.key if report.leaves else "")

    async def _report(self, report: Report, *, leaves: str) -> int | None:
        """``leaves``: the key of the agent whose node leaves for it, if one does."""
        assert self._epoch is not None
        code = await self._endings.tell(
            self._epoch, report, is_newcomer=self.is_newcomer, leaves=leaves
        )
        if code is None:
            self._idle.set()
        self._driver.end_epoch()
        return code

    async def all_ended(self, code: int) -> int | None:
        """See `Team.all_ended`."""
        self._idle.set()
        assert self._epoch is not None
        return await self._endings.of_all(self._epoch, code, lambda: self.is_over)

    async def close(self) -> None:
        """See `Team.close`."""
        if self._driving is not None:
            with contextlib.suppress(StoreLostError, asyncio.TimeoutError):
                await asyncio.wait_for(self._part(), _FAREWELL_S)
            self._idle.set()
            self._driving.cancel()
            await asyncio.wait({self._driving})
        if self._warming is not None:
            await asyncio.gather(self._warming, return_exceptions=True)  # its process ends with it
        await self._stores.close()

    async def _part(self) -> None:
        """Whoever hosts the Store leaves last.

        With etcd the first of those that are there does, and removes what is there.
        """
        await self._endings.leave()
        here = self._machine.present
        members = self._epoch.members if self._epoch else ()
        first = next((member.key for member in members if member.key in here), "")
        hosts = self._machine.place == self._me.store
        if not hosts and not (self._rules.arbiter and first == self._me.key):
            return
        while (others := self._machine.present) - await self._endings.left(others):
            await asyncio.sleep(_POLL_S)
        joined, count = self._machine.joined
        if count:
            await self._stores.forget(self._machine.place, joined, count)
