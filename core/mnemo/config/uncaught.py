"""A wrong setting that a script under ``mnemo run`` does not catch: said once, in one line.

Every rank comes upon it. Instead of as many tracebacks, `mnemo run` gets the message from one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mnemo.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    ExceptHook = Callable[[type[BaseException], BaseException, TracebackType | None], object]

AGENT_VARIABLE: Final = "MNEMO_AGENT"
"""Names the `mnemo run` that a process belongs to: its process id, a dash, when it started."""
REFUSAL_VARIABLE: Final = "MNEMO_REFUSAL_FILE"
"""Where a rank leaves the message."""
EXIT_USAGE: Final = 2


def leave_to_agent() -> None:
    """Have a `ConfigError` that nobody catches end this process with 2, its message left to say.

    Also where it comes as the cause of another error, as from a framework that read it from YAML.
    Does nothing unless this process is a rank that ``mnemo run`` itself has started: anybody else,
    also a program that a rank starts, has a traceback as ever.
    """
    file = os.environ.get(REFUSAL_VARIABLE)
    agent = os.environ.get(AGENT_VARIABLE, "").partition("-")[0]
    if file and agent == str(os.getppid()) and not isinstance(sys.excepthook, _LeftToAgent):
        sys.excepthook = _LeftToAgent(Path(file), sys.excepthook)


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


def _wrong_setting(error: BaseException | None) -> ConfigError | None:
    """The `ConfigError` that ``error`` is, or was raised from."""
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__
    return error
