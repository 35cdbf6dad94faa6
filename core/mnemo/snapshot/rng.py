"""State of all random number generators of a process: python, numpy, torch, every CUDA device.

As bytes, which go with the small state: tensors would be followed one by one at each snapshot.
"""

from __future__ import annotations

import random
from array import array
from typing import Any

import numpy as np
import torch


def capture_rng() -> dict[str, Any]:
    """The generators' states, as bytes and plain values."""
    drawn: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = drawn
    version, internal, gauss = random.getstate()
    return {
        "python": (version, array("Q", internal).tobytes(), gauss),
        "numpy": (str(name), keys.tobytes(), int(position), int(has_gauss), float(cached)),
        "torch": _bytes(torch.get_rng_state()),
        "cuda": [_bytes(state) for state in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        else [],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Put every generator back to ``state``."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(array("Q", internal)), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.frombuffer(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_tensor(state["torch"]))
    if state["cuda"]:
        torch.cuda.set_rng_state_all([_tensor(raw) for raw in state["cuda"]])


def _bytes(state: torch.Tensor) -> bytes:
    return state.numpy().tobytes()


def _tensor(raw: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(raw, dtype=np.uint8).copy())
