"""The framework-free side of the trainer.

`Session` is for loops of one's own. The adapters stand on `Keeper`, which restores, takes
snapshots at step boundaries, and ends well, and on `loader`, which makes data loaders resumable.
"""

from __future__ import annotations

from mnemo.session.finder import Restored
from mnemo.session.keeper import Keeper
from mnemo.session.place import Place
from mnemo.session.session import Session

__all__ = ["Keeper", "Place", "Restored", "Session"]
