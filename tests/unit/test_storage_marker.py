"""The marker file alone: what it refuses."""

from __future__ import annotations

import json

import msgspec
import pytest
import xxhash

from mnemo.errors import IntegrityError
from mnemo.storage import Checkpoint, Part
from mnemo.storage._marker import decode_marker, encode_marker

KEY = b"k" * 32
CHECKPOINT = Checkpoint(1841, (Part("rank-0.bin", 3, "0" * 32),), 12.5, {"loss": 0.1, "name": "x"})


def decode(raw: bytes, *, key: bytes | None = KEY) -> Checkpoint:
    return decode_marker(raw, step=1841, run_id="r", key=key)


def forge(**changes: object) -> bytes:
    """A marker with a right checksum whose body breaks the format."""
    body = json.loads(encode_marker(CHECKPOINT, "r", None))["body"] | changes
    raw = msgspec.json.encode({k: v for k, v in body.items() if v is not ...})
    return msgspec.json.encode(
        {"body": msgspec.Raw(raw), "xxh3_128": xxhash.xxh3_128_hexdigest(raw)}
    )


def test_round_trip() -> None:
    assert decode(encode_marker(CHECKPOINT, "r", KEY)) == CHECKPOINT
    assert decode(encode_marker(CHECKPOINT, "r", None), key=None) == CHECKPOINT


def test_every_flipped_bit_of_a_signed_marker_is_refused() -> None:
    raw = encode_marker(CHECKPOINT, "r", KEY)
    for at in range(len(raw)):
        for bit in range(8):
            damaged = bytearray(raw)
            damaged[at] ^= 1 << bit
            with pytest.raises(IntegrityError):
                decode(bytes(damaged))


def test_every_truncation_is_refused() -> None:
    raw = encode_marker(CHECKPOINT, "r", None)
    for length in range(len(raw)):
        with pytest.raises(IntegrityError, match="damaged or not mnemo's"):
            decode(raw[:length], key=None)


def test_an_unsigned_marker_is_protected_by_its_checksum() -> None:
    raw = encode_marker(CHECKPOINT, "r", None)
    with pytest.raises(IntegrityError, match="checksum"):
        decode(raw.replace(b"rank-0", b"rank-1"), key=None)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "other"},
        {"version": 0},
        {"version": "1"},
        {"step": -1},
        {"step": 1841.5},
        {"parts": ...},
        {"parts": [{"name": "../x", "size": 1, "digest": "0" * 32}]},
        {"parts": [{"name": "x\n", "size": 1, "digest": "0" * 32}]},
        {"parts": [{"name": "x", "size": -1, "digest": "0" * 32}]},
        {"parts": [{"name": "x", "size": 1, "digest": "0" * 31}]},
        {"parts": [{"name": "x", "size": 1, "digest": "G" * 32}]},
        {"created": "yesterday"},
        {"meta": {"a": []}},
    ],
    ids=str,
)
def test_a_body_that_breaks_the_format_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(IntegrityError, match="marker"):
        decode(forge(**changes), key=None)


def test_unknown_fields_of_the_same_version_are_ignored() -> None:
    assert decode(forge(later_addition=[1, 2]), key=None) == CHECKPOINT


def test_the_secret_is_not_in_the_marker() -> None:
    assert KEY not in encode_marker(CHECKPOINT, "r", KEY)
