"""Two nodes prove to each other that they are of one run, and agree on a key.

Three messages, the listener's first, after ISO/IEC 9798-4: `Challenge`, `Hello`, `Welcome`. Each
proof is an HMAC-SHA256 by the run's secret over both nonces, the prover's role, both nodes' names,
the run's id and the protocol's version. So a proof is good for one exchange (nonces), one direction
(role), two nodes and one run; time is not part of it. The secret never travels.

The key is made of the secret and all that the proofs cover, one for each direction. It signs what
follows: `Session`. Nothing here reads or writes.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal

import msgspec

from mnemo.errors import AuthenticationError, FrameError
from mnemo.transport import auth
from mnemo.transport.frames import PROTOCOL, Body, Head, Limits, decode

LIMITS: Final = Limits(message=1024, payload=0)
"""What is taken from somebody who has not proved anything."""

_NAME: Final = r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"
_Name = Annotated[str, msgspec.Meta(pattern=_NAME)]
_Nonce = Annotated[bytes, msgspec.Meta(min_length=auth.NONCE_BYTES, max_length=auth.NONCE_BYTES)]
_Proof = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
_Role = Literal["client", "server"]


class Challenge(msgspec.Struct, tag=True, frozen=True):
    """The listener's first word: its name, and what has to be signed."""

    node: _Name
    nonce: _Nonce


class Hello(msgspec.Struct, tag=True, frozen=True):
    """The answer: name, proof, and what the listener has to sign."""

    node: _Name
    nonce: _Nonce
    proof: _Proof


class Welcome(msgspec.Struct, tag=True, frozen=True):
    """The listener's proof."""

    proof: _Proof


class Refusal(msgspec.Struct, tag=True, frozen=True):
    """Either side: what came is not accepted."""


REFUSAL: Final = msgspec.msgpack.encode(Refusal())


_challenges: Final = msgspec.msgpack.Decoder(Challenge)
_answers: Final = msgspec.msgpack.Decoder(Hello)
_replies: Final = msgspec.msgpack.Decoder(Welcome | Refusal)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who this node is.

    Attributes:
        node: Name, the same for as long as the run lasts, different for each node.
        run: Id of the run.
        secret: The run's secret; see `mnemo.transport.auth.load_or_create_secret`.
    """

    node: str
    run: str
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not re.fullmatch(_NAME, self.node):
            raise ValueError(
                f"{self.node!r} is no name of a node: up to 64 letters, digits, dots, dashes and "
                "underscores"
            )
        if len(self.secret) < auth.NONCE_BYTES:
            raise ValueError(f"a secret of {len(self.secret)} bytes is too short")


class Session:
    """Signs what this side sends and checks what it receives, each frame in its place.

    A frame that is changed, left out, repeated, or sent back where it comes from does not pass.
    """

    def __init__(self, send_key: bytes, receive_key: bytes, node: str, address: str) -> None:
        """Begin, with nothing sent.

        Args:
            send_key: Key of this side.
            receive_key: Key of the other side.
            node: The other side's name, proved.
            address: Where that is.
        """
        self.node = node
        self.name = f"{node} at {address}"
        """Who the other side is, for messages."""
        self._send_key = send_key
        self._receive_key = receive_key
        self._sent = 0
        self._received = 0

    def sign(self, signed: bytes) -> bytes:
        """The MAC of the next frame's header and message."""
        self._sent += 1
        return _tag(self._send_key, self._sent, b"h", signed)

    def sign_payload(self, digest: int) -> bytes:
        """The MAC of the payload of the frame signed last."""
        return _tag(self._send_key, self._sent, b"p", digest.to_bytes(8, "little"))

    def check(self, head: Head) -> None:
        """Let the next frame's header and message pass.

        Raises:
            FrameError: They are not what the other side signed.
        """
        self._received += 1
        tag = _tag(self._receive_key, self._received, b"h", head.signed)
        if not hmac.compare_digest(tag, head.tag):
            raise FrameError(self.name, "sent a message whose MAC is wrong")

    def check_payload(self, body: Body) -> None:
        """Let the payload of the frame checked last pass.

        Raises:
            FrameError: It is not what the other side sent.
        """
        digest = body.digest.to_bytes(8, "little")
        if not hmac.compare_digest(_tag(self._receive_key, self._received, b"p", digest), body.tag):
            raise FrameError(self.name, "sent a payload that did not arrive as it was sent")


class ListenerSide:
    """What a listener says to one who connects."""

    def __init__(self, me: Identity, caller: str) -> None:
        """Begin.

        Args:
            me: This node.
            caller: Address of the one who connects.
        """
        self._me = me
        self._caller = caller
        self._nonce = auth.new_nonce()

    def challenge(self) -> bytes:
        """The first message."""
        return msgspec.msgpack.encode(Challenge(self._me.node, self._nonce))

    def welcome(self, answer: bytes) -> tuple[bytes, Session]:
        """Judge the answer to the challenge.

        Returns:
            The last message, and the session with the other node.

        Raises:
            AuthenticationError: It proves nothing; `REFUSAL` is what to say.
            FrameError: It is no answer.
        """
        hello = decode(answer, _answers, self._caller)
        exchange = _Exchange(self._me, self._nonce, hello.nonce, self._me.node, hello.node)
        if hello.node == self._me.node:
            raise AuthenticationError(
                self._caller, f"calls itself {hello.node}, which is this node: names are unique"
            )
        if not hmac.compare_digest(exchange.proof("client"), hello.proof):
            raise AuthenticationError(
                self._caller, f"not authenticated: {_unproved(hello.node, self._me.run)}"
            )
        client, server = exchange.keys()
        welcome = msgspec.msgpack.encode(Welcome(exchange.proof("server")))
        return welcome, Session(server, client, hello.node, self._caller)


class CallerSide:
    """What a node says to the listener that it connects to."""

    def __init__(self, me: Identity, listener: str, expect: str | None) -> None:
        """Begin.

        Args:
            me: This node.
            listener: Address of the one that listens.
            expect: The name it should have; None if any will do.
        """
        self._me = me
        self._address = listener
        self._listener = f"{expect} at {listener}" if expect else listener
        self._expect = expect
        self._exchange: _Exchange | None = None

    def answer(self, challenge: bytes) -> bytes:
        """Answer the listener's first message.

        Raises:
            AuthenticationError: Another node listens there.
            FrameError: It is no challenge.
        """
        theirs = decode(challenge, _challenges, self._listener)
        if self._expect not in (None, theirs.node):
            raise AuthenticationError(
                self._listener, f"{theirs.node} answers there, not {self._expect}"
            )
        if theirs.node == self._me.node:
            raise AuthenticationError(
                self._listener, f"calls itself {theirs.node}, which is this node: names are unique"
            )
        nonce = auth.new_nonce()
        self._exchange = _Exchange(self._me, theirs.nonce, nonce, theirs.node, self._me.node)
        return msgspec.msgpack.encode(Hello(self._me.node, nonce, self._exchange.proof("client")))

    def finish(self, reply: bytes) -> Session:
        """Judge the listener's last message.

        Returns:
            The session with the other node.

        Raises:
            AuthenticationError: It proves nothing, or refuses this node.
            FrameError: It is no reply.
        """
        exchange = self._exchange
        assert exchange is not None
        last = decode(reply, _replies, self._listener)
        if isinstance(last, Refusal):
            raise AuthenticationError(
                self._listener,
                f"not authenticated: {_unproved(self._me.node, self._me.run)}, says "
                f"{exchange.listener}",
            )
        if not hmac.compare_digest(exchange.proof("server"), last.proof):
            raise AuthenticationError(
                self._listener, f"not authenticated: {_unproved(exchange.listener, self._me.run)}"
            )
        client, server = exchange.keys()
        return Session(client, server, exchange.listener, self._address)


@dataclass(frozen=True)
class _Exchange:
    """What both sides know of one handshake, and what follows from it."""

    me: Identity
    listener_nonce: bytes
    caller_nonce: bytes
    listener: str
    caller: str

    def _mac(self, purpose: str) -> bytes:
        return auth.mac(
            self.me.secret,
            f"mnemo-peer|{PROTOCOL}|{purpose}",
            self.listener_nonce,
            self.caller_nonce,
            self.listener.encode(),
            self.caller.encode(),
            self.me.run.encode(),
        )

    def proof(self, role: _Role) -> bytes:
        return self._mac(f"proof|{role}")

    def keys(self) -> tuple[bytes, bytes]:
        return self._mac("key|client"), self._mac("key|server")


def _unproved(node: str, run: str) -> str:
    return (
        f"{node} has not the secret of run {run} (the same MNEMO_SECRET_FILE and run id are needed "
        "on all nodes)"
    )


def _tag(key: bytes, number: int, part: bytes, data: bytes) -> bytes:
    return hmac.digest(key, number.to_bytes(8, "little") + part + data, hashlib.sha256)
