"""Finding this user's runs on this node, and what is stored of them."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import psutil
import typer

from mnemo.config import load_config
from mnemo.errors import IdentityError, SmpError
from mnemo.smp.client import SmpClient
from mnemo.smp.paths import RunPaths, SmpRecord, default_parent
from mnemo.storage import CheckpointStore, stored_ids
from mnemo.transport import auth

_PATIENCE_S: Final = 5.0

RunId = Annotated[str, typer.Argument(metavar="RUN_ID", show_default=False, help="The run.")]
Directory = Annotated[
    Path | None,
    typer.Option(
        "--dir", help="Parent of the run directories; the default is run.dir of the settings."
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option(help="YAML file; the default is the one MNEMO_CONFIG names.")
]
PersistTo = Annotated[
    str | None,
    typer.Option(
        help="Where the checkpoints are; the default is persist.to of the settings, "
        "else what the living run says."
    ),
]


@dataclass(frozen=True)
class Run:
    """One run directory, and what its snapshot process (SMP) says of itself."""

    paths: RunPaths
    status: dict[str, Any] | None = None
    """See `mnemo.smp.server.Server.status`; None where no SMP answers."""
    problem: str = ""
    """Why an SMP that lives does not answer."""

    @property
    def is_stale(self) -> bool:
        """Nothing lives here: only files are left."""
        return self.status is None and not self.problem

    @property
    def pids(self) -> dict[int, int]:
        """Process of each rank that is connected, by rank; none where nothing is training."""
        fits = self.status["fits"] if self.status else []
        return {int(rank): pid for fit in fits for rank, pid in sorted(fit["connected"].items())}

    @property
    def fits(self) -> set[int]:
        """Numbers of the trainings that the SMP knows."""
        return {fit["fit"] for fit in self.status["fits"]} if self.status else set()


def run_directory(given: Path | None, config: Path | None = None) -> Path:
    """The parent of all run directories: ``given``, else the setting ``run.dir``.

    Raises:
        ConfigError: The settings cannot be read.
    """
    return Path(given or load_config(config).run.dir or default_parent()).absolute()


def look(paths: RunPaths) -> Run:
    """Ask the SMP of a run, if one lives. Nothing is started, made or changed."""
    record = paths.read_record()
    if record is None:
        return Run(paths)
    try:
        with connect(paths) as client:
            return Run(paths, client.status())
    except SmpError as error:
        return Run(paths, problem=str(error) if _lives(record) else "")


def connect(paths: RunPaths) -> SmpClient:
    """A connection to the run's living SMP.

    Raises:
        SmpError: None answers.
    """
    try:
        secret = auth.load_or_create_secret(paths.secret)
    except FileNotFoundError as error:
        raise SmpError(f"run {paths.run_id} has just ended, and its directory is gone") from error
    return SmpClient.connect(paths, secret, _PATIENCE_S)


def all_runs(parent: Path) -> list[Run]:
    """Every run of this user below ``parent``, by name."""
    try:
        names = sorted(os.listdir(parent))  # noqa: PTH208 - names only
    except OSError:
        return []
    return [look(paths) for name in names if _is_ours(paths := RunPaths(parent / name))]


def one_run(run_id: str, parent: Path) -> Run:
    """The run of that name.

    Raises:
        ConfigError: No run could have this name.
        IdentityError: There is none; the message lists those that there are.
    """
    paths = RunPaths.of(run_id, parent)
    if not _is_ours(paths):
        known = [run.paths.run_id for run in all_runs(parent)]
        there = f"there are {', '.join(known)}" if known else "there is no run at all"
        raise IdentityError(
            f"no run {run_id} in {parent}; {there}. Was it started with another run.dir (--dir)?"
        )
    return look(paths)


def _is_ours(paths: RunPaths) -> bool:
    """A directory of this user, no link to one, in which a run has been."""
    try:
        found = paths.directory.lstat()
    except OSError:
        return False
    return (
        stat.S_ISDIR(found.st_mode)
        and found.st_uid == os.getuid()
        and (paths.lock.exists() or paths.secret.exists())
    )


def _lives(record: SmpRecord) -> bool:
    """Whether the SMP of the record lives, and its number was not given to another process."""
    try:
        process = psutil.Process(record.pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False  # ended, and not collected by its parent
        return process.create_time() <= record.started + 1
    except psutil.NoSuchProcess:
        return False


def stores(run_id: str, url: str) -> dict[int, tuple[CheckpointStore, ...]]:
    """The stores of each fit (training) of a run that has anything at ``url``, by fit.

    There is one; of a run on several nodes one of each node.

    Raises:
        StorageError: The store cannot be read.
    """
    name = re.compile(re.escape(run_id) + r"(?:\.fit-(\d+))?(?:\.node-(\d+))?")
    names = [m for m in map(name.fullmatch, stored_ids(url)) if m]
    found: dict[int, tuple[CheckpointStore, ...]] = {}
    for match in sorted(names, key=lambda m: (int(m[1] or 0), int(m[2] or 0))):
        store = CheckpointStore(url, run_id=match[0])
        found[int(match[1] or 0)] = (*found.get(int(match[1] or 0), ()), store)
    return found


def find_run(
    run_id: str, directory: Path | None, config: Path | None, persist_to: str | None
) -> tuple[Run, str]:
    """A run, and the URL of its checkpoints, '' for none. One of the two is enough.

    Args:
        run_id: The run.
        directory: See `run_directory`.
        config: YAML file of settings.
        persist_to: Where its checkpoints are, if the settings do not say.

    Raises:
        ConfigError: The settings cannot be read, or ``persist_to`` is no URL.
        IdentityError: The run is not on this node, and no URL is known.
    """
    parent = run_directory(directory, config)
    paths = RunPaths.of(run_id, parent)
    run = look(paths) if _is_ours(paths) else Run(paths)
    url = _storage_url(run, persist_to, config)
    return (run, url) if url else (one_run(run_id, parent), url)


def _storage_url(run: Run, given: str | None, config: Path | None) -> str:
    """Where the run's checkpoints are: ``given``, else the setting, else what its SMP says.

    Empty where nobody says.

    Raises:
        ConfigError: The settings cannot be read, or ``given`` is no URL.
    """
    url = load_config(config, persist={"to": given} if given else None).persist.to
    if url:
        return url if "://" in url else str(Path(url).absolute())
    fits = run.status["fits"] if run.status else []
    return next((fit["persist"]["to"] for fit in fits if fit["persist"]), "")
