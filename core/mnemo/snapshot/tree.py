"""A nested state is taken apart into its tensors and a skeleton, and put together again.

The skeleton is the same structure with a marker where each tensor was. It is pickled, so it only
holds what a checkpoint would hold; the tensors go their own, faster way.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any, Final

import torch

MARK: Final = "\0mnemo.tensor"


def is_plain(value: object) -> bool:
    """Whether ``value`` is a tensor whose bytes are its whole content."""
    return (
        isinstance(value, torch.Tensor)
        and type(value) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
        and value.layout is torch.strided
        and value.device.type in ("cpu", "cuda")
        and not value.is_conj()
        and not value.is_neg()
        and not value.is_quantized
    )


def take_apart(tree: object) -> tuple[object, list[tuple[str, torch.Tensor]]]:
    """Replace every plain tensor in nested dicts, lists and tuples by a marker.

    A tensor that occurs twice (tied weights) is listed once.

    Returns:
        The skeleton, and the tensors with the path at which each was met first.
    """
    found: list[tuple[str, torch.Tensor]] = []
    known: dict[tuple[object, ...], int] = {}

    def visit(value: Any, path: str) -> Any:
        if is_plain(value):
            key = (value.data_ptr(), value.dtype, value.shape, value.stride(), value.device)
            index = known.get(key) if value.numel() else None
            if index is None:
                index = known[key] = len(found)
                found.append((path, value))
            return {MARK: index}
        if isinstance(value, dict):
            return _like(
                value, {k: visit(v, f"{path}.{k}" if path else str(k)) for k, v in value.items()}
            )
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(
                *(visit(v, f"{path}.{k}") for k, v in zip(value._fields, value, strict=True))
            )
        if type(value) in (list, tuple):
            return type(value)(visit(v, f"{path}.{i}") for i, v in enumerate(value))
        return value

    return visit(tree, ""), found


def put_together(skeleton: object, tensor: Callable[[int], torch.Tensor]) -> Any:
    """The inverse of `take_apart`; ``tensor`` gives the tensor of a number."""
    if isinstance(skeleton, dict):
        if len(skeleton) == 1 and MARK in skeleton:
            return tensor(skeleton[MARK])
        return _like(skeleton, {k: put_together(v, tensor) for k, v in skeleton.items()})
    if isinstance(skeleton, tuple) and hasattr(skeleton, "_fields"):
        return type(skeleton)(*(put_together(v, tensor) for v in skeleton))
    if type(skeleton) in (list, tuple):
        return type(skeleton)(put_together(v, tensor) for v in skeleton)
    return skeleton


def _like(model: dict[Any, Any], content: dict[Any, Any]) -> dict[Any, Any]:
    """``content`` in a dict of the type of ``model``, with its order and attributes."""
    if type(model) is dict:
        return content
    try:
        made = model.copy()
    except Exception:  # noqa: BLE001 - a user's own mapping may refuse in its own way
        return content
    made.clear()
    made.update(content)
    return made


def pack(skeleton: object) -> bytes:
    """Serialise a skeleton so that ``torch.load(weights_only=True)`` opens all but user classes."""
    buffer = io.BytesIO()
    torch.save(skeleton, buffer)
    return buffer.getvalue()


def unpack(raw: bytes, *, trusted: bool) -> Any:
    """Open what `pack` wrote.

    Args:
        raw: The bytes.
        trusted: Whether their MAC was right, so that classes outside torch's safe list may be made.

    Raises:
        pickle.UnpicklingError: A class is needed that only trusted bytes may name.
    """
    try:
        return torch.load(io.BytesIO(raw), weights_only=True)
    except pickle.UnpicklingError:
        if not trusted:
            raise
    return torch.load(io.BytesIO(raw), weights_only=False)
