"""Who a listener lets in, and that garbage ends the connection that it comes by, no other."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
import transport_lab as lab
from transport_lab import (
    DECODER,
    QUICK,
    Messages,
    Note,
    identity,
    listening,
    receive,
    receive_all,
    run,
    still_works,
)

from mnemo.errors import (
    AuthenticationError,
    FrameError,
    PeerError,
    PeerLostError,
    PeerTimeoutError,
)
from mnemo.transport import auth, frames
from mnemo.transport.address import Address, address_of, listen
from mnemo.transport.endpoints import HALF_OPEN, connect
from mnemo.transport.frames import HEADER, TAG_BYTES, Kind, Limits
from mnemo.transport.handshake import ListenerSide
from mnemo.transport.peer import Peer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from transport_lab import Stranger

    from mnemo.transport.handshake import Session


# --- who gets in ----------------------------------------------------------------------------------


def test_the_secret_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret"
    path.write_bytes(os.urandom(32))
    path.chmod(0o600)
    monkeypatch.setenv("MNEMO_SECRET_FILE", str(path))
    secret = auth.load_or_create_secret(tmp_path / "not made")

    async def main() -> None:
        async with listening(secret=secret) as b:
            me = identity("a", secret=secret)
            peer = await connect(me, b.listener.address, DECODER, expect="b")
            await still_works(peer, await b.peer())
            await peer.close()

    run(main())
    assert not (tmp_path / "not made").exists()


@pytest.mark.parametrize(
    "wrong", [{"secret": bytes(32)}, {"run": "another"}], ids=["secret", "run"]
)
def test_without_the_secret_nobody_gets_in(
    wrong: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with listening() as b:
            for _ in range(5):
                with pytest.raises(AuthenticationError, match="not authenticated") as caught:
                    await connect(
                        identity("a", **wrong),  # type: ignore[arg-type]
                        b.listener.address,
                        DECODER,
                        expect="b",
                    )
                assert str(caught.value).startswith(f"b at {b.listener.address}: ")
            assert b.listener.refused == 5
            assert b.peers.empty()
            good = await connect(identity("a"), b.listener.address, DECODER)
            await still_works(good, await b.peer())
            await good.close()

    with caplog.at_level(logging.DEBUG, "mnemo"):
        run(main())
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1, "strangers do not fill the log"
    assert "not authenticated: a has not the secret of run lab" in warnings[0].getMessage()
    for secret in (lab.SECRET, bytes(32)):
        assert secret.hex() not in caplog.text
        assert repr(secret) not in caplog.text


def test_another_node_answers() -> None:
    async def main() -> None:
        async with listening("c") as c:
            with pytest.raises(AuthenticationError, match="c answers there, not b"):
                await connect(identity("a"), c.listener.address, DECODER, expect="b")

    run(main())


def test_a_replayed_handshake() -> None:
    async def main() -> None:
        async with listening() as b:
            spoken = b""
            async with lab.stranger(b.listener.address) as honest:
                say = honest.write

                async def record(data: bytes) -> None:
                    nonlocal spoken
                    spoken += data
                    await say(data)

                honest.write = record  # type: ignore[method-assign]
                session = await honest.prove(identity("a"))
                await record(lab.frame(session, Note("pay")))
                peer = await b.peer()
                assert (await receive(peer)).message == Note("pay")
            async with lab.stranger(b.listener.address) as replayed:
                await replayed.hear()
                await replayed.write(spoken)
                assert await replayed.ends()
            assert b.peers.empty()
            assert b.listener.refused == 1

    run(main())


def test_a_reflected_challenge() -> None:
    """Whoever has no secret connects to b twice and lets b answer itself."""

    async def main() -> None:
        async with listening() as b, lab.stranger(b.listener.address) as first:
            async with lab.stranger(b.listener.address) as second:
                await second.say(await first.hear())
                assert await second.ends()
            await first.say(b"")
            assert await first.ends()
            assert b.peers.empty()

    run(main())


def test_a_relayed_handshake_opens_nothing() -> None:
    """One in the middle can pass proofs on, and then neither change nor add a message."""

    async def main() -> None:
        async with listening() as b:

            async def relay(caller: Stranger) -> None:
                async with lab.stranger(b.listener.address) as to_b:
                    await caller.say(await to_b.hear())
                    await to_b.say(await caller.hear())
                    await caller.say(await to_b.hear())
                    header = await caller.read(HEADER.size)
                    rest = bytearray(await caller.read(HEADER.unpack(header)[4] + TAG_BYTES))
                    rest[20] ^= 1  # a letter of the text
                    await to_b.write(header + rest)
                    await to_b.ends()

            async with lab.pretender(relay) as middle:
                a = await connect(identity("a"), middle, DECODER, expect="b")
                peer = await b.peer()
                await a.send(Note("x" * 40))
                with pytest.raises(FrameError, match="MAC is wrong"):
                    await receive(peer)
                await peer.close()
                await a.close()

    run(main())


def test_another_version_is_named_at_both_ends(caplog: pytest.LogCaptureFixture) -> None:
    def newer(word: bytes) -> bytes:
        frame = bytearray(frames.encode(Kind.HANDSHAKE, word, 0, Limits()))
        frame[4] = frames.PROTOCOL + 1
        return bytes(frame)

    async def main() -> None:
        async with listening() as b, lab.stranger(b.listener.address) as bad:
            await bad.hear()
            await bad.write(newer(b"\xc0"))
            assert await bad.ends()

        heard: list[bytes] = []

        async def meet(caller: Stranger) -> None:
            await caller.write(newer(ListenerSide(identity("b"), "x").challenge()))
            heard.append(await caller.read(5))

        async with lab.pretender(meet) as address:
            with pytest.raises(FrameError, match="speaks protocol version 2, this node version 1"):
                await connect(identity("a"), address, DECODER)
        assert heard == [frames.MAGIC + bytes((frames.PROTOCOL,))]

    run(main())
    assert "speaks protocol version 2, this node version 1: install the same" in caplog.text


def test_nobody_listens() -> None:
    async def main() -> None:
        with listen("127.0.0.1", "") as sock:
            where = address_of(sock)
        with pytest.raises(PeerLostError) as caught:
            await connect(identity("a"), where, DECODER, expect="b")
        assert str(caught.value) == f"b at {where}: connection refused"

    run(main())


def test_somebody_else_listens() -> None:
    async def main() -> None:
        async def web_server(caller: Stranger) -> None:
            await caller.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            await caller.ends()

        async with lab.pretender(web_server) as address:
            with pytest.raises(FrameError, match="sent what is no frame: it begins b'HTTP'"):
                await connect(identity("a"), address, DECODER)

    run(main())


def test_one_that_listens_and_says_nothing() -> None:
    async def main() -> None:
        with socket.socket() as sock:  # connections wait in its queue
            sock.bind(("127.0.0.1", 0))
            sock.listen(1)
            with pytest.raises(PeerTimeoutError, match="timed out: the handshake took longer than"):
                await connect(identity("a"), Address(*sock.getsockname()), DECODER, rules=QUICK)

    run(main())


def test_one_whose_queue_is_full() -> None:
    async def main() -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            sock.listen(0)
            address = Address(*sock.getsockname())
            with (
                socket.create_connection(address),
                pytest.raises(PeerTimeoutError, match="timed out: connecting took longer than"),
            ):
                await connect(identity("a"), address, DECODER, rules=QUICK)

    run(main())


def test_a_stranger_that_dribbles_its_handshake() -> None:
    async def main() -> None:
        async with listening(rules=QUICK) as b, lab.stranger(b.listener.address) as bad:
            start = time.monotonic()
            try:
                for byte in frames.encode(Kind.HANDSHAKE, bytes(1000), 0, Limits()):
                    await bad.write(bytes((byte,)))
                    await asyncio.sleep(0.05)
            except ConnectionError:
                pass
            assert time.monotonic() - start < 10 * QUICK.handshake_s
            assert b.listener.refused == 1

    run(main())


def test_a_flood_of_half_open_connections_keeps_nobody_out() -> None:
    async def main() -> None:
        async with listening() as b:
            loop = asyncio.get_running_loop()
            flood: list[socket.socket] = []
            try:
                for _ in range(3 * HALF_OPEN):
                    sock = socket.socket()
                    sock.setblocking(False)
                    flood.append(sock)
                    await loop.sock_connect(sock, tuple(b.listener.address))
                start = time.monotonic()
                peer = await connect(identity("a"), b.listener.address, DECODER)
                await still_works(peer, await b.peer())
                assert time.monotonic() - start < 5
                assert b.listener.refused >= 2 * HALF_OPEN
                assert len(b.listener._half_open) <= HALF_OPEN
                await peer.close()
            finally:
                for sock in flood:
                    sock.close()

    run(main())


# --- garbage --------------------------------------------------------------------------------------


class Other(msgspec.Struct, tag=True):
    """What no decoder here knows."""

    text: str


def _signed(make: Callable[[Session], bytes]) -> Callable[[Stranger], Awaitable[None]]:
    """A node that has the secret, and then sends what ``make`` gives."""

    async def misbehave(bad: Stranger) -> None:
        await bad.write(make(await bad.prove(identity("evil"))))

    return misbehave


def _flipped(session: Session) -> bytes:
    data = bytearray(lab.frame(session, Note("x")))
    data[-1] ^= 1
    return bytes(data)


async def _message_before_the_handshake(bad: Stranger) -> None:
    await bad.hear()
    await bad.write(frames.encode(Kind.MESSAGE, b"\xc0", 0, Limits()) + bytes(32))


MISDEEDS: dict[str, tuple[Callable[[Stranger], Awaitable[None]], str]] = {
    "noise": (_signed(lambda _: random.randbytes(1000)), "no frame|speaks|cannot be|at most"),
    "too long": (
        _signed(lambda s: lab.frame(s, Note("x" * 2_000_000), limits=Limits(message=1 << 22))),
        "message of 20000.. bytes .* at most 1048576 and 67108864 are taken",
    ),
    "endless payload": (
        _signed(lambda _: HEADER.pack(frames.MAGIC, 1, Kind.MESSAGE, 0, 10, 2**64 - 1)),
        "payload of 18446744073709551615; at most",
    ),
    "wrong MAC": (_signed(_flipped), "MAC is wrong"),
    "repeated": (_signed(lambda s: lab.frame(s, Note("x")) * 2), "MAC is wrong"),
    "unknown": (_signed(lambda s: lab.frame(s, Other("x"))), "no message here"),
    "wrong payload": (
        _signed(lambda s: lab.frame(s, Note("x"), b"payload", digest=1)),
        "did not arrive as it was sent",
    ),
    "handshake again": (
        _signed(lambda _: frames.encode(Kind.HANDSHAKE, b"\xc0", 0, Limits())),
        "began a handshake where one is over",
    ),
}
STRANGE: dict[str, tuple[Callable[[Stranger], Awaitable[None]], str]] = {
    "noise": (lambda bad: bad.write(random.randbytes(1000)), "no frame|speaks|cannot be|at most"),
    "http": (lambda bad: bad.write(b"GET / HTTP/1.1\r\nHost: b\r\n\r\n"), "begins b'GET '"),
    "long": (
        lambda bad: bad.write(HEADER.pack(frames.MAGIC, 1, Kind.HANDSHAKE, 0, 1025, 0)),
        "message of 1025 bytes",
    ),
    "no word": (lambda bad: bad.say(b"\xc0"), "no message here"),
    "message": (_message_before_the_handshake, "cannot be|something else than a handshake"),
    "nothing": (lambda bad: asyncio.sleep(0), "hung up"),
}


@pytest.mark.parametrize("misdeed", MISDEEDS)
def test_garbage_of_a_peer_ends_its_connection_alone(misdeed: str) -> None:
    commit, says = MISDEEDS[misdeed]

    async def main() -> None:
        async with listening() as b:
            good = await connect(identity("good"), b.listener.address, DECODER)
            to_good = await b.peer()
            async with lab.stranger(b.listener.address) as bad:
                doing = asyncio.create_task(commit(bad))
                peer = await b.peer()
                with pytest.raises(FrameError, match=rf"^evil at 127.0.0.1:\d+: .*({says})"):
                    await receive_all(peer)
                with pytest.raises(FrameError, match=says):
                    await peer.send(Note("x"))
                assert await bad.ends()
                await asyncio.wait([doing])
            await still_works(good, to_good)
            await good.close()

    run(main())


@pytest.mark.parametrize("misdeed", STRANGE)
def test_garbage_of_a_stranger_is_turned_away(
    misdeed: str, caplog: pytest.LogCaptureFixture
) -> None:
    commit, says = STRANGE[misdeed]

    async def main() -> None:
        async with listening() as b:
            async with lab.stranger(b.listener.address) as bad:
                await commit(bad)
                bad.sock.shutdown(socket.SHUT_WR)
                assert await bad.ends()
            good = await connect(identity("good"), b.listener.address, DECODER)
            await still_works(good, await b.peer())
            await good.close()
            assert b.listener.refused == 1

    run(main())
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert re.search(rf"connection refused, 1 so far: 127.0.0.1:\d+: .*({says})", warning.message)


def test_any_bytes_after_the_handshake_are_an_error_of_that_connection(seed: int) -> None:
    chance = random.Random(seed)

    async def main() -> None:
        async with listening(rules=QUICK) as b:
            good = await connect(identity("good"), b.listener.address, DECODER)
            to_good = await b.peer()
            for _ in range(60):
                async with lab.stranger(b.listener.address) as bad:
                    session = await bad.prove(identity("evil"))
                    peer = await b.peer()
                    data = bytearray(lab.frame(session, Note("x"), chance.randbytes(50)))
                    at = chance.randrange(len(data))
                    data[at] ^= 1 << chance.randrange(8)
                    await bad.write(bytes(data))
                    bad.sock.shutdown(socket.SHUT_WR)
                    with pytest.raises(PeerError):
                        await receive(peer)
                    await peer.close()
            await still_works(good, to_good)
            await good.close()

    run(main())


def test_serving_that_fails_ends_that_connection_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async def serve(peer: Peer[Messages]) -> None:
            received = await peer.receive()
            assert isinstance(received.message, Note)
            await peer.send(Note(str(1 // received.message.number)))
            await peer.receive()

        async with listening(serve=serve) as b:
            first = await connect(identity("a"), b.listener.address, DECODER)
            second = await connect(identity("c"), b.listener.address, DECODER)
            await first.send(Note("x", 0))
            with pytest.raises(PeerLostError, match="hung up"):
                await receive(first)
            await second.send(Note("x", 1))
            assert (await receive(second)).message == Note("1")
            await first.close()
            await second.close()

    run(main())
    assert "ZeroDivisionError" in caplog.text
