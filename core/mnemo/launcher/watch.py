"""What the agent learns from the run's snapshot process."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import psutil

from mnemo.errors import MnemoError, RunInUseError
from mnemo.launcher.hooks import Hooks
from mnemo.launcher.restarts import Position
from mnemo.smp import lifecycle
from mnemo.smp import messages as m

if TYPE_CHECKING:
    from collections.abc import Callable

    from mnemo.smp.client import SmpClient
    from mnemo.smp.paths import RunPaths


_PATIENCE_S: Final = 5.0
"""How long a snapshot process may take to answer what the agent can do without."""
_LEAST_S: Final = 0.1


def smp_hooks(paths: RunPaths, *, alone: bool = True) -> Hooks:
    """The agent's hooks, answered by the SMP of the run at ``paths``.

    Args:
        paths: Where it is found.
        alone: No other agent belongs to this launch, whose ranks may be here as well.
    """
    attending: list[SmpClient] = []
    started = 0.0

    def others() -> list[int]:
        return _training(paths) if alone else []

    def detach() -> None:
        while attending:
            attending.pop().close()

    def ensure() -> None:
        nonlocal started
        if not started:
            _refuse_while(others, paths.run_id)
        started = time.time()
        _say_if_silent(paths)
        client = lifecycle.ensure(paths)
        client.tell(m.Attend())
        detach()
        attending.append(client)  # held open: the snapshot process waits for ranks meanwhile

    def unfinished() -> list[dict[str, Any]]:
        return [fit for fit in status_of(paths) if not fit["finished"]]

    def position() -> Position | None:
        # A life that ended before it trained says nothing about the batch that it never came to,
        # and one that ended behind its training nothing about the last.
        progress = [p for fit in unfinished() for p in fit["progress"]]
        reached = [p for p in progress if p["time"] >= started]
        if not reached:
            return None
        last = max(reached, key=lambda p: p["tick"])
        return Position(last["epoch"], last["batch"], last["step"])

    def ended(well: bool) -> str | None:
        if others():
            detach()
            return None  # all that is there is the other job's
        fits = status_of(paths, over=well)
        kept = [fit["committed"]["step"] for fit in fits if fit["committed"]]
        detach()
        if not kept:
            _shut_down(paths)
            return None
        return (
            f"the snapshot of step {max(kept)} stays in memory: start again with "
            f"MNEMO_RUN_ID={paths.run_id} to go on, or give it up with mnemo clean {paths.run_id}"
        )

    return Hooks(
        ensure,
        position,
        training=lambda: bool(unfinished()),
        taken=lambda: bool(others()),
        ended=ended,
        silent=lambda: _silent(paths),
    )


def _training(paths: RunPaths) -> list[int]:
    """Living processes that are connected as ranks: another job's, while none of ours lives."""
    pids = (int(pid) for fit in status_of(paths) for pid in fit["connected"].values())
    return [pid for pid in pids if psutil.pid_exists(pid)]


def _refuse_while(others: Callable[[], list[int]], run_id: str) -> None:
    """Refuse to join another job, unless it is one that is just being killed.

    Raises:
        RunInUseError: It lives.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while pids := others():
        if time.monotonic() > deadline:
            raise RunInUseError(
                f"run {run_id} is in use: process {', '.join(map(str, pids))} is training it. Give "
                "this job another run.id, or end the other one"
            )
        time.sleep(0.1)


def _silent(paths: RunPaths) -> int:
    """See `Hooks.silent`. One that is not there answers at once, so to speak."""
    record, begun = paths.read_record(), time.monotonic()
    client = lifecycle.find(paths, _PATIENCE_S)
    if client is not None:
        client.close()
        return 0
    return record.pid if record and time.monotonic() - begun >= _PATIENCE_S else 0


def _say_if_silent(paths: RunPaths) -> None:
    """Tell why a start may take long: one that is stopped or stuck is waited for, up to a limit."""
    if _silent(paths):
        print(
            f"mnemo: the snapshot process of run {paths.run_id} does not answer; it is waited for, "
            f"{lifecycle.START_TIMEOUT_S:.0f} s at most",
            file=sys.stderr,
            flush=True,
        )


def _shut_down(paths: RunPaths) -> None:
    with contextlib.suppress(MnemoError):
        client = lifecycle.find(paths, _PATIENCE_S)
        if client is not None:
            with client:
                client.tell(m.Shutdown())
                client.wait_for_end()


def status_of(paths: RunPaths, *, over: bool = False) -> list[dict[str, Any]]:
    """Status of the trainings that have begun; none if that cannot be told in a few seconds.

    ``over``: the program ended well, so those that finished are given back first.
    """
    deadline = time.monotonic() + _PATIENCE_S
    try:
        client = lifecycle.find(paths, _PATIENCE_S)
        if client is None:
            return []
        with client:
            if over:
                client.tell(m.Over())
                deadline = time.monotonic() + _PATIENCE_S
            left = max(deadline - time.monotonic(), _LEAST_S)
            found: list[dict[str, Any]] = client.status(timeout_s=left)["fits"]
            return found
    except MnemoError:
        return []
