"""Erasure coding with numpy alone: works everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from mnemo.erasure.codes import coefficients
from mnemo.erasure.matrix import POLYNOMIAL

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mnemo.erasure.codes import Code
    from mnemo.erasure.engines.base import Fragment
    from mnemo.erasure.matrix import Matrix

_CHUNK: Final = 128 << 10
"""Bytes of each fragment worked on at a time: few enough for the cache, enough for numpy."""


class NumpyEngine:
    """Adds and doubles whole chunks, instead of looking up one product per byte."""

    name = "numpy"

    def compute(
        self, code: Code, sources: Mapping[int, Fragment], outputs: Mapping[int, Fragment]
    ) -> None:
        """See `mnemo.erasure.engines.base.Engine.compute`."""
        matrix = coefficients(code, tuple(sources), tuple(outputs))
        length = next(iter(sources.values())).size
        carry = np.empty(min(_CHUNK, length), np.uint8)
        for start in range(0, length, _CHUNK):
            chunk = slice(start, start + _CHUNK)
            pieces = [source[chunk] for source in sources.values()]
            for row, output in zip(matrix, outputs.values(), strict=True):
                _combine(row, pieces, output[chunk], carry)


def _combine(row: Matrix, pieces: Sequence[Fragment], out: Fragment, carry: Fragment) -> None:
    """Sum the pieces times their coefficients by Horner's rule over the coefficients' bits."""
    factors = row.tolist()
    out.fill(0)
    highest = max(factors).bit_length() - 1
    for bit in range(highest, -1, -1):
        if bit < highest:
            _double(out, carry[: out.size])
        for factor, piece in zip(factors, pieces, strict=True):
            if factor >> bit & 1:
                np.bitwise_xor(out, piece, out=out)


def _double(elements: Fragment, carry: Fragment) -> None:
    """Multiply each element by α, in place."""
    np.right_shift(elements.view(np.int8), 7, out=carry.view(np.int8))  # all ones or none
    np.bitwise_and(carry, POLYNOMIAL & 0xFF, out=carry)
    np.add(elements, elements, out=elements)
    np.bitwise_xor(elements, carry, out=elements)
