"""The persistent tier: checkpoints on any fsspec store, each valid by one marker file.

A checkpoint that a reader may trust has a marker; the marker is written last and deleted first, so
that no instant of a crash leaves something that looks whole and is not. Nothing is ever renamed,
appended to, or assumed of directories, which keeps this correct on object stores.
`docs/formats.md` describes the files.
"""

from __future__ import annotations

from mnemo.storage._listing import stored_ids
from mnemo.storage._marker import Checkpoint, JsonScalar, Part
from mnemo.storage._store import CheckpointStore

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "JsonScalar",
    "Part",
    "stored_ids",
]
