"""What every rank comes upon and no script catches, as a wrong setting: said once, in one line.

Instead of as many tracebacks, `mnemo run` gets the message from one rank; without it, one rank
says it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mnemo.errors import ConfigError, MnemoError, RunInUseError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    ExceptHook = Callable[[type[BaseException], BaseException, TracebackType | None], object]

AGENT_VARIABLE: Final = "MNEMO_AGENT"
"""Names the `mnemo run` that a process belongs to: its process id, a dash, when it started."""
REFUSAL_VARIABLE: Final = "MNEMO_REFUSAL_FILE"
"""Where a rank leaves the message."""
EXIT_USAGE: Final = 2
_EXIT_ERROR: Final = 1
"""As after a traceback."""


def leave_to_agent() -> None:
    """Have a `ConfigError` that nobody catches end this process with 2, its message left to say.

    So does a `RunInUseError`: which run it is is a setting, too.

    Also where it comes as the cause of another error, as from a framework that read it from YAML.
    Does nothing unless this process is a rank that ``mnemo run`` itself has started: anybody else,
    also a program that a rank starts, has a traceback as ever.
    """
    file = os.environ.get(REFUSAL_VARIABLE)
    if file and _is_agents() and not isinstance(sys.excepthook, _LeftToAgent):
        sys.excepthook = _LeftToAgent(Path(file), sys.excepthook)


def say_once(error: MnemoError, *, here: bool) -> None:
    """Have ``error``, which every rank raises, end this process in one line if nobody catches it.

    Under ``mnemo run``, which tells its ranks' words apart, it has a traceback on each.

    Args:
        error: About to be raised.
        here: This is the rank that says it; others end without a word.
    """
    if not _is_agents():
        sys.excepthook = _SaidOnce(error, here, sys.excepthook)


def _is_agents() -> bool:
    """Whether this process is a rank that ``mnemo run`` itself has started."""
    return os.environ.get(AGENT_VARIABLE, "").partition("-")[0] == str(os.getppid())


class _LeftToAgent:
    """See `leave_to_agent`; other exceptions go to the hook that was there before."""

    def __init__(self, file: Path, otherwise: ExceptHook) -> None:
        self._file = file
        self._otherwise = otherwise

    def __call__(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        wrong = _wrong_setting(error)
        if wrong is not None:
            try:
                self._file.write_text(str(wrong), encoding="utf-8")
            except OSError:
                pass  # nobody would say it
            else:
                raise SystemExit(EXIT_USAGE)
        self._otherwise(kind, error, trace)


class _SaidOnce:
    """See `say_once`; other exceptions go to the hook that was there before."""

    def __init__(self, error: MnemoError, here: bool, otherwise: ExceptHook) -> None:
        self._error = error
        self._here = here
        self._otherwise = otherwise

    def __call__(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if error is not self._error:
            self._otherwise(kind, error, trace)
            return
        if self._here:
            print(f"mnemo: {kind.__name__}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(_EXIT_ERROR)


def _wrong_setting(error: BaseException | None) -> ConfigError | RunInUseError | None:
    """The one that ``error`` is, or was raised from."""
    while error is not None and not isinstance(error, (ConfigError, RunInUseError)):
        error = error.__cause__
    return error
