"""Whether lost ranks are replaced in the running job, and whether this process replaces one."""

from __future__ import annotations

import os
from functools import cached_property


class Mode:
    """How the groups of this process behave; to be set before they are made.

    What `mnemo run` has set is looked up when it is needed first: a warm standby has imported this
    before it is told.

    Attributes:
        epoch: Membership epoch of this process.
        patience_s: How long operations wait after a break that nobody told of.
    """

    epoch: int = 0
    patience_s: float = 60.0

    @cached_property
    def replaceable(self) -> bool:
        """Operations of a group that lost a member wait, and results are kept.

        Else they end as broken.
        """
        return "MNEMO_CONTROL_FD" in os.environ

    @cached_property
    def alone(self) -> bool:
        """This process takes a lost rank's place and has not joined the others yet."""
        return "MNEMO_JOIN" in os.environ


mode = Mode()
"""That of this process."""
