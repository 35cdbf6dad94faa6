"""What the launch asks of membership, and in which times it thinks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mnemo.errors import ConfigError

DRIFT: Final = 0.01
"""By how much of itself a node's clock may run too fast or too slow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """One for all nodes of a run.

    Attributes:
        nodes: Nodes of an epoch; whoever joins beyond that waits as a spare.
        spares: How many are expected beyond that when a run begins.
        arbiter: The Store survives every node (etcd): it is never moved, and no quorum is needed.
        give_up_s: How long a node waits for the next epoch, in seconds, before it gives up.
        settle_s: So long, in seconds, nobody has to have come before a run begins without some of
            those that are expected.
        beat_s: Seconds between two turns.
        fence_s: A node stops its workers when it has had no contact for so long, in seconds.
        stop_s: Seconds after which workers that were told to stop are surely dead.
        node_loss_s: A node without a sign of life for so long, in seconds, is lost.
        move_s: After so long without contact, in seconds, nodes take part in another Store.
        open_s: By how much later, in seconds, each next node hosts it if those before it do not.
    """

    nodes: int
    spares: int = 0
    arbiter: bool = False
    give_up_s: float = 300.0
    settle_s: float = 3.0
    beat_s: float = 0.25
    fence_s: float = 3.5
    stop_s: float = 0.5
    node_loss_s: float = 4.25
    move_s: float = 4.25
    open_s: float = 2.0

    @property
    def slow_s(self) -> float:
        """A Store that takes longer for an answer, in seconds, is as good as none.

        The lease that a turn gives counts from the beginning of an earlier one, and has to last
        until the next has read. With a Store on a node these are up to four turns of three answers
        each, and two more; with an arbiter one turn of four.
        """
        return self.fence_s / (6 if self.arbiter else 14)

    def __post_init__(self) -> None:
        if self.nodes < 1:
            msg = f"{self.nodes} nodes: at least 1 is needed"
            raise ConfigError(msg)
        least = (self.fence_s + self.stop_s) * (1 + DRIFT) / (1 - DRIFT)
        for name in ("node_loss_s", "move_s"):
            if getattr(self, name) < least:
                msg = (
                    f"{name} = {getattr(self, name)} is too short: until {least:.2f} s a node that "
                    "has lost contact may still let its workers run (fence_s + stop_s)"
                )
                raise ConfigError(msg)
        if self.fence_s < 6 * self.beat_s:
            msg = (
                f"beat_s = {self.beat_s} is too long for fence_s = {self.fence_s}: "
                f"{self.fence_s / 6:.2f} is possible, since contact is confirmed by several turns"
            )
            raise ConfigError(msg)
