"""The decoder under messages that nobody meant: a typed error, or a request within its bounds."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import msgspec
import pytest

from mnemo.errors import ProtocolError
from mnemo.smp import messages as m

if TYPE_CHECKING:
    from collections.abc import Callable

MESSAGES = 100_000
GOLDEN = Path(__file__).parents[1] / "golden"

REQUESTS: tuple[m.Message, ...] = (
    m.Hello(b"n" * 16, b"p" * 32),
    m.Join(0, 3, 8, 3600.0, m.PersistSettings("s3://bucket/x", 600.0, 3)),
    m.Join(
        0,
        3,
        8,
        60.0,
        None,
        m.ProtectSettings("a", (("a", "b"),), 1, {"b": ("10.0.0.2", 5000)}, 1e6),
    ),
    m.Reserve(2**40, 3),
    m.Begin(17, 16, 2**33),
    m.Seal(1, 17),
    m.Drop(17),
    m.Fetch(17, 1),
    m.Resume(-1),
    m.Adopt((0, 1, 2)),
    m.Finish(),
    m.Over(),
    m.Leave(finished=True),
    m.Flush(0, 17),
    m.Look(),
    m.Status(),
    m.Attend(),
    m.Shutdown(force=True),
    m.Rollback(100),
)


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: type(r).__name__)
def test_round_trip(request_: m.Message) -> None:
    assert m.decode_request(m.encode(request_)) == request_


@pytest.mark.parametrize(
    "reply",
    [
        m.Challenge(b"n" * 16),
        m.Welcome(b"p" * 32, 42),
        m.Failure("SmpError", "no"),
        m.Done(),
        m.Joined(m.Generation(4, 2)),
        m.Granted(1, (0, 1), shard=True),
        m.Sealed(None, "rank 1 differs", "no space left"),
        m.Fetched(None),
        m.Flushed(-1, "no space left"),
        m.Looked(
            0,
            {17: 16},
            m.PersistSettings("s3://bucket/x", 600.0, 3),
            m.ProtectSettings("a", (("a", "b"),), 1, {"b": ("10.0.0.2", 5000)}),
            {17: "f00"},
        ),
        m.StatusReply(b"{}"),
    ],
    ids=lambda r: type(r).__name__,
)
def test_replies_round_trip_and_are_no_requests(reply: m.Message) -> None:
    assert m.decode_reply(m.encode(reply)) == reply
    with pytest.raises(ProtocolError):
        m.decode_request(m.encode(reply))


def schema() -> dict[str, Any]:
    """What all messages look like, without the words about them."""

    def bare(part: Any) -> Any:
        if isinstance(part, dict):
            words = {"description", "title"} if "type" in part or "anyOf" in part else set()
            return {key: bare(each) for key, each in part.items() if key not in words}
        return [bare(each) for each in part] if isinstance(part, list) else part

    kinds = (*get_args(m.Request), *get_args(m.Reply))
    _, components = msgspec.json.schema_components(kinds, ref_template="{name}")
    found = {name: bare(component) for name, component in sorted(components.items())}
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def test_a_change_of_a_message_is_another_protocol() -> None:
    """A snapshot process outlives an upgrade; who speaks otherwise has to be told apart.

    Raise `mnemo.smp.messages.PROTOCOL`, and write the new `schema()` to the file of that number.
    """
    golden = GOLDEN / f"smp-protocol-{m.PROTOCOL}.json"
    assert schema() == json.loads(golden.read_text())


def mutations(rng: random.Random) -> list[Callable[[bytes], bytes]]:
    """Ways to spoil a message."""

    def flip(raw: bytes) -> bytes:
        place = rng.randrange(len(raw))
        return raw[:place] + bytes([raw[place] ^ (1 << rng.randrange(8))]) + raw[place + 1 :]

    def cut(raw: bytes) -> bytes:
        return raw[: rng.randrange(len(raw))]

    def insert(raw: bytes) -> bytes:
        place = rng.randrange(len(raw) + 1)
        return raw[:place] + rng.randbytes(rng.randrange(1, 9)) + raw[place:]

    def splice(raw: bytes) -> bytes:
        other = m.encode(rng.choice(REQUESTS))
        return raw[: rng.randrange(len(raw))] + other[rng.randrange(len(other)) :]

    def noise(raw: bytes) -> bytes:
        return rng.randbytes(rng.randrange(2 * len(raw)))

    return [flip, cut, insert, splice, noise]


def test_fuzz(seed: int) -> None:
    rng = random.Random(seed)
    ways = mutations(rng)
    refused = 0
    for _ in range(MESSAGES):
        raw = m.encode(rng.choice(REQUESTS))
        for _ in range(rng.randrange(1, 4)):
            raw = rng.choice(ways)(raw or b"\x80")
        try:
            request = m.decode_request(raw)
        except ProtocolError:
            refused += 1
        else:
            within_bounds(request)
    assert refused > MESSAGES / 2


def within_bounds(request: m.Request) -> None:
    """Every number of a request that was accepted fits the header and the shelf."""
    for name in request.__struct_fields__:
        value = getattr(request, name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int):
                assert -1 <= number < 2**63


def text(word: str) -> bytes:
    return bytes([0xA0 + len(word)]) + word.encode()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xc1",
        b"\x82" + text("type") + text("Status") + text("x") + b"\x91" * 60_000,
        b"\x82" + text("type") + text("Adopt") + text("indexes") + b"\xdd\xff\xff\xff\xff",
        b"\x82" + text("type") + text("Hello") + text("nonce") + b"\xc6\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        msgspec.msgpack.encode({"type": "Begin", "tick": -1, "step": 0, "size": 0}),
        msgspec.msgpack.encode({"type": "Begin", "tick": 0, "step": 0, "size": 2**63}),
        msgspec.msgpack.encode({"type": "Begin", "tick": 0.5, "step": 0, "size": 1}),
        msgspec.msgpack.encode({"type": "Join", "fit": 0, "rank": 0, "members": 0}),
        msgspec.msgpack.encode(
            {"type": "Join", "fit": 0, "rank": 0, "members": 1, "keep_alive_s": float("nan")}
        ),
        msgspec.msgpack.encode({"type": "Resume", "tick": -2}),
        msgspec.msgpack.encode({"type": "Nothing"}),
        b"\x81" + text("type") + b"\xcb" + struct.pack(">d", float("nan")),
    ],
    ids=range(14),
)
def test_hostile_messages_are_refused_by_a_typed_error(raw: bytes) -> None:
    with pytest.raises(ProtocolError, match="not a request"):
        m.decode_request(raw)
    with pytest.raises(ProtocolError, match="not a reply"):
        m.decode_reply(raw)


def test_where_checkpoints_go_is_shown_without_a_password() -> None:
    settings = m.PersistSettings("ftp://me:hunter2@host/x", 1.0, 1)
    assert settings.shown == "ftp://***@host/x"
