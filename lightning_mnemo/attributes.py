"""Notices attributes of a module that change while it trains but are in no checkpoint."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterator
from typing import Any, Final

import lightning.pytorch as pl
import torch
import xxhash
from lightning.pytorch.utilities.model_helpers import is_overridden
from torchmetrics import Metric

_FIRST: Final = 4
_THEN_EVERY: Final = 64
_LARGEST: Final = 100_000
"""Bytes of an attribute that is looked at."""
_PLAIN = (int, float, str, bool, list, dict, set, tuple, torch.Tensor, type(None))


class AttributeWatch:
    """Compares plain attributes at some of the snapshots, and names each changing one once."""

    def __init__(self) -> None:
        self._snapshots = 0
        self._seen: dict[str, int] = {}
        self._named: set[str] = set()
        self._lightning = frozenset(vars(pl.LightningModule()))

    def look(self, module: pl.LightningModule) -> None:
        """At every snapshot; cheap."""
        self._snapshots += 1
        if self._snapshots > _FIRST and self._snapshots % _THEN_EVERY:
            return
        if is_overridden("on_save_checkpoint", module):
            return  # the user takes care of it
        now = dict(self._digests(module))
        changed = {name for name in now.keys() & self._seen.keys() if now[name] != self._seen[name]}
        self._seen = now
        fresh = sorted(changed - self._named)
        if fresh:
            self._named.update(fresh)
            warnings.warn(
                f"mnemo: {', '.join(fresh)} of {type(module).__name__} change during training but "
                "are in no state_dict: after a resume they start anew. Make them buffers, or save "
                "them in on_save_checkpoint",
                stacklevel=2,
            )

    def _digests(self, module: pl.LightningModule) -> Iterator[tuple[str, int]]:
        for path, child in module.named_modules():
            own = child is module or not type(child).__module__.startswith("torch.")
            if not own or isinstance(child, Metric):
                continue
            for name, value in vars(child).items():
                if name in self._lightning or name.startswith("_hparams"):
                    continue
                digest = _digest(value)
                if digest is not None:
                    yield f"{path}.{name}" if path else name, digest


def _digest(value: Any) -> int | None:
    """Of a plain value of moderate size; None for any other."""
    if not isinstance(value, _PLAIN):
        return None
    limited = _Limited()
    try:
        pickle.dump(value, limited)
    except Exception:  # noqa: BLE001 - what cannot be compared, for whatever reason, is not watched
        return None
    return xxhash.xxh3_64_intdigest(limited.getvalue())


class _Limited(io.BytesIO):
    """Refuses what is too large as soon as it is."""

    def write(self, data: Any, /) -> int:
        if self.tell() + len(data) > _LARGEST:
            raise ValueError("too large")
        return super().write(data)
