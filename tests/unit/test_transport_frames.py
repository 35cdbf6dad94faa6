"""Frames: what is one, what is none, and that the parser stands any bytes."""

from __future__ import annotations

import random
import time

import msgspec
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from mnemo.errors import FrameError
from mnemo.transport import frames, handshake
from mnemo.transport.frames import HEADER, PIECE, TAG_BYTES, Body, Head, Kind, Limits, Parser
from mnemo.transport.handshake import Session

SMALL = Limits(message=256, payload=512)
KEY, OTHER = b"k" * 32, b"o" * 32


def feed(parser: Parser, data: bytes, into: bytearray | None = None) -> list[Head | Body]:
    """What a parser makes of ``data``, whose payloads go into ``into``, or nowhere."""
    found: list[Head | Body] = []
    while data:
        space = parser.buffer()
        part, data = data[: len(space)], data[len(space) :]
        space[: len(part)] = part
        event = parser.filled(len(part))
        if event is None:
            continue
        found.append(event)
        if isinstance(event, Head) and event.payload_bytes:
            parser.take(None if into is None else memoryview(into)[: event.payload_bytes])
    return found


def whole(session: Session, message: bytes, payload: bytes = b"") -> bytes:
    head = frames.encode(Kind.MESSAGE, message, len(payload), Limits())
    data = head + session.sign(head) + payload
    return data + session.sign_payload(xxhash.xxh3_64_intdigest(payload)) if payload else data


def header(
    magic: bytes = frames.MAGIC,
    version: int = frames.PROTOCOL,
    kind: int = Kind.MESSAGE,
    zero: int = 0,
    message: int = 1,
    payload: int = 0,
) -> bytes:
    return HEADER.pack(magic, version, kind, zero, message, payload)


@given(st.binary(min_size=1, max_size=40), st.binary(max_size=200), st.data())
def test_a_frame_arrives_however_it_is_cut(
    message: bytes, payload: bytes, data: st.DataObject
) -> None:
    stream = whole(Session(KEY, OTHER, "b", "x"), message, payload) * 2
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    parser, session, into = Parser(SMALL, "a"), Session(OTHER, KEY, "a", "x"), bytearray(512)
    assert parser.between_frames
    events: list[Head | Body] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        events += feed(parser, stream[start:end], into)
    assert parser.between_frames
    heads = [event for event in events if isinstance(event, Head)]
    bodies = [event for event in events if isinstance(event, Body)]
    assert [head.message for head in heads] == [message] * 2
    assert [head.payload_bytes for head in heads] == [len(payload)] * 2
    session.check(heads[0])
    if payload:
        assert into[: len(payload)] == payload
        assert [body.digest for body in bodies] == [xxhash.xxh3_64_intdigest(payload)] * 2
        session.check_payload(bodies[0])
    else:
        assert bodies == []


def test_a_frame_begun_is_noticed() -> None:
    stream = whole(Session(KEY, OTHER, "b", "x"), b"message", bytes(HEADER.size))
    for end in range(1, len(stream)):
        parser = Parser(SMALL, "a")
        feed(parser, stream[:end], bytearray(64))
        assert not parser.between_frames, end


def test_a_payload_goes_into_the_callers_memory_in_pieces_or_nowhere() -> None:
    payload = random.randbytes(2 * PIECE + 7)
    stream = whole(Session(KEY, OTHER, "b", "x"), b"m", payload)
    digest = xxhash.xxh3_64_intdigest(payload)
    into = bytearray(len(payload))
    parser = Parser(Limits(), "a")
    assert feed(parser, stream[: HEADER.size + 1 + TAG_BYTES], into)
    lengths = []
    for start in range(0, len(payload), PIECE):
        space = parser.buffer()
        lengths.append(len(space))
        assert space.obj is into, "a second copy"
        space[:] = payload[start : start + PIECE]
        parser.filled(len(space))
    assert lengths == [PIECE, PIECE, 7]
    assert into == payload
    parser = Parser(Limits(), "a")
    dropped = feed(parser, stream)
    assert isinstance(dropped[1], Body)
    assert dropped[1].digest == digest


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n", "no frame: it begins b'GET '"),
        (header(version=2), "speaks protocol version 2, this node version 1: install the same"),
        (header(kind=0), "cannot be: kind 0"),
        (header(kind=4), "cannot be: kind 4"),
        (header(zero=1), "cannot be: kind 2, reserved 1"),
        (header(message=0), "cannot be: kind 2, reserved 0, message of 0 bytes"),
        (header(kind=Kind.PING, message=1), "cannot be: kind 3"),
        (header(kind=Kind.PING, message=0, payload=1), "cannot be: kind 3"),
        (header(kind=Kind.HANDSHAKE, payload=1), "cannot be: kind 1"),
        (header(message=257), "message of 257 bytes with a payload of 0; at most 256 and 512"),
        (header(payload=513), "message of 1 bytes with a payload of 513; at most 256 and 512"),
        (header(message=2**32 - 1, payload=2**64 - 1), "at most 256 and 512 are taken"),
    ],
)
def test_no_frame(data: bytes, says: str) -> None:
    with pytest.raises(FrameError, match=r"^node-a: ") as caught:
        feed(Parser(SMALL, "node-a"), data)
    assert says in str(caught.value)


def test_too_long_to_send() -> None:
    with pytest.raises(ValueError, match=r"message of 257 bytes .* too long: at most 256 and 512"):
        frames.encode(Kind.MESSAGE, bytes(257), 0, SMALL)
    with pytest.raises(ValueError, match="payload of 513 is too long"):
        frames.encode(Kind.MESSAGE, b"m", 513, SMALL)


@pytest.mark.parametrize(
    "target",
    [
        memoryview(bytearray(7)),
        memoryview(bytearray(9)),
        memoryview(bytes(8)),
        memoryview(bytearray(16))[::2],
    ],
    ids=["short", "long", "read-only", "strided"],
)
def test_memory_that_does_not_fit(target: memoryview) -> None:
    parser = Parser(SMALL, "a")
    feed(parser, header(payload=8))
    space = parser.buffer()
    parser.filled(len(space))
    with pytest.raises(ValueError, match="take"):
        parser.buffer()
    with pytest.raises(ValueError, match="payload of 8 bytes does not go into"):
        parser.take(target)


def test_memory_of_other_items_fits_by_its_bytes() -> None:
    parser = Parser(SMALL, "a")
    feed(parser, header(payload=8))
    parser.filled(len(parser.buffer()))
    parser.take(memoryview(bytearray(8)).cast("d"))
    assert len(parser.buffer()) == 8


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\xa5ab",
        b"\x81\xa4type\xa3Bye",
        b"\xd9\x02\xff\xff",
        b"\x91" * 200,
        b"\x1b[2J",
    ],
)
def test_no_message(data: bytes) -> None:
    decoder = msgspec.msgpack.Decoder(handshake.Hello)
    with pytest.raises(FrameError, match="a: sent what is no message here: ") as caught:
        frames.decode(data, decoder, "a")
    assert str(caught.value).isprintable()


def test_what_a_stranger_writes_is_not_repeated_as_it_is() -> None:
    data = msgspec.msgpack.encode({"type": "\x1b[2J\n" + "x" * 900})
    with pytest.raises(FrameError) as caught:
        frames.decode(data, msgspec.msgpack.Decoder(handshake.Hello | handshake.Welcome), "a")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


# --- any bytes ------------------------------------------------------------------------------------


def mutate(chance: random.Random, stream: bytes) -> bytes:
    """Change ``stream`` in one of the ways that a network, a bug or an attacker would."""
    way = chance.randrange(7)
    at = chance.randrange(len(stream))
    if way == 0:  # a bit
        return stream[:at] + bytes((stream[at] ^ (1 << chance.randrange(8)),)) + stream[at + 1 :]
    if way == 1:  # a stretch
        some = chance.randbytes(chance.randrange(1, 9))
        return stream[:at] + some + stream[at + len(some) :]
    if way == 2:  # something left out
        return stream[:at] + stream[at + chance.randrange(1, 9) :]
    if way == 3:  # something put in
        return stream[:at] + chance.randbytes(chance.randrange(1, 9)) + stream[at:]
    if way == 4:  # cut off
        return stream[:at]
    if way == 5:  # a header with other numbers
        return stream[:8] + chance.randbytes(12) + stream[20:]
    return chance.randbytes(chance.randrange(1, 120))  # noise


@pytest.mark.parametrize("count", [100_000, pytest.param(1_000_000, marks=pytest.mark.campaign)])
def test_any_bytes_are_signed_frames_or_an_error(count: int, seed: int) -> None:
    chance = random.Random(seed)
    message, payload = b"\x81\xa4type\xa4Note", b"some payload"
    good = whole(Session(KEY, OTHER, "b", "x"), message, payload)
    into = memoryview(bytearray(SMALL.payload))
    session = Session(OTHER, KEY, "a", "x")
    refused = cut = passed = 0
    began = time.monotonic()
    for _ in range(count):
        data = mutate(chance, good)
        parser, session._received = Parser(SMALL, "a"), 0
        complete = position = 0
        try:
            while position < len(data):
                space = parser.buffer()
                assert 0 < len(space) <= SMALL.payload + TAG_BYTES
                part = data[position : position + len(space)]
                space[: len(part)] = part
                position += len(part)
                event = parser.filled(len(part))
                if isinstance(event, Head):
                    assert len(event.message) <= SMALL.message
                    session.check(event)
                    assert event.message == message, "a changed message passed"
                    if event.payload_bytes:
                        parser.take(into[: event.payload_bytes])
                elif event is not None:
                    session.check_payload(event)
                    assert into[: len(payload)] == payload, "a changed payload passed"
                    complete += 1
        except FrameError:
            refused += 1
            # What was put in behind a whole frame begins another one.
            assert complete == 0 or data.startswith(good)
        else:
            passed += complete
            cut += not complete
            assert not complete or data.startswith(good)
    print(
        f"{count} in {time.monotonic() - began:.1f} s: {refused} refused, {cut} cut, {passed} whole"
    )
    assert refused > 0.5 * count
    assert cut > 0.1 * count
