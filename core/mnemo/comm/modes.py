"""Whether lost ranks are replaced in the running job, and whether this process replaces one."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass
class Mode:
    """How the groups of this process behave; to be set before they are made.

    Attributes:
        replaceable: Operations of a group that lost a member wait, and results are kept. Else they
            end as broken.
        alone: This process takes a lost rank's place and has not joined the others yet.
        epoch: Membership epoch of this process.
        patience_s: How long operations wait after a break that nobody told of.
    """

    replaceable: bool
    alone: bool
    epoch: int = 0
    patience_s: float = 60.0


mode = Mode("MNEMO_CONTROL_FD" in os.environ, "MNEMO_JOIN" in os.environ)
"""That of this process, as `mnemo run` has set it."""
