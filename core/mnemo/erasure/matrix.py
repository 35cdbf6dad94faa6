"""Matrices over GF(2^8), the field with 256 elements.

Elements are polynomials over GF(2), reduced by `POLYNOMIAL`; addition is XOR, and α = x = 2
generates all that are not zero. Arrays are ``uint8``, and never large: fragments are the engines'
business.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.uint8]

POLYNOMIAL: Final = 0x11D
"""x⁸ + x⁴ + x³ + x² + 1, as in zfec, ISA-L and RAID 6."""


def _powers() -> Matrix:
    powers = np.empty(255, np.uint8)
    element = 1
    for exponent in range(255):
        powers[exponent] = element
        element <<= 1
        element ^= POLYNOMIAL if element > 255 else 0
    return powers


_POWER: Final = _powers()
_LOG: Final = np.zeros(256, np.int64)  # of 0 it is 0 too: what has no logarithm adds nothing
_LOG[_POWER] = np.arange(255)

_TIMES: Final = _POWER[(_LOG[:, None] + _LOG) % 255]
_TIMES[0] = _TIMES[:, 0] = 0


def reed_solomon(k: int, m: int) -> Matrix:
    """Return zfec's parity rows, shape ``(m, k)``; k + m is at most 256.

    The fragments are the values at the points 0, 1, α, α², ... of the polynomial of degree below k
    that has the data as its values at the first k of them. So each row is Lagrange's:
    ``row i, column j = ∏ (x_i - x_l) / (x_j - x_l)`` over all ``l < k`` but j. Any k values
    determine the polynomial, so any k fragments bring back the rest.
    """
    points = np.concatenate([np.zeros(1, np.uint8), _POWER])[: k + m]
    at_data, at_parity = (_LOG[which[:, None] ^ points[:k]] for which in (points[:k], points[k:]))
    numerators = at_parity.sum(axis=1, keepdims=True) - at_parity
    rows: Matrix = _POWER[(numerators - at_data.sum(axis=1)) % 255]
    return rows


def product(left: Matrix, right: Matrix) -> Matrix:
    """Return ``left @ right`` over the field, shapes ``(r, k)`` and ``(k, c)``."""
    result = np.zeros((left.shape[0], right.shape[1]), np.uint8)
    for column, row in zip(left.T, right, strict=True):
        result ^= _TIMES[column[:, None], row]
    return result


def inverse(matrix: Matrix) -> Matrix:
    """Return the inverse of a square matrix, by Gauss and Jordan.

    Raises:
        ValueError: There is none.
    """
    size = len(matrix)
    work = np.concatenate([matrix, np.eye(size, dtype=np.uint8)], axis=1)
    for column in range(size):
        candidates = np.flatnonzero(work[column:, column])
        if not candidates.size:
            msg = f"the matrix of {size} rows is singular in column {column}"
            raise ValueError(msg)
        pivot = column + candidates[0]
        work[[column, pivot]] = work[[pivot, column]]
        work[column] = _TIMES[_POWER[-_LOG[work[column, column]] % 255], work[column]]
        factors = work[:, column].copy()
        factors[column] = 0
        work ^= _TIMES[factors[:, None], work[column]]
    return work[:, size:]
