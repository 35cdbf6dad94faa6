"""The marker file: the one thing that makes a checkpoint count. Bytes in, values out; no I/O."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final, Literal, TypeAlias

import msgspec
import xxhash

from mnemo.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT: Final = "mnemo-checkpoint"
VERSION: Final = 1
MARKER: Final = "COMMITTED.json"
PART_NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}\Z"

JsonScalar: TypeAlias = str | int | float | bool | None


@dataclass(frozen=True)
class Part:
    """One file of a checkpoint.

    Attributes:
        name: File name within the checkpoint.
        size: Length in bytes.
        digest: xxh3_128 of the content, 32 lower-case hexadecimal digits.
    """

    name: Annotated[str, msgspec.Meta(pattern=PART_NAME)]
    size: Annotated[int, msgspec.Meta(ge=0)]
    digest: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, as its marker describes it.

    Attributes:
        step: The training step that the state belongs to.
        parts: Its files, in the order in which they were written.
        created: When it was completed, in seconds since the Unix epoch.
        meta: The writer's own values.
    """

    step: int
    parts: tuple[Part, ...]
    created: float
    meta: Mapping[str, JsonScalar]

    def part(self, name: str) -> Part:
        """Returns the part called ``name``.

        Raises:
            ValueError: There is none.
        """
        for part in self.parts:
            if part.name == name:
                return part
        held = ", ".join(part.name for part in self.parts) or "none"
        raise ValueError(f"checkpoint of step {self.step} has no part {name!r}; it has: {held}")


class _Heading(msgspec.Struct):
    """What every version of the body has, read before anything else is expected of it."""

    format: Literal["mnemo-checkpoint"]
    version: Annotated[int, msgspec.Meta(ge=1)]


class _Body(msgspec.Struct):
    format: str
    version: int
    run_id: str
    step: Annotated[int, msgspec.Meta(ge=0)]
    parts: tuple[Part, ...]
    created: float
    meta: dict[str, JsonScalar]


class _Envelope(msgspec.Struct, omit_defaults=True):
    """The checks cover the body's bytes as stored, so that no canonical JSON is needed."""

    body: msgspec.Raw
    xxh3_128: str
    hmac_sha256: str | None = None


def encode_marker(checkpoint: Checkpoint, run_id: str, key: bytes | None) -> bytes:
    """Returns the marker's bytes, with a MAC if there is a key."""
    body = msgspec.json.encode(
        _Body(
            format=FORMAT,
            version=VERSION,
            run_id=run_id,
            step=checkpoint.step,
            parts=checkpoint.parts,
            created=checkpoint.created,
            meta=dict(checkpoint.meta),
        )
    )
    mac = None if key is None else _mac(key, body)
    return msgspec.json.encode(
        _Envelope(body=msgspec.Raw(body), xxh3_128=xxhash.xxh3_128_hexdigest(body), hmac_sha256=mac)
    )


def decode_marker(raw: bytes, *, step: int, run_id: str, key: bytes | None) -> Checkpoint:
    """Checks a marker's bytes and returns the checkpoint that they describe.

    Args:
        raw: The marker file's content.
        step: The step in the name of the directory that it was found in.
        run_id: The run that it has to belong to.
        key: The run's key; without one a MAC is not checked.

    Raises:
        IntegrityError: The marker is damaged, not signed with ``key``, of another run or step, or
            of a format version that this mnemo does not know. The message names which.
    """
    try:
        envelope = msgspec.json.decode(raw, type=_Envelope)
        heading = msgspec.json.decode(envelope.body, type=_Heading)
    except (msgspec.DecodeError, UnicodeDecodeError) as err:
        raise IntegrityError(f"the marker is damaged or not mnemo's ({err})") from err
    if heading.version > VERSION:
        raise IntegrityError(
            f"format version {heading.version} is newer than {VERSION}, the newest that this "
            "mnemo reads; upgrade mnemo-ft"
        )
    body = bytes(envelope.body)
    if xxhash.xxh3_128_hexdigest(body) != envelope.xxh3_128:
        raise IntegrityError("the marker is damaged: its checksum differs")
    if key is not None:
        if envelope.hmac_sha256 is None:
            raise IntegrityError("the marker carries no MAC and this run has a key")
        if not hmac.compare_digest(_mac(key, body).encode(), envelope.hmac_sha256.encode()):
            raise IntegrityError("the marker's MAC is wrong: written with another key, or forged")
    try:
        found = msgspec.json.decode(body, type=_Body)
    except msgspec.ValidationError as err:
        raise IntegrityError(f"the marker breaks the format ({err})") from err
    if (found.run_id, found.step) != (run_id, step):
        raise IntegrityError(
            f"the marker belongs to run {found.run_id!r}, step {found.step}, "
            f"and was found in run {run_id!r}, step {step}"
        )
    return Checkpoint(found.step, found.parts, found.created, found.meta)


def checked_meta(meta: Mapping[str, JsonScalar]) -> dict[str, JsonScalar]:
    """Returns a copy of ``meta``.

    Raises:
        ValueError: It would not come back from JSON as it is: a nested value, NaN, infinity.
    """
    copy = dict(meta)
    try:
        survives = msgspec.json.decode(msgspec.json.encode(copy), type=dict[str, JsonScalar])
    except (msgspec.MsgspecError, TypeError, OverflowError) as err:
        raise ValueError(f"meta must map strings to JSON scalars, got {meta!r}: {err}") from err
    if survives != copy:
        raise ValueError(f"meta must survive JSON unchanged, got {meta!r}")
    return copy


def _mac(key: bytes, body: bytes) -> str:
    return hmac.new(key, body, hashlib.sha256).hexdigest()
