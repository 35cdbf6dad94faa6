"""TensorBoard's files go on exactly where the snapshot was: no entry twice, none missing.

A killed writer leaves entries of after the snapshot in its file, and may not have written all of
those before it. The first are told by their time; the second travel with the snapshot.
"""

from __future__ import annotations

import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from lightning.pytorch.loggers import TensorBoardLogger

FLUSH_EVERY_S: Final = 2.0


class EventTail:
    """Remembers the entries of one logger that may not be on disk yet."""

    def __init__(self, logger: TensorBoardLogger) -> None:
        self._logger = logger
        self._writer: Any = None
        self._unflushed: deque[bytes] = deque()
        self._flushing: threading.Thread | None = None
        self._flushed_at = time.monotonic()

    def attach(self) -> None:
        """Follow the logger's present writer."""
        writer = getattr(self._logger.experiment._get_file_writer(), "event_writer", None)
        if writer is None or writer is self._writer:
            return
        self._writer = writer
        queue = writer._async_writer
        write = queue.write

        def remember(entry: bytes) -> None:
            self._unflushed.append(entry)
            write(entry)

        queue.write = remember

    def state(self) -> dict[str, Any]:
        """The writer's file, the present time, and the entries that may not be in the file."""
        if self._writer is None:
            return {"file": "", "time": time.time(), "tail": []}
        # The list is made before the flush begins: what it drops is on disk.
        tail = list(self._unflushed)
        self._flush_in_background(len(tail))
        return {"file": Path(self._writer._file_name).name, "time": time.time(), "tail": tail}

    def _flush_in_background(self, count: int) -> None:
        """A slow disk must not slow the training, but the tail should stay short."""
        busy = self._flushing is not None and self._flushing.is_alive()
        if not count or busy or time.monotonic() - self._flushed_at < FLUSH_EVERY_S:
            return

        def flush() -> None:
            self._writer.flush()
            for _ in range(count):
                self._unflushed.popleft()

        self._flushed_at = time.monotonic()
        self._flushing = threading.Thread(target=flush, name="mnemo-flush", daemon=True)
        self._flushing.start()

    def close(self) -> None:
        """Stop following."""
        if self._flushing is not None:
            self._flushing.join()
        if self._writer is not None:
            vars(self._writer._async_writer).pop("write", None)
        self._writer = None


def rewind(directory: Path, saved: dict[str, Any]) -> None:
    """Make the files in ``directory`` what they would have been at the snapshot.

    Args:
        directory: Of one logger version.
        saved: From `EventTail.state`.
    """
    for path in sorted(directory.glob("events.out.tfevents.*")):
        tail = saved["tail"] if path.name == saved["file"] else []
        _rewrite(path, saved["time"], tail)


def _rewrite(path: Path, until: float, tail: list[bytes]) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    kept = []
    raw = path.read_bytes()
    for entry in _entries(raw):
        event = Event.FromString(entry)
        if event.wall_time <= until or not event.HasField("summary"):
            kept.append(entry)
    present = set(kept)
    kept += [entry for entry in tail if entry not in present]
    draft = path.with_name(f".{path.name}.tmp")
    with draft.open("wb") as file:
        records = RecordWriter(file)
        for entry in kept:
            records.write(entry)
    draft.replace(path)


def _entries(raw: bytes) -> Iterator[bytes]:
    """The whole records of a TFRecord file; a torn last one, which a kill leaves, is dropped.

    A record is a length (u64), its CRC (u32), the data, their CRC (u32).
    """
    position = 0
    while position + 12 <= len(raw):
        (length,) = struct.unpack_from("<Q", raw, position)
        end = position + 12 + length + 4
        if end > len(raw):
            return
        yield raw[position + 12 : end - 4]
        position = end
