"""What the nodes that are left keep goes to storage, where nobody takes a lost one's place.

The ranks are gone by then. Each node's snapshot process has its own part; in a lost node's name one
of its group starts another such process, which has the lost part rebuilt from the others' memory,
and stores it as that node would have. Nothing of it needs torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from mnemo.config.kinds import without_password
from mnemo.errors import MnemoError, SalvageError
from mnemo.launcher.company import Company
from mnemo.smp import lifecycle
from mnemo.smp import messages as m
from mnemo.smp.paths import RunPaths
from mnemo.transport.local import close_all

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from mnemo.launcher.said import Said
    from mnemo.membership import Epoch
    from mnemo.smp.client import SmpClient

_PATIENCE_S: Final = 1800.0
"""How long the slowest node may take, for all of it."""
_KEEP_ALIVE_S: Final = 60.0
"""How long a lost node's part stays where the agent that has it dies."""
_FIND_S: Final = 20.0
"""How long this node's snapshot process may take to answer at first."""
_FAREWELL_S: Final = 5.0
_LEAST_S: Final = 1.0
_T = TypeVar("_T")


class There(msgspec.Struct, frozen=True, array_like=True):
    """Node ranks of those who are left, as the first who looked has seen it."""

    nodes: tuple[int, ...]


class Kept(msgspec.Struct, frozen=True, array_like=True):
    """What one agent can store, each for all of ``nodes``.

    Attributes:
        nodes: Its own node rank, and those of lost ones that it has rebuilt.
        steps: By tick, the step, and which life took it.
        failure: Why it can store nothing.
    """

    nodes: tuple[int, ...]
    steps: dict[int, tuple[int, str]]
    failure: str = ""


class Stored(msgspec.Struct, frozen=True, array_like=True):
    """Whether it has."""

    failure: str = ""


@dataclass(frozen=True)
class Salvaged:
    """What is on storage now.

    Attributes:
        step: Of the checkpoint.
        url: Where it is, as it can be shown.
    """

    step: int
    url: str


class Salvage:
    """One agent's part.

    Args:
        paths: The run's on this node.
        epoch: The membership that the run ended in.
        rank: This node's in it.
        said: Told of this epoch.
        say: Tells the user.
    """

    def __init__(
        self, paths: RunPaths, epoch: Epoch, rank: int, said: Said, say: Callable[[str], None]
    ) -> None:
        self._paths = paths
        self._epoch = epoch
        self._rank = rank
        self._said = said
        self._say = say
        self._parts: list[_Part] = []
        self._given_up = False
        self._deadline = time.monotonic() + _PATIENCE_S

    async def run(self, there: Collection[int] | None) -> Salvaged:
        """Store the newest step that all nodes have; returns when all have stored it.

        Args:
            there: Node ranks of those who are left, if this agent knows; else another one does.

        Raises:
            SalvageError: It cannot be stored, or no place for it is known.
        """
        addresses = [member.address for member in self._epoch.members]
        company = Company(self._said, addresses, self._rank, patience_s=_PATIENCE_S)
        try:
            async with company.living():
                return await self._run(there, company)
        except asyncio.CancelledError:
            self._given_up = True
            for part in self._parts:
                part.hang_up()
            await company.say_gone()
            raise
        finally:
            for part in self._parts:
                await asyncio.to_thread(part.close)

    async def _run(self, there: Collection[int] | None, company: Company) -> Salvaged:
        if there is not None:
            await company.tell("there", There(tuple(sorted(there))))
        left = (await company.first("there", There)).nodes
        if self._rank not in left:
            raise SalvageError(
                f"node {self._address(self._rank)} was not seen by the others any more, who store "
                "without it"
            )
        try:
            own = await self._in_thread(self._find)
            self._say("storing what the nodes that are left keep")
            kept = await self._in_thread(self._rebuild, own, left)
        except (MnemoError, OSError) as error:
            kept = Kept((), {}, without_password(str(error)))
        await company.tell(f"kept/{self._rank}", kept)
        tick, step = self._choose(await company.all("kept", Kept, left))
        try:
            for part in self._parts:
                await asyncio.to_thread(part.store, tick, step, self._deadline)
            stored = Stored()
        except (MnemoError, OSError) as error:
            stored = Stored(without_password(str(error)))
        await company.tell(f"stored/{self._rank}", stored)
        for each in await company.all("stored", Stored, left):
            if each.failure:
                raise SalvageError(each.failure)
        persist = self._parts[0].looked.persist
        assert persist is not None
        return Salvaged(step, persist.shown)

    def _choose(self, kept: list[Kept]) -> tuple[int, int]:
        """Tick and step of the newest generation that all nodes have.

        Raises:
            SalvageError: There is none.
        """
        for each in kept:
            if each.failure:
                raise SalvageError(each.failure)
        gone = set(range(len(self._epoch.members))) - {node for each in kept for node in each.nodes}
        if gone:
            nodes = ", ".join(self._epoch.members[rank].address for rank in sorted(gone))
            raise SalvageError(f"nobody is left who keeps anything of {nodes}")
        common = set.intersection(*(set(each.steps.items()) for each in kept))
        if not common:
            raise SalvageError("the nodes have no snapshot in common")
        tick, (step, _) = max(common)
        return tick, step

    async def _in_thread(self, work: Callable[..., _T], *words: Any) -> _T:
        """Who gives it up does not wait for it."""

        def do() -> _T:
            try:
                return work(*words)
            finally:
                if self._given_up:
                    for part in self._parts:
                        part.close()

        return await asyncio.to_thread(do)

    # --- in a thread --------------------------------------------------------------------------

    def _find(self) -> _Part:
        """Find this node's part.

        Raises:
            SalvageError: It cannot be stored.
            MnemoError: The snapshot process does not do its part.
        """
        client = lifecycle.find(self._paths, _FIND_S)
        if client is None:
            raise SalvageError(
                f"node {self._address(self._rank)} has no snapshot process that answers"
            )
        own = _Part([client])
        self._parts.append(own)
        self._go_on()
        own.look()
        if own.looked.fit < 0:
            raise SalvageError(f"no training was under way on node {self._address(self._rank)}")
        persist, protect = own.looked.persist, own.looked.protect
        if persist is None:
            raise SalvageError("persist.to is not set")
        if protect is None or protect.node != m.node_name(self._rank):
            raise SalvageError(f"node {self._address(self._rank)} is protected by no others")
        return own

    def _rebuild(self, own: _Part, left: Collection[int]) -> Kept:
        """Have those parts of the lost nodes rebuilt that fall to this one.

        Raises:
            SalvageError: One cannot be.
            MnemoError: Or a snapshot process does not do its part.
        """
        persist, protect = own.looked.persist, own.looked.protect
        assert persist is not None
        assert protect is not None
        group = [m.node_name(rank) for rank in left if m.node_name(rank) in protect.group]
        lost = [rank for rank in range(len(self._epoch.members)) if rank not in left]
        lost = [rank for rank in lost if m.node_name(rank) in protect.group]
        mine = lost[group.index(protect.node) :: len(group)]
        for rank in mine:
            self._stand_in(rank, own.looked.fit, persist, protect)
        steps = [set(part.look().items()) for part in self._parts]
        return Kept((self._rank, *mine), dict(set.intersection(*steps)))

    def _stand_in(
        self, rank: int, fit: int, persist: m.PersistSettings, protect: m.ProtectSettings
    ) -> None:
        """Start a snapshot process in a lost node's place, and have it get what the node had."""
        name = m.node_name(rank)
        paths = RunPaths.of(self._paths.run_id, self._paths.directory / name)
        members = self._epoch.members
        first = sum(member.ranks for member in members[:rank])
        self._go_on()
        clients = [lifecycle.ensure(paths)]
        self._parts.append(_Part(clients, alien=paths))
        self._go_on()
        host, _ = protect.addresses[protect.node]
        at, _ = clients[0].ask(m.Listen(name, host), m.Listening)
        addresses = {**protect.addresses, name: (at.host, at.port)}
        protect = msgspec.structs.replace(protect, node=name, addresses=addresses)
        persist = msgspec.structs.replace(persist, node=name)
        for number in range(members[rank].ranks):
            self._go_on()
            if number:
                clients.append(lifecycle.ensure(paths))
            join = m.Join(fit, first + number, members[rank].ranks, _KEEP_ALIVE_S, persist, protect)
            close_all(clients[number].ask(join, m.Joined)[1])
        while not (recalled := clients[0].ask(m.Recall(), m.Recalled)[0]).over:
            self._go_on()
            if time.monotonic() > self._deadline:
                raise SalvageError(
                    f"what node {self._address(rank)} had is not back after {_PATIENCE_S:g} s"
                )
        if recalled.failure:
            raise SalvageError(
                f"what node {self._address(rank)} had does not come back: {recalled.failure}"
            )

    def _go_on(self) -> None:
        """Between any two things that take time.

        Raises:
            SalvageError: Not any more.
        """
        if self._given_up:
            raise SalvageError("the job was asked to end at once")

    def _address(self, rank: int) -> str:
        return self._epoch.members[rank].address


class _Part:
    """One node's part of the run, at the snapshot process that has it."""

    def __init__(self, clients: list[SmpClient], *, alien: RunPaths | None = None) -> None:
        """Known from now on, so that it can be hung up.

        Args:
            clients: Connections to the process.
            alien: Where it is, if it was started in a lost node's name: it ends with this object.
        """
        self._clients = clients
        self._alien = alien
        self.looked: m.Looked
        """What it kept when it was looked at last."""

    def look(self) -> dict[int, tuple[int, str]]:
        """What it keeps now: see `Kept.steps`."""
        self.looked, _ = self._clients[0].ask(m.Look(), m.Looked)
        lives = self.looked.lives
        return {tick: (step, lives.get(tick, "")) for tick, step in self.looked.steps.items()}

    def store(self, tick: int, step: int, deadline: float) -> None:
        """Have generation ``tick`` stored, until ``deadline`` of the monotonic clock.

        Raises:
            SalvageError: That failed.
        """
        request = m.Flush(self.looked.fit, tick)
        left = max(deadline - time.monotonic(), _LEAST_S)
        flushed, _ = self._clients[0].ask(request, m.Flushed, timeout_s=left)
        if flushed.step != step:
            raise SalvageError(f"step {step} could not be stored: {flushed.failure}")

    def hang_up(self) -> None:
        """Have whoever waits for an answer get none."""
        for client in self._clients:
            client.hang_up()

    def close(self) -> None:
        """Hang up, and end the process where it was started for this.

        One that does not listen any more ends by itself, since nobody is connected to it.
        """
        for client in self._clients:
            client.close()
        if self._alien is None:
            return
        with contextlib.suppress(MnemoError, OSError):
            anew = lifecycle.find(self._alien, _FAREWELL_S)  # the others may have been hung up
            if anew is not None:
                with anew:
                    anew.tell(m.Shutdown(force=True), timeout_s=_FAREWELL_S)
