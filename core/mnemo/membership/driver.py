"""Runs a `Machine` on real Stores, and tells the agent when its workers may run."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from mnemo.clock import Clock, SystemClock
from mnemo.errors import StoreLostError
from mnemo.membership.machine import Machine
from mnemo.membership.records import Epoch
from mnemo.membership.rules import Rules
from mnemo.membership.store import Add, Answer, CompareSet, Get, Op, Set, Store

log = logging.getLogger("mnemo.membership")


class Stores(Protocol):
    """Where the Stores are that the driver speaks to."""

    async def store(self, place: str) -> Store:
        """A connection to the Store at ``place``, which may be an old one.

        Raises:
            StoreLostError: None can be made.
        """
        ...

    async def host(self, place: str) -> None:
        """Have a new, empty Store at ``place``, one's own; the one before ends.

        Raises:
            StoreLostError: That cannot be done.
        """
        ...


class Workers(Protocol):
    """What the node's agent does with its workers."""

    def start(self, epoch: Epoch, node_rank: int) -> None:
        """Let the workers run as node ``node_rank`` of ``epoch``. Must not block."""
        ...

    async def stop(self) -> None:
        """Kill the workers; return when all of them are dead.

        That has to be within `Rules.stop_s`.
        """
        ...


class Driver:
    """One agent's part, for the whole run.

    Args:
        machine: What decides.
        stores: What it speaks to.
        workers: What it tells.
        rules: Of the run.
        clock: The time.
    """

    def __init__(
        self,
        machine: Machine,
        stores: Stores,
        workers: Workers,
        rules: Rules,
        clock: Clock | None = None,
    ) -> None:
        self.machine = machine
        self._stores = stores
        self._workers = workers
        self._rules = rules
        self._clock = clock or SystemClock()
        self._told: Epoch | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._fence: asyncio.TimerHandle | None = None
        self._fenced_at = machine.run_until

    async def run(self) -> None:
        """Take part until the machine gives up, or until cancelled; no worker runs afterwards.

        Raises:
            MembershipRecordError: The Store is not this run's.
        """
        try:
            while not self.machine.has_given_up:
                begun = self._clock.monotonic()
                await self._turn()
                if self._stopping is not None and self._stopping.done():
                    self._stopping.result()  # whoever cannot stop its workers takes no further part
                spent = self._clock.monotonic() - begun
                await asyncio.sleep(max(0.0, self._rules.beat_s - spent))
        finally:
            self.end_epoch()
            if self._stopping is not None:
                await self._stopping

    def end_epoch(self) -> None:
        """The workers cannot go on, for example since one of them failed: ask for a new epoch."""
        self.machine.end_epoch(self._clock.monotonic())
        self._tell()

    async def _turn(self) -> None:
        op = self.machine.begin(self._clock.monotonic())
        self._tell()
        while op is not None:
            answer: Answer | StoreLostError
            try:
                answer = await self._carry_out(op)
            except StoreLostError as error:
                answer = error
            op = self.machine.answer(answer, self._clock.monotonic())
            self._tell()

    async def _carry_out(self, op: Op) -> Answer:
        if isinstance(op, (Get, Set, CompareSet, Add)):
            store = await self._stores.store(op.place)
            if isinstance(op, Get):
                return await store.get(op.keys)
            if isinstance(op, CompareSet):
                return await store.compare_set(op.key, op.expected, op.value)
            if isinstance(op, Add):
                return await store.add(op.key)
            await store.set(op.key, op.value)
        else:
            await self._stores.host(op.place)
        return None

    def _tell(self) -> None:
        """Pass on what the machine has decided."""
        running = self.machine.running
        if running != self._told:
            before, self._told = self._told, running
            if before is not None:
                log.info("epoch %d ends on this node", before.number)
                self._stopping = asyncio.ensure_future(self._stop())
            if running is not None:
                rank = running.rank_of(self.machine.me.key)
                assert rank is not None
                self._workers.start(running, rank)
        if self._fenced_at != self.machine.run_until:
            self._fenced_at = self.machine.run_until
            if self._fence is not None:
                self._fence.cancel()
                self._fence = None
            if running is not None:
                left = max(0.0, self._fenced_at - self._clock.monotonic())
                self._fence = asyncio.get_running_loop().call_later(left, self._on_fence)

    def _on_fence(self) -> None:
        self.machine.tick(self._clock.monotonic())
        self._tell()

    async def _stop(self) -> None:
        await self._workers.stop()
        self.machine.stopped(self._clock.monotonic())
