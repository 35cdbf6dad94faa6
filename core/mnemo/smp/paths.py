"""Where the processes of one run meet on a node: a private directory."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from mnemo.errors import ConfigError, SmpError

AGENTS_DIRECTORY: Final = "MNEMO_AGENT_RUN_DIR"
"""By which `mnemo run` tells its ranks where it looks for the run's SMP."""
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_PART = re.compile(r"\.(fit|node)-[0-9]+$")
"""How the checkpoints of one training, or one node, of a run are told apart on storage."""


def default_parent() -> Path:
    """Parent of all run directories of this user."""
    return Path(tempfile.gettempdir()) / f"mnemo-{os.getuid()}"


def check_run_id(run_id: str) -> str:
    """``run_id`` itself.

    Raises:
        ConfigError: It could not be a directory's name.
    """
    if not run_id or _UNSAFE.search(run_id) or run_id.startswith(".") or len(run_id) > 128:
        raise ConfigError(
            f"run.id {run_id!r} cannot name a directory: use up to 128 letters, digits, "
            "'.', '_', '-', not starting with '.'"
        )
    if found := _PART.search(run_id):
        raise ConfigError(
            f"run.id {run_id!r} ends in {found[0]!r}, as checkpoints of one part of a run "
            f"{run_id[: found.start()]!r} are named: use {_PART.sub('', run_id)}-2 or the like"
        )
    return run_id


class SmpRecord(msgspec.Struct, frozen=True):
    """What a running SMP leaves in the run directory for others to find it."""

    pid: int
    socket: str
    started: float


@dataclass(frozen=True)
class RunPaths:
    """The files of one run on this node."""

    directory: Path

    @classmethod
    def of(cls, run_id: str, parent: str | Path = "") -> RunPaths:
        """Paths of ``run_id`` below ``parent`` (default: `default_parent`)."""
        base = Path(parent).absolute() if parent else default_parent()
        return cls(base / check_run_id(run_id))

    @property
    def run_id(self) -> str:
        """The run's id."""
        return self.directory.name

    def is_at(self, directory: str | Path) -> bool:
        """Whether ``directory`` is this one, however either is spelled."""
        return os.path.realpath(self.directory) == os.path.realpath(directory)

    @property
    def socket(self) -> Path:
        """Where the SMP listens, unless the file system has no sockets."""
        return self.directory / "smp.sock"

    @property
    def lock(self) -> Path:
        """Held by the SMP as long as it lives, and by whoever is about to start one."""
        return self.directory / "smp.lock"

    @property
    def record(self) -> Path:
        """`SmpRecord` of the running SMP, as JSON."""
        return self.directory / "smp.json"

    @property
    def secret(self) -> Path:
        """The run's secret, 0600."""
        return self.directory / "secret"

    @property
    def made(self) -> Path:
        """Names the topmost of the parents that were made along with the directory, if any."""
        return self.directory / "made"

    @property
    def verdicts(self) -> Path:
        """Addresses of nodes that ``mnemo confirm-lost`` vouches are dead, for `mnemo run`."""
        return self.directory / "lost"

    @property
    def log(self) -> Path:
        """What the SMP has to say."""
        return self.directory / "smp.log"

    def make(self) -> None:
        """Create the directory, 0700, and refuse one that somebody else could tamper with.

        The parent may be a link, as long as nobody else could point it elsewhere.

        Raises:
            SmpError: It or its parent is not ours, or not a directory, or cannot be made.
            FileNotFoundError: Somebody has just removed what was there: try again.
        """
        parent = self.directory.parent
        made = _make(self.directory)
        found, above = self.directory.lstat(), parent.stat()
        for directory, owners in (
            (parent, {parent.lstat().st_uid, above.st_uid}),
            (self.directory, {found.st_uid}),
        ):
            strangers = owners - {os.getuid()} - ({0} if directory == parent else set())
            if strangers:
                raise SmpError(
                    f"the run directory {directory} belongs to uid {strangers.pop()}, not to uid "
                    f"{os.getuid()}: set run.dir to a directory of your own"
                )
        if not stat.S_ISDIR(found.st_mode):
            raise SmpError(
                f"the run directory {self.directory} is not a directory (links are not followed "
                "here): remove it or set run.dir"
            )
        if above.st_mode & 0o022 and not above.st_mode & stat.S_ISVTX:
            raise SmpError(
                f"others may replace what is in {parent} (mode {above.st_mode & 0o7777:o}): "
                f"chmod go-w {parent}, or set run.dir to a directory of your own"
            )
        if found.st_mode & 0o077:
            self.directory.chmod(0o700)
        top = self._topmost_made()
        if made and made[0] != self.directory and (top is None or made[0] in top.parents):
            self.made.write_bytes(os.fsencode(made[0]))

    def _topmost_made(self) -> Path | None:
        try:
            top = Path(os.fsdecode(self.made.read_bytes()))
        except OSError:
            return None
        return top if top in self.directory.parents else None

    def read_record(self) -> SmpRecord | None:
        """The running SMP's record, or None."""
        try:
            return msgspec.json.decode(self.record.read_bytes(), type=SmpRecord)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return None

    def remove(self) -> None:
        """Delete everything, and of the parents those that mnemo made and that are empty now."""
        last = self._topmost_made()
        if last is None:
            parent = self.directory.parent
            last = parent if parent == default_parent() else self.directory
        for path in (self.socket, self.record, self.secret, self.log, self.made, self.lock):
            path.unlink(missing_ok=True)
        for directory in (self.directory, *self.directory.parents):
            try:
                directory.rmdir()
            except OSError:
                return
            if directory == last:
                return


def _make(directory: Path) -> list[Path]:
    """Make a directory and what is missing above it, each 0700; what was made, topmost first."""
    made = []
    for path in reversed((directory, *directory.parents)):
        try:
            if not path.is_dir():
                path.mkdir(mode=0o700)
                made.append(path)
        except FileExistsError:
            if path.is_dir():
                continue  # another process was faster
            if path == directory and path.is_symlink():
                break  # `RunPaths.make` says what is wrong with it
            raise SmpError(
                f"the run directory {path} is not a directory: remove it or set run.dir"
            ) from None
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not path.parent.exists():
                raise  # it was there a moment ago
            raise SmpError(
                f"the run directory {directory} cannot be made: {error.strerror}. "
                "Set run.dir to a directory on a local file system"
            ) from error
    return made
