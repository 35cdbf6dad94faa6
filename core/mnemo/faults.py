"""The one fault injector, shared by tests, campaigns and commands.

Faults are declared through one environment variable, so that an unchanged training script can be
hit. The product says which phase it has reached; a fault declared for that phase then happens in
the very process that reached it::

    declared = Declaration((Fault("sigkill", 1, Hook("backward", 17)),), record="/run/fired")
    subprocess.run(command, env={**os.environ, **declared.environ()})
    declared.assert_fired()

A fault that is not bound to a phase happens at an instant that its parent chooses, by `strike`.
Each fault happens once, however often the training is restarted: it is written to the record,
durably, before it acts, and the record is read at every start.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NoReturn, get_args

import msgspec

from mnemo.errors import ConfigError, FaultNotFiredError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ENV: Final = "MNEMO_FAULTS"
PHASES: Final = ("loading", "forward", "backward", "update", "mid_copy", "validation", "between")
"""The named phases of training that a campaign has to hit."""

Kind = Literal["sigkill", "sigstop", "sigterm", "hang", "exception", "exit0", "smp_kill", "stop"]
_SIGNALS: Final[Mapping[str, signal.Signals]] = {
    "sigkill": signal.SIGKILL,
    "sigstop": signal.SIGSTOP,
    "sigterm": signal.SIGTERM,
    "smp_kill": signal.SIGKILL,
    "stop": signal.SIGTERM,
}
_POSITION_BYTES: Final = 64


class Hook(msgspec.Struct, frozen=True):
    """The first time that a phase is reached, at or after an optimizer step.

    Attributes:
        phase: A name that the product passes to `reach`.
        step: The least optimizer step; None for the first time of all.
    """

    phase: str
    step: int | None = None

    def covers(self, phase: str, step: int | None) -> bool:
        """Whether this point of the training is the hook's."""
        if phase != self.phase:
            return False
        return self.step is None or (step is not None and step >= self.step)


class Fault(msgspec.Struct, frozen=True):
    """One thing that goes wrong, once.

    Attributes:
        kind: ``smp_kill`` kills the rank's snapshot process, ``stop`` is a SIGTERM to who started
            the rank; the others hit the rank itself. ``hang`` has the thread that comes to the hook
            wait for ever.
        rank: Global rank.
        at: A hook, or the seconds after which the parent lets it happen by `Declaration.strike`.
    """

    kind: Kind
    rank: int
    at: Hook | float

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            msg = f"fault kind {self.kind!r} is not one of {', '.join(get_args(Kind))}"
            raise ValueError(msg)
        if self.rank < 0:
            msg = f"fault rank {self.rank} is negative; ranks count from 0"
            raise ValueError(msg)
        if not isinstance(self.at, Hook):
            if not 0 <= self.at < float("inf"):
                msg = f"a fault cannot happen after {self.at} s; use 0 or more"
                raise ValueError(msg)
            if self.kind not in _SIGNALS:
                msg = f"{self.kind!r} cannot come from outside: bind it to a Hook"
                raise ValueError(msg)


class Fired(msgspec.Struct, frozen=True):
    """One line of the record.

    Attributes:
        fault: Index of the fault in its declaration.
        kind: See `Fault.kind`.
        rank: See `Fault.rank`.
        pid: The process that was hit.
        phase: The phase that it had reached last; None if it had reached none.
        step: The optimizer step of that phase, where it has one.
        time: Seconds since the Unix epoch.
    """

    fault: int
    kind: Kind
    rank: int
    pid: int
    phase: str | None
    step: int | None
    time: float


class Declaration(msgspec.Struct, frozen=True):
    """Faults, and the file that remembers which of them have happened.

    Attributes:
        faults: At most one of them happens at a time, in this order.
        record: Absolute path. Beside it lies one small file per process that was hit or might
            have been: the phase it had reached.
    """

    faults: tuple[Fault, ...]
    record: str

    def __post_init__(self) -> None:
        if not Path(self.record).is_absolute():
            msg = f"the record {self.record!r} must be an absolute path: ranks may change directory"
            raise ValueError(msg)

    def environ(self) -> dict[str, str]:
        """The variable to start the training with."""
        return {ENV: msgspec.json.encode(self).decode()}

    def fired(self) -> list[Fired]:
        """What has happened so far, in order."""
        try:
            lines = Path(self.record).read_bytes().splitlines()
        except FileNotFoundError:
            return []
        return [msgspec.json.decode(line, type=Fired) for line in lines]

    def assert_fired(self) -> None:
        """Check that every fault has happened.

        Raises:
            FaultNotFiredError: One has not; the message names it.
        """
        seen = {fired.fault for fired in self.fired()}
        missing = [str(f) for i, f in enumerate(self.faults) if i not in seen]
        if missing:
            msg = (
                f"{len(missing)} of {len(self.faults)} faults never happened: {'; '.join(missing)}"
            )
            raise FaultNotFiredError(msg)

    def strike(self, pid: int, fault: Fault) -> Fired:
        """Let a fault happen to a process now, from outside.

        The process is frozen first, so that the phase recorded is the one it dies in.

        Args:
            pid: The rank's process; its snapshot process for ``smp_kill``, or that which started it
                for ``stop``.
            fault: One of the declared faults that has not happened yet.

        Raises:
            ProcessLookupError: The process is gone; nothing is recorded.
            ValueError: The fault is not declared, has happened, or cannot come from outside.
        """
        seen = {fired.fault for fired in self.fired()}
        open_ = [i for i, f in enumerate(self.faults) if f == fault and i not in seen]
        if not open_ or fault.kind not in _SIGNALS:
            msg = f"{fault} is not declared, has happened already, or cannot come from outside"
            raise ValueError(msg)
        os.kill(pid, signal.SIGSTOP)
        if _is_zombie(pid):  # takes signals, but nothing can happen to it any more
            raise ProcessLookupError(pid)
        try:
            phase, step = _read_position(self._position_file(pid))
            fired = self._note(open_[0], pid, phase, step)
        except BaseException:
            os.kill(pid, signal.SIGCONT)
            raise
        os.kill(pid, _SIGNALS[fault.kind])
        if fault.kind in ("sigterm", "stop"):
            os.kill(pid, signal.SIGCONT)
        return fired

    def _note(self, index: int, pid: int, phase: str | None, step: int | None) -> Fired:
        """Write one line to the record and wait until it is on the disk."""
        fault = self.faults[index]
        fired = Fired(index, fault.kind, fault.rank, pid, phase, step, time.time())
        fd = os.open(self.record, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, msgspec.json.encode(fired) + b"\n")
            os.fsync(fd)
        finally:
            os.close(fd)
        return fired

    def _position_file(self, pid: int) -> str:
        return f"{self.record}.{pid}"


def _is_zombie(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state == "Z"


def _read_position(path: str) -> tuple[str | None, int | None]:
    try:
        text = Path(path).read_text().rstrip()
    except FileNotFoundError:
        return None, None
    step, phase = text.split(" ", 1)
    return phase, None if step == "-" else int(step)


class _Armed:
    """The declared faults of this process."""

    def __init__(self, declared: Declaration, rank: int, smp_pid: int | None) -> None:
        seen = {fired.fault for fired in declared.fired()}
        self.declared = declared
        self.rank = rank
        self.smp_pid = smp_pid
        self._pending: list[tuple[int, Fault, Hook]] = [
            (i, fault, fault.at)
            for i, fault in enumerate(declared.faults)
            if fault.rank == rank and isinstance(fault.at, Hook) and i not in seen
        ]
        self._position: int | None = None
        self._step: int | None = None

    def reach(self, phase: str, step: int | None) -> None:
        step = self._step = self._step if step is None else step
        if self._position is None:
            path = self.declared._position_file(os.getpid())
            self._position = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        text = f"{'-' if step is None else step} {phase}"
        os.pwrite(self._position, text.ljust(_POSITION_BYTES).encode(), 0)
        for entry in list(self._pending):
            index, fault, hook = entry
            if not hook.covers(phase, step):
                continue
            pid = self._victim(fault.kind)
            if pid is None:  # told later, by `identify`: then it happens at the next chance
                continue
            self._pending.remove(entry)
            self.declared._note(index, pid, phase, step)
            _act(fault, pid)

    def _victim(self, kind: Kind) -> int | None:
        if kind == "smp_kill":
            return self.smp_pid
        return os.getppid() if kind == "stop" else os.getpid()

    def close(self) -> None:
        if self._position is not None:
            os.close(self._position)


def _act(fault: Fault, pid: int) -> None:
    if fault.kind == "exception":
        msg = f"injected fault: {fault}"
        raise RuntimeError(msg)
    if fault.kind == "hang":
        threading.Event().wait()
    if fault.kind == "exit0":
        _leave_early()
    os.kill(pid, _SIGNALS[fault.kind])


def _leave_early() -> NoReturn:
    """Exit with 0 at once, as a script does that calls ``os._exit`` or loses its main thread."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


_armed: _Armed | None = None


def arm(environ: Mapping[str, str]) -> None:
    """Take the declaration from an environment; without one, disarm.

    Importing this module arms it from `os.environ`.

    Raises:
        ConfigError: The declaration cannot be read.
    """
    global _armed  # noqa: PLW0603
    if _armed is not None:
        _armed.close()
        _armed = None
    text = environ.get(ENV)
    if not text:
        return
    try:
        declared = msgspec.json.decode(text, type=Declaration)
    except msgspec.MsgspecError as error:
        msg = f"{ENV} is not a declaration of faults: {error}; make it with Declaration.environ()"
        raise ConfigError(msg) from error
    _armed = _Armed(declared, int(environ.get("RANK", "0")), None)


def identify(*, rank: int, smp_pid: int | None = None) -> None:
    """Say which rank this process is, and who its snapshot process is.

    Without it the rank is that of the environment variable RANK, else 0.
    """
    global _armed  # noqa: PLW0603
    if _armed is not None:
        _armed.close()
        _armed = _Armed(_armed.declared, rank, smp_pid)


def reach(phase: str, *, step: int | None = None) -> None:
    """Say that this process has come to a phase; a fault declared for it happens here.

    Costs one comparison when nothing is declared.

    Args:
        phase: One of `PHASES`, or another name that the product documents.
        step: Optimizer step; None where the product does not know: the one last said counts.
    """
    if _armed is not None:
        _armed.reach(phase, step)


def random_faults(
    seed: int,
    n: int,
    *,
    ranks: int,
    steps: range,
    phases: Sequence[str] = PHASES,
    kinds: Sequence[Kind] = ("sigkill",),
) -> list[Fault]:
    """Draw faults bound to phases, each phase as often as the others (give or take one).

    Args:
        seed: The same seed draws the same faults.
        n: How many.
        ranks: World size.
        steps: The steps to draw from.
        phases: The phases to draw from.
        kinds: The kinds to draw from.
    """
    rng = random.Random(seed)  # noqa: S311
    order = [phases[i % len(phases)] for i in range(n)]
    rng.shuffle(order)
    return [
        Fault(rng.choice(kinds), rng.randrange(ranks), Hook(phase, rng.choice(steps)))
        for phase in order
    ]


def random_instants(
    seed: int,
    n: int,
    *,
    ranks: int,
    within_s: tuple[float, float],
    kinds: Sequence[Kind] = ("sigkill",),
) -> list[Fault]:
    """Draw faults at instants, for `Declaration.strike`.

    Args:
        seed: The same seed draws the same faults.
        n: How many.
        ranks: World size.
        within_s: Earliest and latest instant, in seconds.
        kinds: The kinds to draw from; only such as can come from outside.
    """
    rng = random.Random(seed)  # noqa: S311
    return [
        Fault(rng.choice(kinds), rng.randrange(ranks), rng.uniform(*within_s)) for _ in range(n)
    ]


arm(os.environ)
