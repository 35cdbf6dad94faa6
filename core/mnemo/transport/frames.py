"""Frames between nodes: what the bytes on the wire mean, without any reading or writing.

Integers are little-endian. A frame is::

    offset  size  field
         0     4  magic, "mnmo"
         4     2  protocol version
         6     1  kind: 1 handshake, 2 message, 3 ping
         7     1  zero
         8     4  m, bytes of the message
        12     8  p, bytes of the payload
        20     m  message, msgpack
      20+m    32  MAC of all before it                   (not in a handshake)
               p  payload                                (only if p > 0)
              32  MAC of the payload's xxh3-64 digest    (only if p > 0)

Magic and version keep their place in every later version. A handshake has a message and no payload,
a message may have one, a ping has neither.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple, TypeVar

import msgspec
import xxhash

from mnemo.errors import FrameError

M = TypeVar("M")

PROTOCOL: Final = 1
"""Version of frames and handshake."""
MAGIC: Final = b"mnmo"
HEADER: Final = struct.Struct("<4sHBBIQ")
TAG_BYTES: Final = 32
PIECE: Final = 4 << 20
"""Most bytes of a payload that are moved at once; see `Parser.buffer`."""


class Kind(IntEnum):
    """What a frame is for."""

    HANDSHAKE = 1
    MESSAGE = 2
    PING = 3


@dataclass(frozen=True, slots=True)
class Limits:
    """What one side takes from the other, in bytes. A longer frame is refused unread."""

    message: int = 1 << 20
    payload: int = 64 << 20


class Head(NamedTuple):
    """The part of a frame before its payload."""

    kind: Kind
    signed: bytes
    """Header and message: what the MAC is of."""
    message: bytes
    tag: bytes
    """The MAC; empty in a handshake."""
    payload_bytes: int


class Body(NamedTuple):
    """The payload of a frame, which lies where `Parser.take` said."""

    digest: int
    """xxh3-64 of what arrived."""
    tag: bytes
    """The MAC, which is of the digest of what was sent."""


def encode(kind: Kind, message: bytes, payload_bytes: int, limits: Limits) -> bytes:
    """Header and message of a frame.

    Raises:
        ValueError: It is longer than ``limits``.
    """
    if len(message) > limits.message or payload_bytes > limits.payload:
        raise ValueError(
            f"a message of {len(message)} bytes with a payload of {payload_bytes} is too long: at "
            f"most {limits.message} and {limits.payload}"
        )
    return HEADER.pack(MAGIC, PROTOCOL, kind, 0, len(message), payload_bytes) + message


def decode(message: bytes, decoder: msgspec.msgpack.Decoder[M], sender: str) -> M:
    """Read a message.

    Raises:
        FrameError: It is none of those that ``decoder`` knows.
    """
    try:
        return decoder.decode(message)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        # Quoted and cut: the text may repeat what a stranger sent.
        raise FrameError(sender, f"sent what is no message here: {str(error)[:200]!r}") from error


class Parser:
    """Takes the bytes of one connection as they arrive.

    Whoever reads puts bytes into `buffer` and says by `filled` how many. A payload goes straight
    into memory of the caller's choice: after a `Head` that announces one, `take` has to name it.
    """

    def __init__(self, limits: Limits, sender: str) -> None:
        """Expect a frame.

        Args:
            limits: Longest message and payload.
            sender: Who sends, for messages.
        """
        self._limits = limits
        self._sender = sender
        self._scratch = bytearray(0)
        self._digest = xxhash.xxh3_64()
        self._expect_frame()

    def _expect(self, target: memoryview | None, size: int, then: Callable[[], _Event]) -> None:
        """Fill ``target`` (None: nothing is kept) with ``size`` bytes, then go on."""
        self._target = target
        self._left = size
        self._then = then

    def _expect_frame(self) -> None:
        self._raw = bytearray(HEADER.size)
        self._in_payload = False
        self._expect(memoryview(self._raw), HEADER.size, self._header)

    @property
    def between_frames(self) -> bool:
        """Whether no byte of a next frame has come yet."""
        return self._left == HEADER.size and self._then == self._header

    def buffer(self) -> memoryview:
        """Where the next bytes go: 1 to `PIECE` of them.

        Raises:
            ValueError: A payload comes and `take` has not been called.
        """
        if not self._left:
            raise ValueError("take() has to say where the payload goes")
        if self._target is None:
            return memoryview(self._scratch)[: self._left]
        start = len(self._target) - self._left
        return self._target[start : start + PIECE]

    def filled(self, count: int) -> Head | Body | None:
        """Take note of ``count`` bytes in the `buffer` got last.

        Returns:
            What is complete by them; None where more is needed.

        Raises:
            FrameError: They are no frame, or one that is too long. The connection is of no use
                from here on.
        """
        if self._in_payload:
            self._digest.update(self.buffer()[:count])
        self._left -= count
        return None if self._left else self._then()

    def take(self, target: memoryview | None) -> None:
        """Name the memory for the payload that the last `Head` announced.

        Args:
            target: Writable, contiguous, of exactly that many bytes. None: it is not wanted, and
                dropped as it comes.

        Raises:
            ValueError: The memory does not fit.
        """
        if target is not None:
            target = target.cast("B") if target.c_contiguous else target
            if target.readonly or not target.c_contiguous or target.nbytes != self._payload_bytes:
                raise ValueError(
                    f"a payload of {self._payload_bytes} bytes does not go into {target.nbytes} "
                    f"(writable: {not target.readonly}, contiguous: {target.c_contiguous})"
                )
        elif not self._scratch:
            self._scratch = bytearray(min(PIECE, self._limits.payload))
        self._in_payload = True
        self._digest.reset()
        self._expect(target, self._payload_bytes, self._payload)

    def _header(self) -> None:
        magic, version, kind, zero, message_bytes, payload_bytes = HEADER.unpack(self._raw)
        if magic != MAGIC:
            raise FrameError(self._sender, f"sent what is no frame: it begins {magic!r}")
        if version != PROTOCOL:
            raise FrameError(
                self._sender,
                f"speaks protocol version {version}, this node version {PROTOCOL}: install the "
                "same version of mnemo on all nodes",
            )
        if (
            kind not in _KINDS
            or zero
            or (message_bytes == 0) != (kind == Kind.PING)
            or (payload_bytes and kind != Kind.MESSAGE)
        ):
            raise FrameError(
                self._sender,
                f"sent a frame that cannot be: kind {kind}, reserved {zero}, message of "
                f"{message_bytes} bytes, payload of {payload_bytes}",
            )
        if message_bytes > self._limits.message or payload_bytes > self._limits.payload:
            raise FrameError(
                self._sender,
                f"sent a message of {message_bytes} bytes with a payload of {payload_bytes}; at "
                f"most {self._limits.message} and {self._limits.payload} are taken",
            )
        self._kind = Kind(kind)
        self._tag_bytes = 0 if kind == Kind.HANDSHAKE else TAG_BYTES
        self._payload_bytes = payload_bytes
        rest = message_bytes + self._tag_bytes
        self._raw = self._raw + bytes(rest)
        self._expect(memoryview(self._raw)[HEADER.size :], rest, self._head)

    def _head(self) -> Head:
        end = len(self._raw) - self._tag_bytes
        head = Head(
            self._kind,
            bytes(self._raw[:end]),
            bytes(self._raw[HEADER.size : end]),
            bytes(self._raw[end:]),
            self._payload_bytes,
        )
        if not self._payload_bytes:
            self._expect_frame()
        return head

    def _payload(self) -> None:
        self._in_payload = False
        self._raw = bytearray(TAG_BYTES)
        self._expect(memoryview(self._raw), TAG_BYTES, self._body)

    def _body(self) -> Body:
        body = Body(self._digest.intdigest(), bytes(self._raw))
        self._expect_frame()
        return body


_Event = Head | Body | None
_KINDS: Final = frozenset(Kind)
