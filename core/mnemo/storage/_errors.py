"""Whatever a store's client library raises, told as one `StorageError` with advice."""

from __future__ import annotations

import errno
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mnemo.errors import MnemoError, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator

# user:password@ (the password of an S3 URL may hold slashes), token@, and everything after "?".
_SECRET = re.compile(r"(?<=://)(?:[^/@]*:[^@]*|[^/@]+)(?=@)|(?<=\?).+")
_UNREACHABLE = re.compile(r"Connect|Timeout|Endpoint|Unreachable|ServerDisconnected")


class ErrorTranslator:
    """Turns the errors of one store into `StorageError`, without the credentials in its URL.

    Args:
        url: The store's URL as the user wrote it.
    """

    def __init__(self, url: str) -> None:
        self._secrets = _SECRET.findall(url) if "://" in url else []

    def mask(self, text: str) -> str:
        """Returns ``text`` with the URL's credentials replaced by ``***``."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    @contextmanager
    def during(self, action: str, where: str) -> Iterator[None]:
        """Raises what the block raises as `StorageError`.

        Args:
            action: What was tried, as in "write".
            where: What it was tried on: a path or URL, masked here.
        """
        try:
            yield
        except MnemoError:
            raise
        except Exception as err:
            message = self.mask(f"could not {action} {where}: {_reason(err)}; {_advice(err)}")
            if self._secrets:  # a chained traceback would print what the message hides
                raise StorageError(message) from None
            raise StorageError(message) from err


def _reason(err: Exception) -> str:
    if isinstance(err, OSError) and err.strerror:
        return str(err.strerror)
    return str(err) or type(err).__name__


def _advice(err: Exception) -> str:
    kind = " ".join(cls.__name__ for cls in type(err).__mro__)
    code = err.errno if isinstance(err, OSError) else None
    if isinstance(err, ImportError):
        missing = getattr(err.__cause__, "name", None) or err.name
        return f"pip install {missing}" if missing else "install the package that it names"
    if "not known" in str(err):
        return "use a path or a URL that fsspec knows, as file://, s3://, gs:// or abfs://"
    if code in (errno.ENOSPC, errno.EDQUOT):
        return "free space there or keep fewer checkpoints (persist.keep)"
    if "Credential" in kind:
        return "give credentials in the environment or in the store's own configuration file"
    if isinstance(err, PermissionError) or code == errno.EROFS:
        return "let this user, or these credentials, read, write and delete there"
    if isinstance(err, FileNotFoundError):
        return "create the bucket or directory, or correct persist.to"
    if _UNREACHABLE.search(kind):
        return "check the address in persist.to and the network"
    return "check persist.to and the store"
