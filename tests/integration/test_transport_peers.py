"""Two nodes over real sockets: what arrives, who gets in, and what a bad neighbour can do."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import transport_lab as lab
import xxhash
from transport_lab import (
    DECODER,
    QUICK,
    Manifest,
    Messages,
    Note,
    identity,
    listening,
    pair,
    receive,
    receive_all,
    run,
    still_works,
)

from mnemo.errors import (
    ConfigError,
    PeerLostError,
    PeerTimeoutError,
)
from mnemo.transport.address import listen
from mnemo.transport.endpoints import Listener, connect
from mnemo.transport.frames import HEADER, PIECE, Limits
from mnemo.transport.peer import Peer, Rules
from mnemo.transport.rate import RateLimit

if TYPE_CHECKING:
    pass


# --- what arrives ---------------------------------------------------------------------------------


def test_messages_and_payloads_arrive_as_they_were_sent(seed: int) -> None:
    chance = random.Random(seed)

    async def main() -> None:
        async with pair() as (a, b):
            assert (a.node, b.node) == ("b", "a")
            for size in (0, 1, 31, 4096, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 3):
                payload = chance.randbytes(size)
                digest = xxhash.xxh3_64_intdigest(payload)
                message = Manifest([digest, size])
                sent = asyncio.create_task(a.send(message, memoryview(payload) if size else None))
                received = await receive(b)
                assert await sent == (digest if size else None)
                assert received.message == message
                assert received.digest == (digest if size else None)
                assert (received.payload or b"") == payload
            await still_works(a, b)

    run(main())


def test_a_payload_lies_in_the_memory_that_was_chosen_for_its_message() -> None:
    async def main() -> None:
        segment = bytearray(8)
        asked: list[tuple[Messages, int]] = []

        def choose(message: Messages, size: int) -> memoryview:
            asked.append((message, size))
            assert isinstance(message, Note)
            return memoryview(segment)[message.number : message.number + size]

        async with pair() as (a, b):
            await a.send(Note("x", 4), memoryview(b"abcd"))
            received = await b.receive(choose)
            assert asked == [(Note("x", 4), 4)]
            assert segment == b"\0\0\0\0abcd"
            assert received.payload is not None
            assert received.payload.obj is segment

    run(main())


def test_a_payload_that_nobody_wants_is_dropped() -> None:
    async def main() -> None:
        async with pair() as (a, b):
            for into in (None, lambda *_: None):
                sent = asyncio.create_task(a.send(Note("x"), memoryview(bytes(2 * PIECE))))
                received = await b.receive(into)
                assert received.payload is None
                assert received.digest == await sent
            await still_works(a, b)

    run(main())


def test_both_directions_and_many_senders_at_once(seed: int) -> None:
    chance = random.Random(seed)

    async def main() -> None:
        payloads = [chance.randbytes(chance.randrange(1, 2 << 20)) for _ in range(16)]

        async def collect(peer: Peer[Messages]) -> None:
            left = set(range(len(payloads)))
            while left:
                received = await receive(peer)
                assert isinstance(received.message, Note)
                assert received.payload == payloads[received.message.number]
                left.remove(received.message.number)

        async with pair() as (a, b):
            sends = [
                peer.send(Note("x", number), memoryview(payload))
                for peer in (a, b)
                for number, payload in enumerate(payloads)
            ]
            await asyncio.gather(collect(a), collect(b), *sends)

    run(main())


def test_over_ipv6() -> None:
    async def main() -> None:
        found: asyncio.Queue[Messages] = asyncio.Queue()

        async def serve(peer: Peer[Messages]) -> None:
            found.put_nowait((await peer.receive()).message)

        try:
            sock = listen("::1", "")
        except ConfigError as error:
            pytest.skip(f"no IPv6 here: {error}")
        listener = Listener(identity("b"), sock, DECODER, serve)
        try:
            peer = await connect(identity("a"), listener.address, DECODER)
            await peer.send(Note("six"))
            assert await found.get() == Note("six")
            await peer.close()
        finally:
            await listener.close()

    run(main())


def test_what_is_too_long_is_not_sent_and_harms_nothing() -> None:
    async def main() -> None:
        async with pair(Rules(limits=Limits(message=100, payload=100))) as (a, b):
            with pytest.raises(ValueError, match="too long"):
                await a.send(Note("x" * 200))
            with pytest.raises(ValueError, match="too long"):
                await a.send(Note("x"), memoryview(bytes(101)))
            await still_works(a, b)

    run(main())


def test_what_is_no_payload_is_not_sent() -> None:
    async def main() -> None:
        async with pair() as (a, b):
            for payload in (memoryview(b""), memoryview(b"abcd")[::2]):
                with pytest.raises(ValueError, match="contiguous, and not empty: send none"):
                    await a.send(Note("x"), payload)
            await still_works(a, b)

    run(main())


def test_memory_that_does_not_fit_ends_the_connection_with_the_reason() -> None:
    async def main() -> None:
        async with pair() as (a, b):
            await a.send(Note("x"), memoryview(b"abcd"))
            with pytest.raises(ValueError, match="payload of 4 bytes does not go into 3"):
                await b.receive(lambda *_: memoryview(bytearray(3)))
            with pytest.raises(PeerLostError, match="was closed at this end"):
                await b.receive()
            with pytest.raises(PeerLostError):
                await receive(a)

    run(main())


# --- waiting --------------------------------------------------------------------------------------


def test_a_side_that_does_not_receive_holds_the_other_up() -> None:
    async def main() -> None:
        async with pair() as (a, b):
            sent = 0

            async def flood() -> None:
                nonlocal sent
                while True:
                    await a.send(Note("x"), memoryview(bytes(1 << 20)))
                    sent += 1

            task = asyncio.create_task(flood())
            before = -1
            while before != sent:  # until the kernel's buffers are full
                before = sent
                await asyncio.sleep(0.1)
            assert sent < 32, "it went somewhere"
            for _ in range(sent + 10):
                await receive(b)
            task.cancel()

    run(main())


def test_a_rate_is_kept_by_all_payloads_that_share_it() -> None:
    async def main() -> None:
        rate = RateLimit(1e6)
        async with pair() as (a, b), pair() as (c, d):
            start = time.monotonic()
            await asyncio.gather(
                *(
                    peer.send(Note("x"), memoryview(bytes(100_000)), rate=rate)
                    for peer in (a, c)
                    for _ in range(3)
                )
            )
            assert 0.3 < time.monotonic() - start < 5
            await a.send(Note("messages alone are free"), rate=rate)
            for peer in (b, d):
                assert (await receive(peer)).payload == bytes(100_000)

    run(main())


def test_receiving_may_be_given_up_between_frames() -> None:
    async def main() -> None:
        async with pair() as (a, b):
            for number in range(50):
                task = asyncio.create_task(b.receive())
                await asyncio.sleep(0)
                if number % 2:
                    await a.send(Note("x", number))  # what came just then is not lost
                task.cancel()
                done = await asyncio.gather(task, return_exceptions=True)
                if number % 2 and isinstance(done[0], asyncio.CancelledError):
                    assert (await receive(b)).message == Note("x", number)
            await still_works(a, b)

    run(main())


def test_giving_up_within_a_frame_ends_the_connection() -> None:
    async def main() -> None:
        async with pair() as (a, b):
            started = asyncio.Event()

            def choose(_: Messages, size: int) -> memoryview:
                started.set()
                return memoryview(bytearray(size))

            huge = memoryview(bytes(32 << 20))
            sending = asyncio.create_task(a.send(Note("x"), huge))
            receiving = asyncio.create_task(b.receive(choose))
            await started.wait()
            receiving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await receiving
            with pytest.raises(PeerLostError):
                await sending
        async with pair() as (a, b):
            sending = asyncio.create_task(a.send(Note("x"), huge))
            await asyncio.sleep(0.05)
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
            with pytest.raises(PeerLostError, match="hung up"):
                await receive(b)

    run(main())


def test_two_tasks_do_not_receive() -> None:
    async def main() -> None:
        async with pair() as (a, b):
            first = asyncio.create_task(b.receive())
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="two tasks receive from a at"):
                await b.receive()
            await a.send(Note("x"))
            assert (await first).message == Note("x")

    run(main())


# --- the end --------------------------------------------------------------------------------------


def test_a_peer_that_hangs_up() -> None:
    async def main() -> None:
        async with pair() as (a, b):
            receiving = asyncio.create_task(b.receive())
            await a.send(Note("the last word"))
            await a.close()
            await a.close()
            assert (await receiving).message == Note("the last word")
            with pytest.raises(PeerLostError, match=r"^a at 127.0.0.1:\d+: hung up$"):
                await b.receive()
            with pytest.raises(PeerLostError, match="closed at this end"):
                await a.send(Note("x"))

    run(main())


def test_closing_wakes_whoever_waits() -> None:
    async def main() -> None:
        async with pair() as (a, _):
            waiting = [
                asyncio.create_task(a.receive()),
                *(
                    asyncio.create_task(a.send(Note("x"), memoryview(bytes(64 << 20))))
                    for _ in range(3)
                ),
            ]
            await asyncio.sleep(0.1)
            await a.close()
            ended = await asyncio.wait_for(
                asyncio.gather(*waiting, return_exceptions=True), lab.PATIENCE_S
            )
            assert [type(one) for one in ended] == [PeerLostError] * 4

    run(main())


def test_a_reset_in_mid_frame() -> None:
    async def main() -> None:
        async with listening() as b, lab.stranger(b.listener.address) as bad:
            session = await bad.prove(identity("a"))
            peer = await b.peer()
            whole = lab.frame(session, Note("x"), bytes(1000))
            await bad.write(whole[:500])
            bad.reset()
            with pytest.raises(PeerLostError, match="connection reset by peer"):
                await receive(peer)

    run(main())


def test_a_peer_that_ends_in_mid_frame() -> None:
    async def main() -> None:
        async with listening() as b:
            for end in (1, HEADER.size - 1, HEADER.size, HEADER.size + 3, 150, 1000):
                async with lab.stranger(b.listener.address) as bad:
                    session = await bad.prove(identity("a"))
                    peer = await b.peer()
                    await bad.write(lab.frame(session, Note("x"), bytes(1000))[:end])
                    bad.sock.shutdown(socket.SHUT_WR)
                    with pytest.raises(PeerLostError, match="hung up"):
                        await receive(peer)

    run(main())


# --- silence --------------------------------------------------------------------------------------


def test_two_that_have_nothing_to_say_stay_connected() -> None:
    async def main() -> None:
        async with pair(Rules(ping_s=0.05, silence_s=1)) as (a, b):
            receiving = [asyncio.create_task(peer.receive()) for peer in (a, b)]
            done, _ = await asyncio.wait(receiving, timeout=2.5)
            assert not done
            await a.send(Note("x"))
            await b.send(Note("y"))
            assert [(await one).message for one in receiving] == [Note("y"), Note("x")]

    run(main())


def test_a_silent_peer_is_lost() -> None:
    async def main() -> None:
        async with listening(rules=QUICK) as b, lab.stranger(b.listener.address) as bad:
            await bad.prove(identity("a"))
            peer = await b.peer()
            start = time.monotonic()
            with pytest.raises(
                PeerTimeoutError, match=r"timed out: silence took longer than 0.5 s"
            ):
                await receive(peer)
            assert 0.4 < time.monotonic() - start < 5
            with pytest.raises(PeerTimeoutError):
                await peer.send(Note("x"))
            assert await bad.ends()

    run(main())


@pytest.mark.parametrize("end", [1, HEADER.size, 80, 600])
def test_a_peer_that_stalls_in_mid_frame(end: int) -> None:
    async def main() -> None:
        async with listening(rules=QUICK) as b, lab.stranger(b.listener.address) as bad:
            session = await bad.prove(identity("a"))
            peer = await b.peer()
            await bad.write(lab.frame(session, Note("x"), bytes(1000))[:end])
            with pytest.raises(PeerTimeoutError, match="timed out"):
                await receive(peer)

    run(main())


def test_a_peer_that_sends_a_byte_now_and_then() -> None:
    async def main() -> None:
        async with listening(rules=QUICK) as b, lab.stranger(b.listener.address) as bad:
            session = await bad.prove(identity("a"))
            peer = await b.peer()
            receiving = asyncio.create_task(receive(peer))
            start = time.monotonic()
            for byte in lab.frame(session, Note("x"), bytes(1000)):
                if receiving.done():
                    break
                try:
                    await bad.write(bytes((byte,)))
                except ConnectionError:
                    break
                await asyncio.sleep(0.05)
            with pytest.raises(PeerTimeoutError, match="timed out"):
                await receiving
            assert time.monotonic() - start < 10 * QUICK.stall_s

    run(main())


def test_a_peer_that_takes_nothing() -> None:
    async def main() -> None:
        async with listening(rules=QUICK) as b, lab.stranger(b.listener.address) as bad:
            await bad.prove(identity("a"))
            peer = await b.peer()
            with pytest.raises(PeerTimeoutError, match="timed out: sending took longer"):
                await peer.send(Note("x"), memoryview(bytes(64 << 20)))

    run(main())


def test_a_process_that_stood_still_itself_does_not_lose_its_peers() -> None:
    async def main() -> None:
        async with pair(QUICK, Rules(ping_s=0.1)) as (a, b):
            receiving = asyncio.create_task(a.receive())
            await b.send(Note("x"))
            await asyncio.sleep(0)
            time.sleep(3 * QUICK.silence_s)
            assert (await receiving).message == Note("x")

    run(main())


# --- processes ------------------------------------------------------------------------------------

NODE = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
import transport_lab as lab
from mnemo.transport.address import Address
from mnemo.transport.endpoints import connect

async def main():
    peer = await connect(lab.identity("a"), Address("127.0.0.1", int(sys.argv[2])), lab.DECODER)
    for number in range(int(sys.argv[3])):
        await peer.send(lab.Note(sys.argv[4], number), memoryview(bytes(8 << 20)))
    await peer.receive()

asyncio.run(main())
"""


def test_a_peer_that_is_killed_and_replaced_while_it_sends() -> None:
    async def main() -> None:
        async with listening() as b:

            async def start(count: int, text: str) -> asyncio.subprocess.Process:
                return await asyncio.create_subprocess_exec(
                    *(sys.executable, "-c", NODE, str(Path(lab.__file__).parent)),
                    *(str(b.listener.address.port), str(count), text),
                    stderr=asyncio.subprocess.DEVNULL,
                )

            first = await start(1000, "first")
            old = await b.peer()
            await receive(old)
            begun = asyncio.Event()

            def choose(_: Messages, size: int) -> memoryview:
                begun.set()
                return memoryview(bytearray(size))

            rest = asyncio.create_task(receive_all(old, choose))
            await begun.wait()
            first.send_signal(signal.SIGSTOP)  # in the middle of what it sends
            second = await start(1, "second")
            new = await b.peer()
            received = await receive(new)
            assert received.message == Note("second", 0)
            assert received.payload == bytes(8 << 20)
            first.kill()
            with pytest.raises(PeerLostError):
                await rest
            await new.close()
            assert await first.wait() == -signal.SIGKILL
            assert await second.wait() != 0

    run(main())
