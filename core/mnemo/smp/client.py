"""The trainer's (and every tool's) side of the conversation with the SMP."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec
import psutil

from mnemo import errors
from mnemo.errors import MnemoError, ProtocolError, SmpError
from mnemo.smp import messages as m
from mnemo.smp.paths import RunPaths
from mnemo.transport import auth
from mnemo.transport.local import BlockingChannel, ConnectionLostError, close_all

if TYPE_CHECKING:
    from typing_extensions import Self

R = TypeVar("R", bound=m.Message)

REPLY_TIMEOUT_S: Final = 120.0


class SmpClient:
    """One authenticated connection; requests from several threads take turns."""

    def __init__(self, channel: BlockingChannel, pid: int) -> None:
        self._channel = channel
        self._lock = threading.Lock()
        self.pid = pid
        """Process id of the SMP."""

    @classmethod
    def connect(
        cls, paths: RunPaths, secret: bytes, timeout_s: float = REPLY_TIMEOUT_S
    ) -> SmpClient:
        """Connect and prove the secret both ways.

        Raises:
            ConnectionLostError: Nobody answers.
            SmpError: The proof fails on either side, or it is of another version.
        """
        record = paths.read_record()
        channel = BlockingChannel(Path(record.socket) if record else paths.socket, timeout_s)
        try:
            challenge = _receive(channel, m.Challenge)
            if challenge.protocol != m.PROTOCOL:
                pid = record.pid if record else "that answers"
                raise ProtocolError(
                    f"the snapshot process speaks protocol {challenge.protocol}, this mnemo "
                    f"{m.PROTOCOL}: it belongs to another version. Go on with that one, or kill "
                    f"process {pid}, and what it keeps with it"
                )
            nonce = auth.new_nonce()
            channel.send(
                m.encode(m.Hello(nonce, auth.proof(secret, "client", nonce, challenge.nonce)))
            )
            welcome = _receive(channel, m.Welcome)
            if not auth.verify(secret, "server", challenge.nonce, nonce, welcome.proof):
                raise SmpError(
                    "the process that answers does not hold the run's secret: not talking to it"
                )
        except BaseException:
            channel.close()
            raise
        return cls(channel, welcome.pid)

    def ask(
        self,
        request: m.Message,
        answer: type[R],
        fds: Sequence[int] = (),
        *,
        timeout_s: float = REPLY_TIMEOUT_S,
    ) -> tuple[R, list[int]]:
        """Send a request and wait for its reply.

        Returns:
            The reply and the descriptors that came with it, which the caller owns.

        Raises:
            ConnectionLostError: No answer came; the connection is closed.
            MnemoError: What the SMP refused the request with, as its own type.
        """
        with self._lock:
            try:
                self._channel.settimeout(timeout_s)
                self._channel.send(m.encode(request), fds)
                data, received = self._channel.receive()
            except ConnectionLostError:
                self._channel.close()  # a late answer must not be taken for the next one's
                raise
        try:
            return _expect(data, answer), received
        except MnemoError:
            close_all(received)
            raise

    def tell(
        self, request: m.Message, fds: Sequence[int] = (), *, timeout_s: float = REPLY_TIMEOUT_S
    ) -> None:
        """Send a request that is only acknowledged."""
        self.ask(request, m.Done, fds, timeout_s=timeout_s)

    def is_lost(self) -> bool:
        """Whether the SMP has gone; False while another thread talks to it, which will notice."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            return not self._channel.is_open()
        finally:
            self._lock.release()

    def status(self, *, timeout_s: float = REPLY_TIMEOUT_S) -> dict[str, Any]:
        """The SMP's status as plain data."""
        reply, _ = self.ask(m.Status(), m.StatusReply, timeout_s=timeout_s)
        return msgspec.json.decode(reply.body)  # type: ignore[no-any-return]

    def wait_for_end(self, timeout_s: float = 10.0) -> bool:
        """Wait until the SMP has ended, after it was asked to; False if it takes longer.

        One that its parent has not collected has ended too: in containers that may never happen.
        """
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        except (AttributeError, OSError):  # a kernel before 5.3, or a sandbox without it
            gone, _ = psutil.wait_procs(_processes(self.pid), timeout_s)
            return bool(gone) or not _processes(self.pid)
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            return bool(poll.poll(timeout_s * 1000))
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close the connection, which stays open in processes that were forked with it."""
        self._channel.close()

    def hang_up(self) -> None:
        """End the connection everywhere."""
        self._channel.hang_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _processes(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [psutil.Process(pid)]
    return []


def _receive(channel: BlockingChannel, kind: type[R]) -> R:
    data, fds = channel.receive()
    close_all(fds)
    return _expect(data, kind)


def _expect(data: bytes, kind: type[R]) -> R:
    reply = m.decode_reply(data)
    if isinstance(reply, m.Failure):
        raise error_of(reply)
    if not isinstance(reply, kind):
        raise ProtocolError(f"{type(reply).__name__} where {kind.__name__} was expected")
    return reply


def error_of(failure: m.Failure) -> MnemoError:
    """The error that ``failure`` tells of."""
    kind = getattr(errors, failure.kind, SmpError)
    if not (isinstance(kind, type) and issubclass(kind, MnemoError)):
        kind = SmpError
    return kind(failure.text)
