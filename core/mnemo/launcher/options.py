"""What a launch is made of, and how torchrun's flags are read."""

from __future__ import annotations

import math
import os
import re
import secrets
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mnemo.errors import LaunchError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_STREAMS: Final[Mapping[str, tuple[str, ...]]] = {
    "0": (),
    "1": ("stdout",),
    "2": ("stderr",),
    "3": ("stdout", "stderr"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchOptions:
    """Everything that the agent needs to know about a launch.

    Attributes:
        command: Program and arguments of every rank.
        run_id: Identity of the run; part of file names.
        ranks: Number of ranks to start.
        log_dir: Holds one directory per life, with one file per rank.
        master_addr: Where rank 0 hosts the ranks' store.
        master_port: Its port; None takes a free one for each life.
        torch_run_id: The value of TORCHELASTIC_RUN_ID.
        role: The value of ROLE_NAME.
        max_restarts: How often the ranks are restarted within the window.
        restart_window_s: Length of that window in seconds.
        grace_s: Seconds that ranks have to end by themselves once they are asked to, or once one
            of them has ended.
        environ: Variables of every rank, above the agent's own environment.
        hidden: Streams (local rank, ``stdout`` or ``stderr``) that go to the file only.
        in_process: A rank that dies may be replaced while the others stay.
        standbys: So many processes then wait, everything imported, to take a place. They know
            ``command`` as `rank_command` makes it for Python.
        join_limit_s: Seconds that a replacement may take.
        hang_limit_s: Seconds without progress after which a rank that the others wait for is
            killed; infinite for never, None where that follows from what is measured.
    """

    command: tuple[str, ...]
    run_id: str
    ranks: int
    log_dir: Path
    master_addr: str = "127.0.0.1"
    master_port: int | None = None
    torch_run_id: str = ""
    role: str = "default"
    max_restarts: int = 3
    restart_window_s: float = 3600.0
    grace_s: float = 30.0
    environ: Mapping[str, str] = field(default_factory=dict)
    hidden: frozenset[tuple[int, str]] = frozenset()
    in_process: bool = False
    standbys: int = 0
    join_limit_s: float = 120.0
    hang_limit_s: float | None = math.inf

    def __post_init__(self) -> None:
        if self.max_restarts < 0:
            msg = f"--max-restarts={self.max_restarts} is negative; use 0 for no restart"
            raise LaunchError(msg)


def count_ranks(nproc_per_node: str, environ: Mapping[str, str]) -> int:
    """The number of ranks that ``--nproc-per-node`` asks for.

    Args:
        nproc_per_node: A number, ``cpu``, ``gpu``, or ``auto`` (GPUs if there are any).
        environ: Its CUDA_VISIBLE_DEVICES limits the GPUs that count.

    Raises:
        LaunchError: It is none of these, or there is no GPU.
    """
    cpus = len(os.sched_getaffinity(0))
    if nproc_per_node == "cpu":
        return cpus
    if nproc_per_node in {"gpu", "auto"}:
        gpus = _count_gpus(environ)
        if gpus or nproc_per_node == "auto":
            return gpus or cpus
        msg = "--nproc-per-node=gpu: no NVIDIA GPU is visible; use cpu, auto or a number"
        raise LaunchError(msg)
    if not re.fullmatch(r"[1-9]\d{0,3}", nproc_per_node):
        msg = f"--nproc-per-node={nproc_per_node} is none of cpu, gpu, auto, 1 to 9999"
        raise LaunchError(msg)
    return int(nproc_per_node)


def _count_gpus(environ: Mapping[str, str]) -> int:
    """Count without torch or a CUDA context, which the agent must not hold."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        chosen = [device.strip() for device in visible.split(",") if device.strip()]
        # CUDA ignores everything from the first invalid entry on, which people write as -1.
        return chosen.index("-1") if "-1" in chosen else len(chosen)
    return sum(1 for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))


def hidden_streams(redirects: str, only: str, ranks: int) -> frozenset[tuple[int, str]]:
    """The streams that stay off the terminal.

    Args:
        redirects: As torchrun's ``--redirects``: 0, 1 (stdout), 2 (stderr), 3 (both), or such
            a number per local rank (``0:3,1:1``).
        only: As torchrun's ``--local-ranks-filter``: the local ranks shown; empty for all.
        ranks: Number of ranks on this node.

    Raises:
        LaunchError: One of them cannot be read.
    """
    hidden: set[tuple[int, str]] = set()
    for item in redirects.split(","):
        rank, colon, value = item.rpartition(":")
        if value not in _STREAMS or (colon and not rank.isdigit()):
            msg = f"--redirects={redirects}: use 0, 1, 2 or 3, or RANK:NUMBER,RANK:NUMBER"
            raise LaunchError(msg)
        for each in [int(rank)] if colon else range(ranks):
            hidden.update((each, stream) for stream in _STREAMS[value])
    if only:
        shown = only.split(",")
        if not all(rank.strip().isdigit() for rank in shown):
            msg = f"--local-ranks-filter={only}: use local ranks, such as 0,1"
            raise LaunchError(msg)
        quiet = set(range(ranks)) - {int(rank) for rank in shown}
        hidden.update((rank, stream) for rank in quiet for stream in _STREAMS["3"])
    return frozenset(hidden)


def rank_command(
    script: str, args: Sequence[str], *, module: bool, no_python: bool, environ: Mapping[str, str]
) -> tuple[str, ...]:
    """Program and arguments of a rank.

    Raises:
        LaunchError: The script does not exist, or the flags contradict each other.
    """
    if module and no_python:
        msg = "--module and --no-python exclude each other"
        raise LaunchError(msg)
    if no_python:
        return (script, *args)
    python = (environ.get("PYTHON_EXEC", sys.executable), "-u")
    if module:
        return (*python, "-m", script, *args)
    if not Path(script).exists():
        msg = f"the script {script} does not exist (looked in {Path.cwd()})"
        raise LaunchError(msg)
    return (*python, script, *args)


def choose_run_id(
    configured: str, *, environ: Mapping[str, str], rdzv_id: str, name: str, script: str
) -> str:
    """The run's identity: what was set, else the scheduler's job, else a new one.

    Args:
        configured: The setting ``run.id``.
        environ: Its MNEMO_RUN_ID and SLURM_JOB_ID count, in this order.
        rdzv_id: The flag ``--rdzv-id``; ``none`` is torchrun's default.
        name: The setting ``run.name``, beginning of a new identity; else `script` is.
        script: Script or module.
    """
    stable = configured or environ.get("MNEMO_RUN_ID") or environ.get("SLURM_JOB_ID")
    if stable:
        return stable
    if rdzv_id not in {"", "none"}:
        return rdzv_id
    stem = name or Path(script).name.removesuffix(".py")
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:64] or "run"
    return f"{readable}-{secrets.token_hex(3)}"
