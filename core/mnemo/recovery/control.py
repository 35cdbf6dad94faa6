"""What `mnemo run` and a rank tell each other, so that one rank is replaced while others stay.

Each rank has one end of a socket pair (`CONTROL_VARIABLE`). From the moment that all ranks have
said `Replaceable`, the loss of one begins a *membership epoch*: the agent tells the others `Lost`,
and starts a process in its place that finds `JOIN_VARIABLE` in its environment. Once every rank has
said `Back`, the loss is over; at a `Cannot` all ranks restart from the memory of the snapshot
process, as without all this. Meanwhile the agent asks what they do (`Ask`, `Doing`), so that it
finds one that hangs.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec

from mnemo.config.uncaught import AGENT_VARIABLE
from mnemo.errors import ProtocolError
from mnemo.recovery import dying

if TYPE_CHECKING:
    from collections.abc import Mapping

CONTROL_VARIABLE: Final = "MNEMO_CONTROL_FD"
"""File descriptor of a rank's end."""
JOIN_VARIABLE: Final = "MNEMO_JOIN"
"""The membership epoch in which this process takes a lost rank's place; set in such a process only.

A warm standby has imported everything before it gets it: never read it while importing."""

_MOST_BYTES: Final = 1 << 16


class Replaceable(msgspec.Struct, frozen=True, tag="replaceable"):
    """Rank to agent: from here on this rank can be replaced, or not any more.

    A process that has taken a rank's place says so for itself, before its `Back` or later.

    Attributes:
        yes: Whether it can.
        why: Why not.
        left: It has left its training, perhaps by an exception: if this process fails now, another
            one can still begin where it was.
    """

    yes: bool
    why: str = ""
    left: bool = False


class Back(msgspec.Struct, frozen=True, tag="back"):
    """Rank to agent: its groups are whole again, and it goes on.

    Attributes:
        epoch: The membership epoch that it goes on in.
        tick: The boundary at which the new process began.
        phases_ms: What took how long, for the journal.
        source: The rank that the state came from; None where this rank needed none.
        inexact: Of a new process, what it cannot have as the lost one had it; empty if nothing.
    """

    epoch: int
    tick: int
    phases_ms: dict[str, float] = {}
    source: int | None = None
    inexact: str = ""


class Cannot(msgspec.Struct, frozen=True, tag="cannot"):
    """Rank to agent: it cannot go on within the running job.

    Attributes:
        epoch: The membership epoch that this is about.
        why: What is in the way.
    """

    epoch: int
    why: str


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """Rank to agent, by `connect`: by this its death is noticed at once.

    Attributes:
        fd: What `mnemo.recovery.dying.hold` gave.
    """

    fd: int


class Lost(msgspec.Struct, frozen=True, tag="lost"):
    """Agent to rank: processes are gone, and others come in their places.

    Also to who comes in their places: the first that it is told. If others are lost before it is
    back, it is told again, and joins in that epoch, together with what comes in their places.

    Attributes:
        epoch: The new membership epoch, greater than all before.
        ranks: All ranks that are not back yet.
        why: What happened, for people.
        members: For each rank, the membership epoch since which its process is there.
    """

    epoch: int
    ranks: tuple[int, ...]
    why: str
    members: tuple[int, ...]


class Ask(msgspec.Struct, frozen=True, tag="ask"):
    """Agent to rank, every few seconds: what are you doing?

    Attributes:
        number: Of the question; the answer repeats it.
        stacks: The file that all threads' stacks are to be written to; empty for none.
    """

    number: int
    stacks: str = ""


class InGroup(msgspec.Struct, frozen=True, array_like=True):
    """Collectives of one group: how many one rank has asked for, and how many of them have ended.

    Attributes:
        ranks: All members.
        asked: Counted as on the other members.
        ended: Less than asked: it waits, or will.
    """

    ranks: tuple[int, ...]
    asked: int
    ended: int


class Doing(msgspec.Struct, frozen=True, tag="doing"):
    """Rank to agent: what it has done until now.

    Attributes:
        number: Of the question.
        tick: That of its last boundary.
        groups: What it has done in each process group, by name.
        messages: Messages that it has asked for.
        place: Where in the program the main thread is.
        debugged: A debugger has stopped it there.
    """

    number: int
    tick: int
    groups: dict[str, InGroup] = {}
    messages: int = 0
    place: str = ""
    debugged: bool = False


Message: TypeAlias = Alive | Replaceable | Back | Cannot | Lost | Ask | Doing

_decoder = msgspec.json.Decoder[Message](Message)


class Channel:
    """One end. Messages stay whole; any thread may `tell`, one at a time may `receive`.

    Args:
        sock: Of type SOCK_SEQPACKET; owned from here on.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    @classmethod
    def pair(cls) -> tuple[Channel, socket.socket]:
        """The agent's end, which does not wait, and the socket for a rank."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        return cls(ours), theirs

    def fileno(self) -> int:
        """To wait for messages among other things."""
        return self._sock.fileno()

    def tell(self, message: Message) -> bool:
        """Send it.

        Returns:
            Whether it is on its way; not if the other end is gone, or, where this end does not
            wait, reads nothing.
        """
        try:
            self._sock.send(msgspec.json.encode(message))
        except OSError:
            return False
        return True

    def receive(self) -> Message | None:
        """Wait for the next message; None at the end, when the other end or this one is closed.

        Raises:
            BlockingIOError: There is none, and this end does not wait.
            ProtocolError: It is none of these messages.
        """
        try:
            data = self._sock.recv(_MOST_BYTES)
        except BlockingIOError:
            raise
        except OSError:
            return None
        if not data:
            return None
        try:
            message: Message = _decoder.decode(data)
        except msgspec.MsgspecError as error:
            msg = f"no message of the control channel: {data[:200]!r} ({error})"
            raise ProtocolError(msg) from error
        return message

    def close(self) -> None:
        """Hang up; a `receive` that waits in another thread ends."""
        with contextlib.suppress(OSError):  # hung up at the other end already
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def connect(environ: Mapping[str, str] | None = None) -> Channel | None:
    """This rank's end, if the agent that started this very process gave it one.

    Not in what a rank starts, which inherits the variable but neither the socket nor the parent.
    Once in a process, and best in its main thread, since the agent notices the death of a thread
    sooner than that of a process.

    Args:
        environ: The environment; None is that of this process.
    """
    environ = os.environ if environ is None else environ
    fd = environ.get(CONTROL_VARIABLE, "")
    agent = environ.get(AGENT_VARIABLE, "").partition("-")[0]
    if not fd.isdecimal() or agent != str(os.getppid()):
        return None
    with contextlib.suppress(OSError):  # the number is something else's by now
        sock = socket.fromfd(int(fd), socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if _made_by(sock) == os.getppid():
            os.set_inheritable(int(fd), False)
            channel = Channel(sock)
            if threading.current_thread() is threading.main_thread():
                with contextlib.suppress(OSError):
                    channel.tell(Alive(dying.hold()))
            return channel
        sock.close()
    return None


def joins(environ: Mapping[str, str] | None = None) -> int | None:
    """The membership epoch in which this process takes a lost rank's place; None if it does not.

    Args:
        environ: The environment; None is that of this process.
    """
    epoch = (os.environ if environ is None else environ).get(JOIN_VARIABLE, "")
    return int(epoch) if epoch else None


def _made_by(sock: socket.socket) -> int | None:
    """The process that made the pair that ``sock`` belongs to; None if it is no such socket."""
    layout = "3i"
    try:
        found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(layout))
    except OSError:
        return None
    pid: int = struct.unpack(layout, found)[0]
    return pid
