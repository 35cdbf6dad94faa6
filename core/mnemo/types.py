"""Small values that several packages share."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

EXIT_OK: Final = 0
EXIT_STATE_SAVED: Final = 75
"""State is safe and the job wants to be queued again (``EX_TEMPFAIL``)."""
EXIT_STATE_LOST: Final = 76
"""The job cannot go on and no state newer than the last checkpoint could be kept."""


class GenerationState(IntEnum):
    """Life of one rank's copy of a generation, in the order that it passes through."""

    WRITING = 1
    SEALED = 2
    COMMITTED = 3
    PROTECTED = 4
    RETIRED = 5
