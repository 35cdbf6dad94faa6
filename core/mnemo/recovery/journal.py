"""The journal: one JSON line for every start, failure, recovery and end of a run.

A record holds ``v`` (format version), ``time`` (seconds since the Unix epoch), ``pid`` (of the
writer), ``event``, and the event's own fields. Readers skip fields that they do not know.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from pathlib import Path
from typing import Any, Final

import msgspec

from mnemo.clock import Clock, SystemClock
from mnemo.smp.paths import check_run_id

VERSION: Final = 1
AGENTS_JOURNAL: Final = "MNEMO_AGENT_JOURNAL"
"""By which `mnemo run` tells its ranks where its own journal is."""
_log = logging.getLogger(__name__)


def journal_path(directory: str | os.PathLike[str], run_id: str) -> Path:
    """Where the journal of a run lies.

    Args:
        directory: The setting ``run.journal``.
        run_id: The identity of the run.

    Raises:
        ConfigError: ``run_id`` cannot be part of a file name.
    """
    return Path(directory) / f"{check_run_id(run_id)}.jsonl"


class Journal:
    """Appends records to one file, which several processes may do at once.

    Nothing here raises into training: the first failure to write is logged and turns the
    journal off.
    """

    def __init__(self, path: str | os.PathLike[str], *, clock: Clock | None = None) -> None:
        self.path = Path(path)
        self._clock = clock or SystemClock()
        self._off = False

    def write(self, event: str, **fields: object) -> None:
        """Append one record.

        Args:
            event: What happened, e.g. ``"failure"``.
            fields: What JSON can hold; anything else is written as its ``str``. The names of
                the record's head (``v``, ``time``, ``pid``) are taken.
        """
        if self._off:
            return
        head = {"v": VERSION, "time": self._clock.time(), "pid": os.getpid(), "event": event}
        try:
            line = msgspec.json.encode({**head, **fields, **head}, enc_hook=str) + b"\n"
            self._append(line)
        except OSError as error:
            self._off = True
            _log.warning(
                "the journal %s cannot be written (%s): nothing more is recorded; "
                "set run.journal to a directory that can be written",
                self.path,
                error,
            )
        except (TypeError, ValueError, RecursionError) as error:
            _log.warning("the journal's record %r cannot be written as JSON: %s", event, error)

    def _append(self, line: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # A writer that was killed, or a full disk, may have left half a line: it must not
            # swallow this one. Two writers that both see it leave an empty line, which is skipped.
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                line = b"\n" + line
            # One write, so that lines of several processes do not mix.
            written = os.write(fd, line)
            if written != len(line):
                msg = f"only {written} of {len(line)} bytes fitted"
                raise OSError(msg)
        finally:
            os.close(fd)


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a journal, oldest first.

    A line cut off by a crash is skipped. Lines of a newer version are skipped and logged, since
    their meaning is unknown.

    Raises:
        OSError: The file is absent or cannot be read.
    """
    records: list[dict[str, Any]] = []
    broken: list[int] = []
    newer: list[int] = []
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            record = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            record = None
        version = record.get("v") if isinstance(record, dict) else None
        if not isinstance(record, dict) or not isinstance(version, int):
            # The last line may just be on its way; that is no reason to speak.
            if number < len(lines):
                broken.append(number)
        elif version > VERSION:
            newer.append(number)
        else:
            records.append(record)
    if broken:
        _log.warning("%s: skipped lines that are not whole: %s", path, _shown(broken))
    if newer:
        _log.warning(
            "%s: skipped lines of a newer mnemo (format above %d): %s; upgrade to read them",
            path,
            VERSION,
            _shown(newer),
        )
    return records


def history(journal: Journal) -> list[dict[str, Any]]:
    """What is known of a run, oldest first; nothing where no journal can be read.

    Where only the program sets ``run.journal``, `mnemo run` writes elsewhere why its ranks died.
    """
    agents = os.environ.get(AGENTS_JOURNAL)
    paths = {os.path.realpath(path) for path in (journal.path, agents) if path}
    found = []
    for path in paths:
        with contextlib.suppress(OSError):
            found.append(read(path))
    if len(found) < 2:
        return found[0] if found else []
    return sorted(itertools.chain(*found), key=lambda record: record.get("time") or 0.0)


def _shown(numbers: list[int], most: int = 5) -> str:
    shown = ", ".join(map(str, numbers[:most]))
    return shown if len(numbers) <= most else f"{shown} and {len(numbers) - most} more"
