"""Generations protected against the loss of whole nodes: spread over a group, rebuilt after a loss.

`Protector` is one node's part, for one fit. `docs/protection.md` describes flow and limits.
"""

from __future__ import annotations

from mnemo.protect.keeping import Holdings, Standing
from mnemo.protect.messages import Piece
from mnemo.protect.neighbours import Neighbours
from mnemo.protect.protector import Protector
from mnemo.protect.shard import Shard

__all__ = ["Holdings", "Neighbours", "Piece", "Protector", "Shard", "Standing"]
