"""SIGTERM to a loop: it ends behind the step that it is in, with its state saved."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NoReturn

import msgspec

from mnemo.session.keeper import Keeper
from mnemo.session.report import say, seconds
from mnemo.session.saved import Saved
from mnemo.session.sources import NOTHING
from mnemo.types import EXIT_STATE_LOST, EXIT_STATE_SAVED

_LAST_S: Final = 6.0
"""What is left of the grace period for asking what is saved, and the end of the process."""


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

    With 76 if neither memory nor storage holds any snapshot of the run. Nobody waits for a snapshot
    process beyond ``recover.grace``; what it says counts where all nodes' say so.
    """
    grace = keeper.config.recover.grace
    deadline, last_s = time.monotonic() + grace, min(_LAST_S, grace / 3)
    keeper.settle(grace - last_s)
    keeper.place.agree(step)  # every rank has sealed it before it is persisted
    mine = keeper.saved(max(last_s / 2, deadline - last_s / 2 - time.monotonic()))
    decode = msgspec.msgpack.Decoder(Saved).decode
    told = [decode(words) for words in keeper.place.gather(msgspec.msgpack.encode(mine))]
    lost = all(max(node.kept, node.stored) == NOTHING for node in told)
    code = EXIT_STATE_LOST if lost else EXIT_STATE_SAVED
    if keeper.place.rank == 0:
        asks = "" if lost else " asks to be started again"
        say(f"asked to stop: {_what_is_saved(keeper, step, told)}; exit code {code}{asks}")
    raise SystemExit(code)


def _what_is_saved(keeper: Keeper, step: int, told: list[Saved]) -> str:
    """In words, from what each rank was ``told``."""
    if unknown := [(rank, node.failure) for rank, node in enumerate(told) if node.failure]:
        rank, failure = unknown[0]
        return f"whether step {step} is saved is not known: rank {rank}: {failure}"
    kept = min(node.kept for node in told)
    stored = min(told[rank].stored for rank in keeper.place.leaders)
    saved = max(kept, stored)
    if saved == NOTHING:
        return "no snapshot could be saved"
    where = (
        f"persisted up to step {stored}"
        if stored != NOTHING
        else f"kept in memory for {seconds(keeper.config.snapshot.keep_alive)}"
    )
    what = f"step {step} is saved"
    if saved < step:
        what = f"the snapshot of step {step} could not be completed, step {saved} is saved"
    return f"{what} ({where})"
