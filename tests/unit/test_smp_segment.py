"""Segments: what is read is what was sealed, or it is refused."""

from __future__ import annotations

import os
import resource
import struct
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import smp_lab
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemo.errors import IntegrityError
from mnemo.smp import segment
from mnemo.smp.persist import verified_stream
from mnemo.smp.segment import CHUNK, PAGE, Header, Meta, TensorEntry
from mnemo.types import GenerationState

if TYPE_CHECKING:
    from collections.abc import Iterator

GOLDEN = Path(__file__).parents[1] / "golden" / "segment-v1"


@contextmanager
def memfd(size: int) -> Iterator[int]:
    fd = segment.create("mnemo:test", size)
    try:
        yield fd
    finally:
        os.close(fd)


def read_all(fd: int) -> tuple[Header, Meta, bytes]:
    header = segment.read_header(fd)
    return header, segment.read_meta(fd, header), smp_lab.read_bulk(fd)


@given(
    bulk=st.integers(0, 3).flatmap(lambda n: st.binary(min_size=n * 7, max_size=n * 500)),
    tick=st.integers(0, 2**63 - 1),
    step=st.integers(0, 2**63 - 1),
    small=st.binary(max_size=300),
    position=st.dictionaries(st.text(max_size=5), st.integers(0, 2**62), max_size=3),
    witness=st.dictionaries(st.integers(0, 2**40), st.integers(0, 2**64 - 1), max_size=3),
)
@settings(max_examples=100, deadline=None)
def test_round_trip(
    bulk: bytes,
    tick: int,
    step: int,
    small: bytes,
    position: dict[str, int],
    witness: dict[int, int],
) -> None:
    with memfd(len(bulk)) as fd:
        smp_lab.seal(fd, tick, step, bulk, small=small, position=position, witness=witness)
        header, meta, read = read_all(fd)
    assert (header.state, header.tick, header.step) == (GenerationState.SEALED, tick, step)
    assert (meta.small, meta.position, meta.witness) == (small, position, witness)
    assert read == bulk


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + PAGE])
def test_round_trip_at_the_borders_of_chunks(size: int) -> None:
    bulk = smp_lab.content(0, 1, size)
    with memfd(size) as fd:
        smp_lab.seal(fd, 1, 2, bulk)
        assert read_all(fd)[2] == bulk
        assert b"".join(verified_stream(fd)) == os.pread(fd, PAGE + 2 * size + 2 * PAGE, 0)


def test_every_flipped_byte_is_noticed() -> None:
    """Of header and description each byte, of the bulk one in each stretch of 100."""
    bulk = smp_lab.content(0, 1, 1000)
    with memfd(len(bulk)) as fd:
        smp_lab.seal(fd, 1, 2, bulk, small=b"small", identity={"model": "m"})
        header = segment.read_header(fd)
        meta = range(header.meta_offset, header.size)
        for place in [*range(64), *meta, *range(PAGE, PAGE + len(bulk), 100)]:
            whole = os.pread(fd, 1, place)
            os.pwrite(fd, bytes([whole[0] ^ 0x40]), place)
            with pytest.raises(IntegrityError):
                list(verified_stream(fd))
            os.pwrite(fd, whole, place)
        assert read_all(fd)[2] == bulk


def test_an_interrupted_write_leaves_no_generation() -> None:
    with memfd(1000) as fd:
        with pytest.raises(IntegrityError, match="magic"):
            segment.read_header(fd)
        smp_lab.seal(fd, 1, 2, smp_lab.content(0, 1, 1000))
        segment.begin(fd, 3, 4, 1000)
        header = segment.read_header(fd)
        assert (header.state, header.tick, header.step) == (GenerationState.WRITING, 3, 4)


def test_a_torn_header_is_refused() -> None:
    """Half of a new header over the old one, at every length."""
    with memfd(100) as fd:
        smp_lab.seal(fd, 1, 2, bytes(100))
        old = os.pread(fd, 64, 0)
        new = Header(GenerationState.WRITING, 777, 888, 100).encode()
        for length in range(1, 64):
            torn = new[:length] + old[length:]
            if torn in (old, new):
                continue
            os.pwrite(fd, torn, 0)
            with pytest.raises(IntegrityError):
                segment.read_header(fd)


def test_a_truncated_segment_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "segment"
    with memfd(1000) as source:
        smp_lab.seal(source, 1, 2, bytes(1000))
        whole = os.pread(source, segment.read_header(source).size, 0)
    for length in (0, 10, 63, 64, PAGE, PAGE + 999, len(whole) - 1):
        path.write_bytes(whole[:length])
        fd = os.open(path, os.O_RDONLY)
        try:
            with pytest.raises(IntegrityError):
                segment.read_header(fd)
        finally:
            os.close(fd)


def header_with(**fields: int) -> bytes:
    """A header of any values with a right checksum."""
    values: dict[str, Any] = {"version": 1, "state": 2, "tick": 1, "step": 1, "bulk": 0} | fields
    body = struct.pack(
        "<8sIIQQQQQ",
        b"MNEMOSEG",
        values["version"],
        values["state"],
        values["tick"],
        values["step"],
        values["bulk"],
        0,
        0,
    )
    return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


def test_a_newer_version_is_named() -> None:
    with pytest.raises(IntegrityError, match="format version 2; this mnemo reads version 1"):
        segment.decode_header(header_with(version=2))


@pytest.mark.parametrize("state", [0, 3, 4, 5, 99])
def test_an_unknown_state_is_refused(state: int) -> None:
    with pytest.raises(IntegrityError, match=f"state is {state}"):
        segment.decode_header(header_with(state=state))


@given(st.binary(max_size=200))
def test_garbage_is_no_header(raw: bytes) -> None:
    with pytest.raises(IntegrityError):
        segment.decode_header(raw)
    with pytest.raises(IntegrityError):
        segment.decode_header(b"MNEMOSEG" + raw)


@given(st.binary(max_size=200))
def test_a_description_that_is_vouched_for_but_no_description_is_refused(raw: bytes) -> None:
    header = Header(GenerationState.SEALED, 1, 1, 0, len(raw), xxhash.xxh3_64_intdigest(raw))
    with pytest.raises(IntegrityError, match="cannot be read"):
        segment.decode_meta(raw, header)


def test_a_chunk_beyond_the_digests_is_not_verified() -> None:
    assert not segment.verify_chunk(b"", 0, b"x")


def test_a_segment_that_cannot_be_allocated_is_an_error_and_leaves_nothing() -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            segment.create("mnemo:test", 2**21)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_segment_cannot_be_shrunk_under_its_readers() -> None:
    with memfd(1000) as fd, pytest.raises(PermissionError):
        os.ftruncate(fd, 100)


# --- the format, version 1 ------------------------------------------------------------------------

BULK = bytes(range(256)) * 2


def golden_sealed(fd: int) -> None:
    """What the golden file holds."""
    digests = struct.pack("<Q", xxhash.xxh3_64_intdigest(BULK))
    meta = Meta(
        rank=1,
        members=2,
        tensors=(TensorEntry("model.w", "float32", (2, 64), (64, 1), 0, 512),),
        own_size=0,
        shared_start=0,
        shared_stop=512,
        total=512,
        digests=digests,
        small=b"small state",
        small_mac=bytes(range(32)),
        identity={"model": "0123"},
        position={"step": 1841, "epoch": 3, "batch": 7},
        witness={1: 2**64 - 1},
    )
    segment.seal(fd, 1900, 1841, len(BULK), meta)


def test_version_1_is_read() -> None:
    fd = os.open(GOLDEN / "sealed.seg", os.O_RDONLY)
    try:
        header, meta, bulk = read_all(fd)
    finally:
        os.close(fd)
    assert (header.tick, header.step, header.bulk_size) == (1900, 1841, 512)
    assert (meta.rank, meta.members, meta.own_size, meta.total) == (1, 2, 0, 512)
    assert (meta.shared_start, meta.shared_stop) == (0, 512)
    assert meta.tensors == (TensorEntry("model.w", "float32", (2, 64), (64, 1), 0, 512),)
    assert (meta.small, meta.small_mac) == (b"small state", bytes(range(32)))
    assert meta.identity == {"model": "0123"}
    assert meta.position == {"step": 1841, "epoch": 3, "batch": 7}
    assert meta.witness == {1: 2**64 - 1}
    assert bulk == BULK


def test_version_1_that_was_never_completed() -> None:
    fd = os.open(GOLDEN / "writing.seg", os.O_RDONLY)
    try:
        header = segment.read_header(fd)
    finally:
        os.close(fd)
    assert header == Header(GenerationState.WRITING, 1901, 1842, 512)


def test_the_writer_still_writes_version_1() -> None:
    for name in ("sealed", "writing"):
        with memfd(len(BULK)) as fd:
            os.pwrite(fd, BULK, PAGE)
            if name == "sealed":
                golden_sealed(fd)
            else:
                segment.begin(fd, 1901, 1842, len(BULK))
            golden = (GOLDEN / f"{name}.seg").read_bytes()
            assert os.pread(fd, len(golden) + 1, 0) == golden
