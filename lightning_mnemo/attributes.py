"""Notices attributes of a module that change while it trains but are in no checkpoint."""

from __future__ import annotations

import pickle
import warnings

import lightning.pytorch as pl
import xxhash
from lightning.pytorch.utilities.model_helpers import is_overridden

_LOOKS = 4
_LARGEST = 100_000
_PLAIN = (int, float, str, bool, list, dict, set, tuple, type(None))


class AttributeWatch:
    """Compares a module's plain attributes over its first snapshots and names changing ones once."""

    def __init__(self) -> None:
        self._seen: list[dict[str, int]] = []

    def look(self, module: pl.LightningModule) -> None:
        """Compare with the look before; cheap, and nothing after a few looks."""
        if len(self._seen) >= _LOOKS or is_overridden("on_save_checkpoint", module):
            return
        self._seen.append(_digests(module))
        if len(self._seen) < 2:
            return
        then, now = self._seen[-2:]
        changed = sorted(name for name in now.keys() & then.keys() if now[name] != then[name])
        if changed:
            self._seen.extend([{}] * _LOOKS)
            warnings.warn(
                f"mnemo: {', '.join(changed)} of {type(module).__name__} change during training but are in no state_dict: "
                "after a resume they start anew. Make them buffers, or save them in on_save_checkpoint",
                stacklevel=2,
            )


def _digests(module: pl.LightningModule) -> dict[str, int]:
    own = vars(module)
    found = {}
    for name, value in own.items():
        if name.startswith("_") or name in (
            "training",
            "prepare_data_per_node",
            "allow_zero_length_dataloader_with_multiple_devices",
        ):
            continue
        if isinstance(value, _PLAIN):
            try:
                raw = pickle.dumps(value)
            except Exception:  # noqa: BLE001 - whatever cannot be compared is not watched
                continue
            if len(raw) <= _LARGEST:
                found[name] = xxhash.xxh3_64_intdigest(raw)
    return found
