"""What is computed: the codes, by ids that are stored and sent, and their coefficients."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Final

import numpy as np

from mnemo.erasure.matrix import Matrix, inverse, product, reed_solomon
from mnemo.errors import CodeError

MOST_FRAGMENTS: Final = 256
"""Points of the field, so fragments that can differ."""


class CodeKind(IntEnum):
    """How parities come from data. The number is stored and sent, and never used again."""

    REED_SOLOMON = 1
    """Over GF(2^8) with zfec's polynomial and matrix: byte for byte what zfec computes."""
    XOR = 2
    """One parity, the XOR of all data."""


@dataclass(frozen=True)
class Code:
    """k data fragments, numbers 0 to k - 1, and m parities, numbers k to k + m - 1.

    Attributes:
        kind: How parities come from data; its number will do.
        k: Data fragments, at least 1.
        m: Parities, at least 1: so many fragments may be lost. XOR has one.

    Raises:
        CodeError: The kind is unknown, or k and m are out of range.
    """

    kind: CodeKind
    k: int
    m: int

    def __post_init__(self) -> None:
        try:
            kind = CodeKind(self.kind)
        except ValueError:
            known = ", ".join(f"{kind.value} ({kind.name})" for kind in CodeKind)
            msg = (
                f"erasure code id {self.kind!r} is not known here, only {known}; "
                f"if a newer mnemo wrote it, read it with that one"
            )
            raise CodeError(msg) from None
        object.__setattr__(self, "kind", kind)
        for name, value in (("k", self.k), ("m", self.m)):
            if not isinstance(value, int) or value < 1:
                msg = f"{name} = {value!r} fragments: give a whole number of at least 1"
                raise CodeError(msg)
        if self.n > MOST_FRAGMENTS:
            msg = f"k + m = {self.k} + {self.m} = {self.n}: at most {MOST_FRAGMENTS} are possible"
            raise CodeError(msg)
        if kind is CodeKind.XOR and self.m != 1:
            msg = f"XOR makes one parity, not m = {self.m}; use REED_SOLOMON"
            raise CodeError(msg)

    def __str__(self) -> str:
        return f"{self.kind.name} ({self.k}+{self.m})"

    @classmethod
    def of(cls, k: int, m: int) -> Code:
        """Return the fastest code with k data fragments and m parities: XOR for one parity.

        Raises:
            CodeError: k and m are out of range.
        """
        return cls(CodeKind.XOR if m == 1 else CodeKind.REED_SOLOMON, k, m)

    @property
    def n(self) -> int:
        """Number of fragments, k + m."""
        return self.k + self.m


@lru_cache(maxsize=1024)
def coefficients(code: Code, have: tuple[int, ...], want: tuple[int, ...]) -> Matrix:
    """Return the matrix, shape ``(len(want), k)``, that makes wanted fragments of present ones.

    Args:
        code: The code of the fragments.
        have: Numbers of exactly k present fragments, all different.
        want: Numbers of the wanted ones.
    """
    generator = _generator(code)
    chosen = generator[list(want)]
    if have != tuple(range(code.k)):
        chosen = product(chosen, inverse(generator[list(have)]))
    chosen.flags.writeable = False  # it is everybody's
    return chosen


@lru_cache(maxsize=64)
def _generator(code: Code) -> Matrix:
    """Return the matrix, shape ``(n, k)``, that makes all fragments from the data."""
    if code.kind is CodeKind.XOR:
        parities = np.ones((1, code.k), np.uint8)
    else:
        parities = reed_solomon(code.k, code.m)
    return np.concatenate([np.eye(code.k, dtype=np.uint8), parities])
