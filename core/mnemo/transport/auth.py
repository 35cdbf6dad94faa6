"""Mutual challenge–response on the run's secret.

Both sides prove that they hold the secret by an HMAC-SHA256 over both nonces and their own role
(ISO/IEC 9798-4, three-pass mutual authentication). The secret itself never travels, a recorded
exchange cannot be replayed, and a proof cannot be reflected because the role is part of it.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path
from typing import Final

from mnemo.errors import SmpError

NONCE_BYTES: Final = 16
SECRET_BYTES: Final = 32


def new_nonce() -> bytes:
    """`NONCE_BYTES` random bytes, used once."""
    return secrets.token_bytes(NONCE_BYTES)


def proof(secret: bytes, role: str, own_nonce: bytes, peer_nonce: bytes) -> bytes:
    """The HMAC by which ``role`` shows that it holds ``secret``.

    Args:
        secret: The run's secret.
        role: ``"client"`` or ``"server"``: whose proof this is.
        own_nonce: Nonce chosen by the side that proves.
        peer_nonce: Nonce chosen by the side that checks.

    Returns:
        32 bytes.
    """
    return mac(secret, f"mnemo-auth-1|{role}", own_nonce, peer_nonce)


def verify(secret: bytes, role: str, prover_nonce: bytes, own_nonce: bytes, given: bytes) -> bool:
    """Whether ``given`` is the proof of ``role``; takes the same time for every wrong answer."""
    return hmac.compare_digest(proof(secret, role, prover_nonce, own_nonce), given)


def mac(secret: bytes, purpose: str, *parts: bytes) -> bytes:
    """A 32-byte MAC over ``parts``, separated by ``purpose`` from every other use of the secret."""
    h = hmac.new(secret, purpose.encode(), hashlib.sha256)
    for part in parts:
        h.update(len(part).to_bytes(8, "little"))
        h.update(part)
    return h.digest()


def load_or_create_secret(path: Path) -> bytes:
    """The run's secret: from ``MNEMO_SECRET_FILE``, else from ``path``, made 0600 if absent.

    Raises:
        SmpError: It is no file, or another user's, readable by others, too short to be a secret.
        FileNotFoundError: The directory of ``path`` does not exist.
    """
    given = os.environ.get("MNEMO_SECRET_FILE")
    source = Path(given) if given else path
    flags = os.O_RDONLY | os.O_NONBLOCK if given else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    try:
        fd = os.open(source, flags | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if not given and isinstance(error, FileNotFoundError):
            raise  # the directory is gone
        raise SmpError(f"the secret file {source} cannot be read: {error.strerror}") from error
    try:
        if not given:
            _fill(fd)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise SmpError(f"the secret file {source} is no file: name one with the secret in it")
        content = os.pread(fd, status.st_size, 0)
    finally:
        os.close(fd)
    if status.st_uid not in (os.getuid(), 0):
        raise SmpError(
            f"the secret file {source} belongs to uid {status.st_uid}, not to uid {os.getuid()}: "
            "use one of your own"
        )
    if status.st_mode & 0o077:
        raise SmpError(
            f"the secret file {source} is open to others (mode {status.st_mode & 0o777:o}): "
            "chmod 600 it"
        )
    if len(content) < NONCE_BYTES:
        raise SmpError(
            f"the secret file {source} holds {len(content)} bytes; at least {NONCE_BYTES} are "
            f"needed: head -c {SECRET_BYTES} /dev/urandom > {source}"
        )
    return content


def _fill(fd: int) -> None:
    """Write a new secret where none is; of several that come at once one writes."""
    fcntl.flock(fd, fcntl.LOCK_EX)
    if os.fstat(fd).st_size == 0:
        os.write(fd, secrets.token_bytes(SECRET_BYTES))
