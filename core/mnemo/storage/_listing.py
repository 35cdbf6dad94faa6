"""What runs a store has something of."""

from __future__ import annotations

import fsspec

from mnemo.storage._errors import ErrorTranslator


def stored_ids(url: str) -> list[str]:
    """Names of all directories at ``url``, sorted: runs, complete checkpoints in them or not.

    Raises:
        StorageError: The store cannot be read.
    """
    errors = ErrorTranslator(url)
    with errors.during("list", url):
        fs, path = fsspec.core.url_to_fs(url)
        fs.invalidate_cache()
        try:
            entries = fs.ls(path, detail=True)
        except FileNotFoundError:
            return []
    return sorted(
        entry["name"].rstrip("/").rpartition("/")[2]
        for entry in entries
        if entry["type"] == "directory"
    )
