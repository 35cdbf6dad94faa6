"""No engine is used that has not just computed what is known to be right."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

import numpy as np

from mnemo.erasure.codes import Code, CodeKind, coefficients
from mnemo.erasure.matrix import product
from mnemo.errors import EngineError

if TYPE_CHECKING:
    from mnemo.erasure.engines.base import Engine
    from mnemo.erasure.matrix import Matrix

_GUARD: Final = 0xA5
_MARGIN: Final = 64
"""Bytes around each fragment that must stay; more than any engine's alignment."""

KNOWN: Final = (
    (Code(CodeKind.REED_SOLOMON, 4, 2), b"mnemosyne remembers.", "3630883e9cae123fe8aa"),
    (Code(CodeKind.XOR, 4, 1), b"mnemosyne remembers.", "0e17141e0c"),
)
"""A code, its data one after the other, and its parities as zfec 1.6 computes them."""

_RANDOM: Final = (
    (Code(CodeKind.REED_SOLOMON, 3, 1), 1),
    (Code(CodeKind.REED_SOLOMON, 4, 2), 4097),
    (Code(CodeKind.REED_SOLOMON, 10, 7), 333),
    (Code(CodeKind.XOR, 5, 1), 70_001),
)


def check(engine: Engine) -> None:
    """Encode and decode known and random fragments, of odd lengths, at even and odd addresses.

    Raises:
        EngineError: Anything but the right bytes came out, or others were touched.
    """
    for code, text, parities in KNOWN:
        fragments = np.frombuffer(text + bytes.fromhex(parities), np.uint8).reshape(code.n, -1)
        _compare(engine, code, fragments)
    random = np.random.default_rng(0)
    for code, length in _RANDOM:
        data = random.integers(0, 256, (code.k, length), np.uint8)
        rows = coefficients(code, tuple(range(code.k)), tuple(range(code.k, code.n)))
        _compare(engine, code, np.concatenate([data, product(rows, data)]))


def _compare(engine: Engine, code: Code, fragments: Matrix) -> None:
    """Let the parities be computed from the data, then the first fragments from the last."""
    numbers = list(range(code.n))
    length = fragments.shape[1]
    for have, shift in itertools.product((numbers[: code.k], numbers[code.m :]), (0, 1)):
        want = [number for number in numbers if number not in have]
        memory = _aligned(code.n, length + 2 * _MARGIN)
        memory.fill(_GUARD)
        places = memory[:, _MARGIN + shift :][:, :length]
        places[have] = fragments[have]
        right = memory.copy()
        right[:, _MARGIN + shift :][:, :length] = fragments
        engine.compute(
            code, {number: places[number] for number in have},
            {number: places[number] for number in want},
        )  # fmt: skip
        if not np.array_equal(memory, right):
            wrong = [number for number in numbers if (memory[number] != right[number]).any()]
            msg = (
                f"the erasure coding engine {engine.name} fails its self-test: {code} of {length} "
                f"bytes, fragments {wrong} are wrong when computed from {have}; it is not used"
            )
            raise EngineError(msg)


def _aligned(rows: int, length: int) -> Matrix:
    """Return memory whose rows are at least that long and start at multiples of the margin."""
    length += -length % _MARGIN
    memory = np.empty(rows * length + _MARGIN, np.uint8)
    start = -memory.ctypes.data % _MARGIN
    return memory[start : start + rows * length].reshape(rows, length)
