"""Fault tolerance for PyTorch training.

Importing this package costs nothing: torch and the rest are loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mnemo import errors

if TYPE_CHECKING:
    from mnemo.session import Session

__version__ = "0.1.0"
__all__ = ["Session", "__version__", "errors"]


def __getattr__(name: str) -> object:
    if name == "Session":
        from mnemo.session import Session

        return Session
    raise AttributeError(f"module 'mnemo' has no attribute {name!r}")
