"""Another process in the place of a rank that dies, while the other ranks stay.

A *loss* lasts from the death of a rank until all ranks say that they are back; who dies meanwhile
belongs to it. Whatever is not as it should be ends the life, so that all ranks restart: the first
that died is then to blame, as if nothing had been tried.
"""

from __future__ import annotations

import asyncio
import functools
import os
from typing import TYPE_CHECKING, Final

from mnemo.config.uncaught import REFUSAL_VARIABLE
from mnemo.errors import LaunchError, ProtocolError, StoreLostError
from mnemo.launcher.family import end_orphans
from mnemo.launcher.guard import Guard
from mnemo.launcher.loss import Loss
from mnemo.launcher.reserve import Reserve
from mnemo.launcher.worker import execute, rank_environ
from mnemo.recovery import Inventory, Policy, Rung, plan
from mnemo.recovery.classes import in_words
from mnemo.recovery.control import (
    CONTROL_VARIABLE,
    JOIN_VARIABLE,
    Alive,
    Back,
    Cannot,
    Channel,
    Doing,
    Lost,
    Replaceable,
)

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Mapping, Sequence

    from mnemo.launcher.c10d import StoreHost
    from mnemo.launcher.life import Life
    from mnemo.launcher.options import LaunchOptions
    from mnemo.launcher.restarts import Position, RestartPolicy
    from mnemo.launcher.seat import Seat
    from mnemo.launcher.worker import Start, Worker
    from mnemo.recovery.classes import Failure
    from mnemo.recovery.journal import Journal

_MOST_TRIES: Final = 2
"""So many processes may come in a lost rank's place before all ranks restart."""


class Replacing:
    """Does that in one life.

    Args:
        life: Whose ranks they are.
        seat: Where they stand.
        options: The launch.
        host: Hosts the ranks' Store. None: no rank is ever replaced.
        policy: Says how many deaths are too many.
        position: Where the run is; may take seconds.
        journal: Told of every rank that was replaced.
        say: Tells people.
        struck: Whether the kernel has killed for want of memory since it was last asked.
        changed: Called when the life has to end.
    """

    def __init__(
        self,
        life: Life,
        seat: Seat,
        options: LaunchOptions,
        *,
        host: StoreHost | None,
        policy: RestartPolicy,
        position: Callable[[], Position | None],
        journal: Journal,
        say: Callable[[str], None],
        struck: Callable[[], bool],
        changed: Callable[[], None],
    ) -> None:
        self.why_not = ""
        """Why all ranks have to restart, once that is so."""
        self._life = life
        self._seat = seat
        self._options = options
        self._host = host
        self._policy = policy
        self._position = position
        self._journal = journal
        self._say = say
        self._struck = struck
        self._changed = changed
        self._channels: dict[int, Channel] = {}
        self._ready: set[int] = set()
        self._in_the_way: dict[int, str] = {}
        """Why ranks have said that they cannot be replaced, in the order in which they did."""
        self._left: set[int] = set()
        """Ranks that were ready, have left their training since, and may just be failing."""
        self._epoch = 0
        self._members = [0] * options.ranks
        self._loss: Loss | None = None
        self._over = host is None
        self._timer: asyncio.TimerHandle | None = None
        self._hosting = asyncio.create_task(self._host_store(host)) if host else None
        if self._hosting:
            self._hosting.add_done_callback(lambda _: changed())
        environ = {**rank_environ(options, os.environ, seat, 0), **self._variables(None)}
        self._reserve = Reserve(options, environ, life.log_dir, journal=journal, say=say)
        self._guard = Guard(
            options.hang_limit_s,
            life.log_dir,
            watched=self._whole,
            worker=lambda rank: life.workers[rank],
            journal=journal,
            say=say,
        )

    @property
    def pids(self) -> set[int]:
        """Processes that are no ranks yet."""
        return self._reserve.pids | (self._host.pids if self._host else set())

    def start(self, rank: int) -> Start:
        """How a rank's first process comes to be."""
        return execute if self._host is None else functools.partial(self._execute, rank, None)

    def check(self) -> None:
        """Raise what the ranks cannot live without.

        Raises:
            LaunchError: Their Store cannot be hosted.
        """
        hosting = self._hosting
        ended = hosting and hosting.done() and not hosting.cancelled()
        if hosting and ended and (error := hosting.exception()):
            msg = f"{error}; choose another --master-port, or set recover.in_process=off"
            raise LaunchError(msg) from error

    def lost(self, worker: Worker, code: int) -> bool:
        """A rank's process has ended.

        Returns:
            Whether that is taken care of; otherwise it ends the life.
        """
        rank = worker.rank
        while not self._over and self._read(rank, self._channels[rank]):
            pass  # what it said before it died
        if self._over:
            return False
        came = self._loss is not None and rank in self._loss.by
        if self._loss and came:
            self._loss.ended_in_place.append(self._failure(worker, code))
        decided = plan(self._inventory(worker, code), self._rules())
        if decided.rung is not Rung.REPLICA:
            self._ready.discard(rank)
            self.why_not = next(iter(self._in_the_way.values()), "")
            self.give_up(decided.why_not)
            return came
        self._replace(worker, code)
        return True

    def give_up(self, why: str) -> None:
        """Have all ranks restart, unless nothing was lost."""
        if self._over or not self._loss:
            return
        self._over, self.why_not = True, why
        for worker, _, at in reversed(self._loss.dead):  # the first of each rank counts
            self._life.noticed[worker.rank] = at
        for worker, code, _ in self._loss.dead:
            self._life.exits.setdefault(worker.rank, code)
        self._end_loss()
        self._changed()

    async def end(self) -> None:
        """The life is over: no rank lives any more."""
        self._over = True
        self._end_loss()
        self._reserve.close()
        await self._guard.end()
        while self._channels:
            self._hang_up(self._channels.popitem()[1])
        if self._hosting:
            self._hosting.cancel()
            await asyncio.gather(self._hosting, return_exceptions=True)

    def _inventory(self, worker: Worker, code: int) -> Inventory:
        """What there is, now that a rank's process has ended with ``code``."""
        loss = self._loss
        joining = loss.joining if loss else set()
        ended = {worker.rank: self._failure(worker, code)}
        for each, its_code, _ in reversed(loss.dead if loss else ()):
            if each.rank in joining:  # of its processes the first counts
                ended[each.rank] = self._failure(each, its_code)
        return Inventory(
            ranks=self._options.ranks,
            lost=ended,
            ready=frozenset(self._ready | joining | (self._left & {worker.rank})),
            ended_in_place=loss.ended_in_place if loss else (),
        )

    def _rules(self) -> Policy:
        # A loss under way is counted once it is over.
        again = self._loss is not None or self._policy.foresee(None) == "restart"
        return Policy(most_in_place=_MOST_TRIES, again=again)

    def _failure(self, worker: Worker, code: int) -> Failure:
        if code > 0:
            worker.close()  # its last words are in the log then
        return worker.failure(code)

    def _replace(self, worker: Worker, code: int) -> None:
        rank = worker.rank
        if self._loss is None:
            task = asyncio.create_task(asyncio.to_thread(self._position))
            task.add_done_callback(self._positioned)
            self._loss = Loss(task)
        loss, at = self._loss, self._life.noticed[rank]
        loss.dead.append((worker, code, at))
        self._epoch += 1
        self._members[rank] = self._epoch
        self._ready.discard(rank)
        self._left.discard(rank)
        loss.joining.add(rank)
        loss.back.clear()
        self._hang_up(self._channels.pop(rank))
        lost = Lost(
            self._epoch,
            tuple(sorted(loss.joining)),
            f"rank {rank} {in_words(code)}",
            tuple(self._members),
        )
        for channel in self._channels.values():
            channel.tell(lost)
        loss.took(f"told_{self._epoch}")
        worker.close()
        try:
            self._life.place(rank, functools.partial(self._join, rank))
        except LaunchError as error:
            self.give_up(str(error))
            return
        self._channels[rank].tell(lost)
        loss.took(f"started_{self._epoch}")
        end_orphans(rank, self._life.pids | self.pids)
        if self._timer:
            self._timer.cancel()
        limit_s = self._options.join_limit_s
        self._timer = asyncio.get_running_loop().call_later(
            limit_s, self.give_up, f"not all ranks were back within {limit_s:g} s"
        )

    def _join(
        self,
        rank: int,
        command: Sequence[str],
        environ: Mapping[str, str],
        stdout: int,
        stderr: int,
    ) -> subprocess.Popen[bytes]:
        """`Start` a process in the place of a lost one, from a warm standby if there is one."""
        assert self._loss
        # What it cannot come to terms with is no wrong setting: the first process had none.
        environ = {k: v for k, v in environ.items() if k != REFUSAL_VARIABLE}
        while standby := self._reserve.take():
            try:
                process, agent = standby.become(
                    {**environ, **self._variables(self._epoch)}, stdout, stderr
                )
            except OSError:  # it has just died
                standby.close()
                continue
            self._loss.by[rank] = "standby"
            self._listen(rank, Channel(agent))
            return process
        self._loss.by[rank] = "new process"
        return self._execute(rank, self._epoch, command, environ, stdout, stderr)

    def _execute(
        self,
        rank: int,
        epoch: int | None,
        command: Sequence[str],
        environ: Mapping[str, str],
        stdout: int,
        stderr: int,
    ) -> subprocess.Popen[bytes]:
        channel, theirs = Channel.pair()
        with theirs:
            fd = theirs.fileno()
            variables = {**self._variables(epoch), CONTROL_VARIABLE: str(fd)}
            try:
                process = execute(command, {**environ, **variables}, stdout, stderr, (fd,))
            except BaseException:
                channel.close()
                raise
        self._listen(rank, channel)
        return process

    def _variables(self, epoch: int | None) -> dict[str, str]:
        if self._host is None:
            return {}
        join = {} if epoch is None else {JOIN_VARIABLE: str(epoch)}
        return {"TORCHELASTIC_USE_AGENT_STORE": "True", **join}

    def _listen(self, rank: int, channel: Channel) -> None:
        self._channels[rank] = channel
        loop = asyncio.get_running_loop()
        loop.add_reader(channel, self._read, rank, channel)

    def _hang_up(self, channel: Channel) -> None:
        asyncio.get_running_loop().remove_reader(channel)
        channel.close()

    def _read(self, rank: int, channel: Channel) -> bool:
        """Take a message, if there is one; False if there was none."""
        try:
            message = channel.receive()
        except BlockingIOError:
            return False
        except ProtocolError as error:
            message = Replaceable(False, str(error))
        match message:
            case Alive(fd=fd):
                self._life.workers[rank].watch(fd)
            case Replaceable(yes=True):
                self._can(rank)
            case Replaceable(why=why, left=left):
                self._cannot(rank, why, left=left)
            case Cannot(epoch=self._epoch, why=why):
                self.give_up(f"rank {rank}: {why}")
            case Back(epoch=self._epoch):
                self._back(rank, message)
            case Doing():
                self._guard.hear(rank, message)
            case None:  # as a rank that is dying does; its end counts
                asyncio.get_running_loop().remove_reader(channel)
        return message is not None

    def _whole(self) -> Mapping[int, Channel]:
        """All channels, as long as nothing is lost and each rank can be replaced; else none."""
        whole = not self._over and not self._loss and len(self._ready) == self._options.ranks
        return dict(self._channels) if whole else {}

    def _can(self, rank: int) -> None:
        self._ready.add(rank)
        self._in_the_way.pop(rank, None)
        if not self._over and not self._loss:
            self._reserve.fill()

    def _cannot(self, rank: int, why: str, *, left: bool) -> None:
        """A rank says that from here on it is not to be replaced, nor can others be without it."""
        if left and rank in self._ready:
            self._left.add(rank)
        self._ready.discard(rank)
        needed = self._loss is not None and rank not in self._loss.back
        self._in_the_way[rank] = f"rank {rank}: {why}"
        if needed or not left:
            self.give_up(self._in_the_way[rank])

    def _back(self, rank: int, said: Back) -> None:
        loss = self._loss
        if loss is None:
            return
        loss.back[rank] = said
        loss.joining.discard(rank)
        if len(loss.back) < self._options.ranks:
            return
        loss.took("all_back")
        position, struck = loss.where(), self._struck()
        failures = [w.failure(code, out_of_memory=struck) for w, code, _ in loss.dead]
        self._policy.after_failure(position, failures[0])
        self._journal.write(
            "replaced",
            life=self._life.number,
            epoch=self._epoch,
            position=position,
            worker_pids={rank: self._life.workers[rank].pid for rank in loss.by},
            **loss.record(failures),
        )
        self._say(loss.line(failures))
        self._life.replaced.clear()
        self._end_loss()
        self._reserve.fill()

    def _positioned(self, task: asyncio.Task[Position | None]) -> None:
        loss = self._loss
        if loss is None or loss.position is not task:
            return  # it is over
        worker, code, _ = loss.dead[0]
        if self._policy.foresee(loss.where(), worker.failure(code)) == "crash loop":
            self.give_up("")  # it is said when the job ends

    def _end_loss(self) -> None:
        if self._timer:
            self._timer.cancel()
        if self._loss:
            self._loss.position.cancel()
        self._loss = None

    async def _host_store(self, host: StoreHost) -> None:
        try:
            await host.serve(self._seat.master_port)
        except StoreLostError:  # its process may have ended since the last life
            await host.serve(self._seat.master_port)
        await host.ended()
        self._say("the process with the ranks' Store has ended: if a rank dies, all restart")
        self.give_up("the ranks' Store has ended")
        self._over = True
