"""Writing, listing, reading and pruning checkpoints on an fsspec store."""

from __future__ import annotations

import logging
import os
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import fsspec
import xxhash
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from mnemo.clock import Clock, SystemClock
from mnemo.errors import ConfigError, IntegrityError, StorageError, WriteCancelledError
from mnemo.storage._errors import ErrorTranslator
from mnemo.storage._marker import (
    MARKER,
    PART_NAME,
    Checkpoint,
    JsonScalar,
    Part,
    checked_meta,
    decode_marker,
    encode_marker,
)

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from typing_extensions import Buffer

_log = logging.getLogger(__name__)

_CHUNK: Final = 4 << 20
_MAX_STEP: Final = 10**12 - 1
_STEP_DIRECTORY = re.compile(r"^step-(\d{12})$")
_TRIAL: Final = "trial"
_SAFE_NAME = re.compile(PART_NAME)


class CheckpointStore:
    """The checkpoints of one run on one fsspec store.

    One writer at a time; any number of readers, also of other processes. Not thread-safe. Calls
    block for as long as the store takes: give it a thread of its own.

    Args:
        url: Any path or URL that fsspec knows, as ``/data/ckpt`` or ``s3://bucket/prefix``.
        run_id: Whose checkpoints; becomes a directory name.
        keep: How many complete checkpoints survive pruning, at least 1.
        key: The run's secret. With it markers are signed, and unsigned ones refused; without it
            signatures are not looked at.
        clock: Where `Checkpoint.created` comes from.
        storage_options: Passed on to the fsspec file system.

    Raises:
        ConfigError: ``url`` is empty, ``run_id`` is unfit for a directory name, ``keep`` < 1.
        StorageError: No such protocol, or the package behind it is missing.
    """

    def __init__(
        self,
        url: str,
        *,
        run_id: str,
        keep: int = 3,
        key: bytes | None = None,
        clock: Clock | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        if not url:
            raise ConfigError("the store's URL is empty; set persist.to to a path or URL")
        if not _SAFE_NAME.match(run_id):
            raise ConfigError(
                f"run id {run_id!r} cannot be a directory name; use up to 200 letters, digits, "
                "'.', '_' and '-', beginning with a letter or digit"
            )
        if keep < 1:
            raise ConfigError(f"persist.keep is {keep}; at least 1 checkpoint has to be kept")
        self._errors = ErrorTranslator(url)
        with self._errors.during("open", url):
            self._fs, path = fsspec.core.url_to_fs(url, **(storage_options or {}))
        self._root = f"{path.rstrip('/')}/{run_id}"
        self._run_id = run_id
        self._keep = keep
        self._key = key
        self._clock = clock or SystemClock()
        self.url = self._errors.mask(url)
        """Where the checkpoints lie, fit for logs: credentials are masked."""

    def write(
        self,
        step: int,
        parts: Mapping[str, Callable[[], Iterable[Buffer]]],
        meta: Mapping[str, JsonScalar] | None = None,
        *,
        cancel: threading.Event | None = None,
    ) -> Checkpoint:
        """Stores a checkpoint, then prunes those before it.

        Each part is streamed once, in pieces of at most 4 MiB, and checksummed on the way. What the
        store then holds is compared with what was sent; the marker comes last. A checkpoint of the
        same step, complete or not, is deleted first. Failing to prune is logged, not raised.

        Args:
            step: The training step, in [0, 10**12).
            parts: For each file name what yields its content. The buffers must be contiguous and
                stay unchanged until the next one is asked for.
            meta: Values to keep in the marker.
            cancel: Looked at before each piece; once set, the write is given up. A piece on its way
                is waited for; file systems may gather several (s3fs: 50 MiB).

        Returns:
            What `checkpoints` will list.

        Raises:
            ValueError: A step, part name or meta value out of its bounds. Nothing was touched.
            WriteCancelledError: ``cancel`` was set.
            StorageError: The store failed. In both cases no marker is left where the store could
                still be reached to delete it, and earlier checkpoints are as they were.
        """
        if not 0 <= step <= _MAX_STEP:
            raise ValueError(f"step is {step}; it must lie in [0, {_MAX_STEP}]")
        for name in parts:
            if not _SAFE_NAME.match(name) or name.lower() == MARKER.lower():
                raise ValueError(
                    f"part name {name!r} cannot be a file name; use up to 200 letters, digits, "
                    f"'.', '_' and '-', beginning with a letter or digit, and not {MARKER}"
                )
        checked = checked_meta(meta or {})
        directory = self._directory(step)
        self.delete(step)
        try:
            written = tuple(
                self._write_file(f"{directory}/{name}", _pieces(chunks(), cancel), name)
                for name, chunks in parts.items()
            )
            self._sync_directories(directory)
            checkpoint = Checkpoint(step, written, self._clock.time(), checked)
            marker = encode_marker(checkpoint, self._run_id, self._key)
            self._write_file(f"{directory}/{MARKER}", [memoryview(marker)], MARKER)
            self._sync_directories(directory)
        except BaseException:
            # The first error is the one to tell; what stays behind goes with the next prune.
            with suppress(StorageError):
                self.delete(step)
            raise
        try:
            self._prune_before(step)
        except StorageError as err:
            _log.warning("checkpoint of step %d is stored, old ones are not pruned: %s", step, err)
        return checkpoint

    def checkpoints(self) -> list[Checkpoint]:
        """Lists the complete checkpoints, newest first; damaged ones are logged and left out.

        Raises:
            StorageError: The store, or a marker in it, cannot be read.
        """
        found = []
        for step in self._steps():
            marker = self._read_marker(step)
            if marker:
                try:
                    found.append(self._decode(step, marker))
                except IntegrityError as err:
                    _log.warning("checkpoint left out: %s", err)
        return found

    def get(self, step: int) -> Checkpoint:
        """Returns the checkpoint of ``step``.

        Raises:
            IntegrityError: There is none, or its marker cannot be trusted.
            StorageError: The store cannot be read.
        """
        marker = self._read_marker(step)
        if not marker:
            raise IntegrityError(f"{self._shown(step)} holds no complete checkpoint; use another")
        return self._decode(step, marker)

    def read_into(self, checkpoint: Checkpoint, name: str, buffer: Buffer) -> None:
        """Reads one part into the caller's memory, without a copy where the store allows it.

        Args:
            checkpoint: One that `checkpoints` or `get` returned.
            name: The part's name.
            buffer: Writable, contiguous, of exactly the part's size.

        Raises:
            ValueError: No such part, or the buffer is read-only or of another size.
            IntegrityError: The file is missing, or is not what was written. The buffer's content is
                then undefined.
            StorageError: The store cannot be read.
        """
        part = checkpoint.part(name)
        view = memoryview(buffer)
        if view.readonly or view.nbytes != part.size:
            raise ValueError(
                f"part {name!r} needs a writable buffer of {part.size} bytes, got "
                f"{'a read-only' if view.readonly else 'a writable'} one of {view.nbytes}"
            )
        path = f"{self._directory(checkpoint.step)}/{name}"
        shown = f"part {name!r} of {self._shown(checkpoint.step)}"
        hasher = xxhash.xxh3_128()
        self._fs.invalidate_cache()
        with self._errors.during("read", path):
            try:
                with self._fs.open(path, "rb") as file:
                    for piece in _split(view):
                        got = _fill(file, piece)
                        hasher.update(piece[:got])
                    longer = bool(file.read(1))
            except FileNotFoundError as err:
                raise IntegrityError(
                    f"{shown} is missing: pruned meanwhile or damaged; list again, use another"
                ) from err
        if longer or hasher.hexdigest() != part.digest:
            raise IntegrityError(
                f"{shown} is not what was written: it is truncated or damaged; use another "
                f"checkpoint (expected {part.size} bytes with xxh3_128 {part.digest})"
            )

    def try_write(self) -> None:
        """Writes an empty file and deletes it.

        Raises:
            StorageError: A checkpoint could not be written either.
        """
        path = f"{self._root}/{_TRIAL}"
        self._write_file(path, (), _TRIAL)
        with self._errors.during("delete", path):
            self._fs.rm_file(path)

    def delete(self, step: int) -> None:
        """Deletes the checkpoint of ``step``, or what there is of it; its marker first.

        Raises:
            StorageError: The store refused, or cannot be reached.
        """
        directory = self._directory(step)
        self._fs.invalidate_cache()
        with self._errors.during("delete", directory):
            with suppress(FileNotFoundError, NotADirectoryError):
                self._fs.rm_file(f"{directory}/{MARKER}")
            with suppress(FileNotFoundError):
                self._fs.rm(directory, recursive=True)

    def _directory(self, step: int) -> str:
        return f"{self._root}/step-{step:012d}"

    def _shown(self, step: int) -> str:
        return self._errors.mask(self._directory(step))

    def _steps(self) -> list[int]:
        """Steps that have a directory, complete or not, newest first."""
        self._fs.invalidate_cache()
        with self._errors.during("list", self._root):
            try:
                paths = self._fs.ls(self._root, detail=False)
            except FileNotFoundError:
                return []
        names = (path.rstrip("/").rpartition("/")[2] for path in paths)
        return sorted((int(m[1]) for m in map(_STEP_DIRECTORY.match, names) if m), reverse=True)

    def _read_marker(self, step: int) -> bytes:
        """Returns the marker's bytes, none where it is missing or was only begun."""
        path = f"{self._directory(step)}/{MARKER}"
        with self._errors.during("read", path):
            try:
                return bytes(self._fs.cat_file(path))
            except (FileNotFoundError, NotADirectoryError):
                return b""

    def _decode(self, step: int, marker: bytes) -> Checkpoint:
        try:
            return decode_marker(marker, step=step, run_id=self._run_id, key=self._key)
        except IntegrityError as err:
            raise IntegrityError(f"{self._shown(step)} cannot be used: {err}") from err

    def _prune_before(self, step: int) -> None:
        """Deletes what is older than the just completed ``step`` and not to be kept.

        Later steps are left alone: after a rollback they are of another line of history, and
        counting them would delete the checkpoint just written. So are checkpoints that
        this store cannot judge, for their key or format is not its own.
        """
        kept = 1
        for older in self._steps():
            if older >= step:
                continue
            marker = self._read_marker(older)
            if marker:
                try:
                    self._decode(older, marker)
                except IntegrityError as err:
                    _log.warning("not pruned: %s", err)
                    continue
                if kept < self._keep:
                    kept += 1
                    continue
            self.delete(older)

    def _write_file(self, path: str, pieces: Iterable[memoryview], name: str) -> Part:
        hasher = xxhash.xxh3_128()
        size = 0
        with self._errors.during("write", path):
            file = self._open_new(path)
        try:
            for piece in pieces:  # outside the translation: the source's own errors stay its own
                with self._errors.during("write", path):
                    file.write(piece)
                hasher.update(piece)
                size += len(piece)
            with self._errors.during("write", path):
                if isinstance(self._fs, LocalFileSystem):
                    file.flush()
                    os.fsync(file.fileno())
                file.close()
        except BaseException:
            _abandon(file)
            raise
        self._fs.invalidate_cache()
        with self._errors.during("verify", path):
            stored = self._fs.info(path)["size"]
        if stored != size:
            raise StorageError(
                f"{self._errors.mask(path)} holds {stored} of the {size} bytes written; "
                "the store has truncated it, check its free space and its log"
            )
        return Part(name, size, hasher.hexdigest())

    def _open_new(self, path: str) -> Any:
        try:
            return self._fs.open(path, "wb")
        except FileNotFoundError:
            # Only a file system with real directories complains here. Made on demand, because
            # on object stores the same call would create a bucket.
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            return self._fs.open(path, "wb")

    def _sync_directories(self, directory: str) -> None:
        """Makes the names of a local checkpoint's files outlive a power cut."""
        if not isinstance(self._fs, LocalFileSystem):
            return
        for path in (directory, self._root):
            with suppress(OSError):  # not every mounted file system can do it
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)


def _split(view: memoryview) -> Iterator[memoryview]:
    """Cuts a contiguous buffer into byte views of at most 4 MiB."""
    if view.nbytes:  # a view with a zero in its shape cannot be cast
        flat = view.cast("B")
        for start in range(0, len(flat), _CHUNK):
            yield flat[start : start + _CHUNK]


def _pieces(chunks: Iterable[Buffer], cancel: threading.Event | None) -> Iterator[memoryview]:
    for chunk in chunks:
        for piece in _split(memoryview(chunk)):
            if cancel is not None and cancel.is_set():
                raise WriteCancelledError("writing the checkpoint was cancelled")
            yield piece


def _fill(file: Any, view: memoryview) -> int:
    """Reads until ``view`` is full or the file ends; returns the number of bytes read."""
    done = 0
    while done < len(view):
        got = file.readinto(view[done:])
        if not got:
            break
        done += got
    return done


def _abandon(file: Any) -> None:
    """Closes a file without completing the upload that it may stand for."""
    try:
        if isinstance(file, AbstractBufferedFile):
            try:
                file.discard()
            finally:
                file.closed = True  # else the garbage collector would complete the upload
        else:
            file.close()
    except Exception as err:  # noqa: BLE001  (the error that led here is the one to tell)
        _log.debug("closing an abandoned file failed: %s", type(err).__name__)
