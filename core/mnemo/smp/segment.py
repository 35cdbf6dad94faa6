"""Segment, version 1: one rank's copy of one generation, in a memfd.

A segment describes itself, so that whoever holds its descriptor can hand it to a new SMP.
``docs/formats.md`` is the normative description; the header is little-endian:

====== ==== =====================================================
offset size field
====== ==== =====================================================
0      8    magic ``MNEMOSEG``
8      4    format version (1)
12     4    state: 1 WRITING, 2 SEALED
16     8    tick: number of the generation, grows along the run
24     8    step: optimizer steps done
32     8    bulk size in bytes; the bulk starts at offset 4096
40     8    meta size in bytes; the meta follows the bulk, page-aligned
48     8    xxh3-64 of the meta
56     8    xxh3-64 of bytes 0–55
====== ==== =====================================================

The header is written last and is what seals: a crash at any instant leaves either a header that
says WRITING or one that vouches for the meta, which vouches for every chunk of the bulk.
"""

from __future__ import annotations

import fcntl
import os
import struct
from dataclasses import dataclass
from typing import Final

import msgspec
import xxhash

from mnemo.errors import IntegrityError
from mnemo.types import GenerationState

MAGIC: Final = b"MNEMOSEG"
VERSION: Final = 1
PAGE: Final = 4096
CHUNK: Final = 512 * 1024
"""Bytes under one checksum. Small enough to be still in the L2 cache when it is hashed."""
_FIELDS: Final = struct.Struct("<8sIIQQQQQ")
_DIGEST: Final = struct.Struct("<Q")


def page_up(size: int) -> int:
    """``size`` rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


@dataclass(frozen=True)
class Header:
    """Decoded header of a segment; sizes in bytes."""

    state: GenerationState
    tick: int
    step: int
    bulk_size: int
    meta_size: int = 0
    meta_digest: int = 0

    @property
    def meta_offset(self) -> int:
        """Where the meta starts."""
        return PAGE + page_up(self.bulk_size)

    @property
    def size(self) -> int:
        """Bytes of the segment that count."""
        return self.meta_offset + self.meta_size

    def encode(self) -> bytes:
        """The header page's used bytes."""
        body = _FIELDS.pack(
            MAGIC,
            VERSION,
            self.state,
            self.tick,
            self.step,
            self.bulk_size,
            self.meta_size,
            self.meta_digest,
        )
        return body + _DIGEST.pack(xxhash.xxh3_64_intdigest(body))


def decode_header(raw: bytes) -> Header:
    """Read a header.

    Raises:
        IntegrityError: Not a segment, of another format version, or damaged.
    """
    if len(raw) < _FIELDS.size + _DIGEST.size or raw[:8] != MAGIC:
        raise IntegrityError("not a snapshot segment: the magic bytes are missing")
    body = raw[: _FIELDS.size]
    _, version, state, tick, step, bulk_size, meta_size, meta_digest = _FIELDS.unpack(body)
    if version != VERSION:
        raise IntegrityError(
            f"segment format version {version}; this mnemo reads version {VERSION}: "
            "resume with the version that wrote it"
        )
    if _DIGEST.unpack_from(raw, _FIELDS.size)[0] != xxhash.xxh3_64_intdigest(body):
        raise IntegrityError("the segment's header fails its checksum")
    if state not in (GenerationState.WRITING, GenerationState.SEALED):
        raise IntegrityError(f"the segment's state is {state}, which is neither WRITING nor SEALED")
    return Header(GenerationState(state), tick, step, bulk_size, meta_size, meta_digest)


class TensorEntry(msgspec.Struct, frozen=True, array_like=True):
    """One tensor in the bulk space. Offsets and sizes in bytes, strides in elements."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    nbytes: int


class Meta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a segment says about its bulk.

    The bulk space is the concatenation of all tensors of a rank; a segment holds the bytes
    ``[own_size)`` that only this rank has, and ``[shared_start, shared_stop)`` of those that its
    replicas share out among themselves.
    """

    rank: int
    members: int
    tensors: tuple[TensorEntry, ...]
    own_size: int
    """Bytes at the start of the bulk space that belong to this rank alone."""
    shared_start: int
    shared_stop: int
    total: int
    """Size of the whole bulk space, bytes."""
    digests: bytes
    """xxh3-64 of each `CHUNK` of this segment's bulk, little-endian, in order."""
    small: bytes
    """Everything that is not a tensor, opaque to all but the trainer."""
    small_mac: bytes
    identity: dict[str, str]
    """Fingerprints of model, optimizer, data, hyperparameters, script."""
    position: dict[str, int]
    """Where the run is: step, epoch, batch."""
    suspect: bool = False
    """A non-finite loss was seen at this step."""
    witness: dict[int, int] = {}
    """Digests of chunks that a replica copies: shared chunk number to xxh3-64."""


_meta_encoder = msgspec.msgpack.Encoder()
_meta_decoder = msgspec.msgpack.Decoder(Meta)


def encode_meta(meta: Meta) -> bytes:
    """Serialise ``meta``."""
    return _meta_encoder.encode(meta)


def read_header(fd: int) -> Header:
    """The header of the segment behind ``fd``.

    Raises:
        IntegrityError: As `decode_header`, or the segment is shorter than its header says.
    """
    header = decode_header(os.pread(fd, PAGE, 0))
    require_length(header, os.fstat(fd).st_size)
    return header


def require_length(header: Header, length: int) -> None:
    """Make sure that all that ``header`` speaks of is within ``length`` bytes.

    Raises:
        IntegrityError: It is not.
    """
    if length < header.size:
        raise IntegrityError(
            f"the segment of step {header.step} has {length} bytes where {header.size} were "
            "written: its end is missing"
        )


def read_meta(fd: int, header: Header) -> Meta:
    """The meta that a sealed ``header`` vouches for.

    Raises:
        IntegrityError: The meta fails its checksum or cannot be decoded.
    """
    return decode_meta(os.pread(fd, header.meta_size, header.meta_offset), header)


def decode_meta(raw: bytes, header: Header) -> Meta:
    """The meta in ``raw``, checked against the ``header`` that vouches for it.

    Raises:
        IntegrityError: As `read_meta`.
    """
    if len(raw) != header.meta_size or xxhash.xxh3_64_intdigest(raw) != header.meta_digest:
        raise IntegrityError(f"the description of snapshot step {header.step} fails its checksum")
    try:
        return _meta_decoder.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise IntegrityError(
            f"the description of snapshot step {header.step} cannot be read: {error}"
        ) from error


def begin(fd: int, tick: int, step: int, bulk_size: int) -> None:
    """Mark a segment as being written, which voids what it held."""
    os.pwrite(fd, Header(GenerationState.WRITING, tick, step, bulk_size).encode(), 0)


def seal(fd: int, tick: int, step: int, bulk_size: int, meta: Meta) -> None:
    """Write the meta, then the header that makes the segment count."""
    raw = encode_meta(meta)
    header = Header(
        GenerationState.SEALED, tick, step, bulk_size, len(raw), xxhash.xxh3_64_intdigest(raw)
    )
    os.pwrite(fd, raw, header.meta_offset)
    os.pwrite(fd, header.encode(), 0)


def create(name: str, bulk_size: int) -> int:
    """A new segment with all its pages allocated, so that no write to it can fail or be slow.

    Returns:
        A descriptor that the caller owns. The memory lives as long as anybody holds one.

    Raises:
        OSError: No memory left.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, PAGE + page_up(bulk_size))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    except OSError:
        os.close(fd)
        raise
    return fd


def verify_chunk(expected: bytes, index: int, chunk: memoryview | bytes) -> bool:
    """Whether ``chunk`` has the digest that stands at ``index`` in a meta's ``digests``."""
    digest = expected[index * _DIGEST.size : (index + 1) * _DIGEST.size]
    return digest == _DIGEST.pack(xxhash.xxh3_64_intdigest(chunk))


def is_digest(expected: bytes, index: int, digest: int) -> bool:
    """Whether ``digest`` stands at ``index`` in a meta's ``digests``."""
    return bool(_DIGEST.unpack_from(expected, index * _DIGEST.size)[0] == digest)
