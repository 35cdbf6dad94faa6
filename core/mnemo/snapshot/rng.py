"""State of all random number generators of a process: python, numpy, torch, every CUDA device."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def capture_rng() -> dict[str, Any]:
    """The generators' states, as tensors and plain values."""
    drawn: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = drawn
    version, internal, gauss = random.getstate()
    return {
        "python": (version, torch.from_numpy(np.array(internal, dtype=np.int64)), gauss),
        "numpy": (
            str(name),
            torch.from_numpy(keys.astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all()
        if torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        else [],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Put every generator back to ``state``."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
