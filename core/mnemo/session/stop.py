"""SIGTERM to a loop: it ends behind the step that it is in, with its state saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from mnemo.session.keeper import Keeper
from mnemo.session.report import say, seconds
from mnemo.types import EXIT_STATE_LOST, EXIT_STATE_SAVED


@contextmanager
def on_sigterm(request_stop: Callable[[], None]) -> Iterator[None]:
    """Within the block SIGTERM calls ``request_stop``.

    A handler that the program has installed itself is left alone, and so are programs whose loop
    does not run in the main thread.
    """
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )

    def handle(number: int, frame: Any) -> None:
        del number, frame
        request_stop()

    if ours:
        signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def leave(keeper: Keeper, step: int) -> NoReturn:
    """All ranks, the snapshot of ``step`` just begun: seal it, persist it, exit with 75.

    With 76 if neither memory nor storage holds any snapshot of the run.
    """
    grace = keeper.config.recover.grace
    keeper.settle(grace)
    keeper.place.agree(step)  # every rank has sealed it before it is persisted
    stored = keeper.flush(grace) if keeper.place.local_rank == 0 else None
    kept = keeper.kept_step()
    if keeper.place.rank == 0:
        say(f"asked to stop: {_what_is_saved(keeper, step, kept, stored)}")
    raise SystemExit(EXIT_STATE_LOST if kept is None and stored is None else EXIT_STATE_SAVED)


def _what_is_saved(keeper: Keeper, step: int, kept: int | None, stored: int | None) -> str:
    saved = max((s for s in (kept, stored) if s is not None), default=None)
    if saved is None:
        return f"no snapshot could be saved; exit code {EXIT_STATE_LOST}"
    where = (
        f"persisted up to step {stored}"
        if stored is not None
        else f"kept in memory for {seconds(keeper.config.snapshot.keep_alive)}"
    )
    what = f"step {step} is saved"
    if saved < step:
        what = f"the snapshot of step {step} could not be completed, step {saved} is saved"
    return f"{what} ({where}); exit code {EXIT_STATE_SAVED} asks to be started again"
