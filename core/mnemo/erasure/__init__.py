"""Erasure codes: k data fragments and m parities, of which any k bring back the rest.

A `Code` says what is computed and stays valid for as long as its fragments are kept; an engine is
the library that computes it, and any engine's fragments decode with any other.
`docs/erasure.md` describes both.
"""

from __future__ import annotations

from mnemo.erasure.codec import Codec, codec
from mnemo.erasure.codes import Code, CodeKind

__all__ = ["Code", "CodeKind", "Codec", "codec"]
