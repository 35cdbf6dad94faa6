"""Codes: what exists, what is refused, and that Reed-Solomon has zfec's coefficients."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import zfec

from mnemo.erasure import Code, CodeKind
from mnemo.erasure.codes import coefficients
from mnemo.erasure.matrix import POLYNOMIAL, inverse, product, reed_solomon
from mnemo.errors import CodeError, ErasureError

RS, XOR = CodeKind.REED_SOLOMON, CodeKind.XOR


def test_ids_are_those_ever_given() -> None:
    assert {kind.name: kind.value for kind in CodeKind} == {"REED_SOLOMON": 1, "XOR": 2}


def test_a_code_is_a_value() -> None:
    code = Code(RS, 6, 2)
    assert (code.k, code.m, code.n) == (6, 2, 8)
    assert str(code) == "REED_SOLOMON (6+2)"
    assert code == Code(1, 6, 2)  # type: ignore[arg-type]
    assert hash(code) == hash(Code(RS, 6, 2))
    assert Code(2, 3, 1).kind is XOR  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        code.k = 7  # type: ignore[misc]


def test_one_parity_is_xor_unless_said_otherwise() -> None:
    assert Code.of(3, 1) == Code(XOR, 3, 1)
    assert Code.of(6, 2) == Code(RS, 6, 2)
    with pytest.raises(CodeError, match="m = 0"):
        Code.of(3, 0)
    with pytest.raises(CodeError, match="at most 256"):
        Code.of(256, 1)


@pytest.mark.parametrize(("k", "m"), [(1, 1), (255, 1), (1, 255), (128, 128)])
def test_the_largest_and_smallest_are_possible(k: int, m: int) -> None:
    assert Code(RS, k, m).n == k + m


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((3, 4, 2), r"id 3 is not known here, only 1 \(REED_SOLOMON\), 2 \(XOR\); if a newer"),
        ((0, 4, 2), "id 0 is not known"),
        ((-1, 4, 2), "id -1 is not known"),
        (("RS", 4, 2), "id 'RS' is not known"),
        ((None, 4, 2), "id None is not known"),
        ((RS, 0, 2), "k = 0 fragments: give a whole number of at least 1"),
        ((RS, -4, 2), "k = -4"),
        ((RS, 4, 0), "m = 0"),
        ((RS, 4, -1), "m = -1"),
        ((RS, 4.0, 2), r"k = 4\.0"),
        ((RS, 4, "2"), "m = '2'"),
        ((RS, 200, 57), r"k \+ m = 200 \+ 57 = 257: at most 256 are possible"),
        ((RS, 1 << 70, 1), "at most 256"),
        ((XOR, 4, 2), "XOR makes one parity, not m = 2; use REED_SOLOMON"),
        ((XOR, 256, 1), "at most 256"),
    ],
)
def test_what_is_no_code_is_named(arguments: tuple[Any, Any, Any], says: str) -> None:
    with pytest.raises(CodeError, match=says) as raised:
        Code(*arguments)
    assert isinstance(raised.value, ErasureError)
    assert isinstance(raised.value, ValueError)


def _zfec_rows(k: int, n: int) -> np.ndarray:
    """What zfec multiplies with: the parities of the unit vectors."""
    unit = [row.tobytes() for row in np.eye(k, dtype=np.uint8)]
    parities = zfec.Encoder(k, n).encode(unit, list(range(k, n)))
    return np.stack([np.frombuffer(parity, np.uint8) for parity in parities])


def test_the_matrix_is_zfecs_for_every_k_and_m() -> None:
    # A row depends on k and its own number alone, in both, so the largest m shows all rows.
    for k in range(1, 256):
        assert np.array_equal(reed_solomon(k, 256 - k), _zfec_rows(k, 256)), k
    for _ in range(200):
        k = random.randint(1, 254)
        m = random.randint(1, 255 - k)
        rows = reed_solomon(k, m)
        assert np.array_equal(rows, _zfec_rows(k, k + m)), (k, m)
        assert np.array_equal(rows, reed_solomon(k, 256 - k)[:m]), (k, m)


def _times(a: int, b: int) -> int:
    """Multiply two polynomials, then reduce: as the field is defined."""
    result = 0
    for bit in range(8):
        result ^= (a << bit) * (b >> bit & 1)
    for bit in range(14, 7, -1):
        result ^= (POLYNOMIAL << bit - 8) * (result >> bit & 1)
    return result


def test_product_is_the_fields() -> None:
    everything = np.arange(256, dtype=np.uint8)
    table = product(everything[:, None], everything[None, :])
    right = [[_times(a, b) for b in range(256)] for a in range(256)]
    assert np.array_equal(table, np.array(right, np.uint8))
    # and sums are XOR
    left, other = np.array([[3, 7]], np.uint8), np.array([[11], [200]], np.uint8)
    assert product(left, other)[0, 0] == _times(3, 11) ^ _times(7, 200)


@pytest.mark.parametrize("size", [1, 2, 7, 40, 255])
def test_inverse(seed: int, size: int) -> None:
    matrix = np.zeros((size, size), np.uint8)
    lower = np.tril(np.random.default_rng(seed).integers(1, 256, matrix.shape, np.uint8))
    matrix = product(lower, lower.T.copy())[::-1].copy()  # regular, and the pivots are not in place
    assert np.array_equal(product(matrix, inverse(matrix)), np.eye(size))
    assert np.array_equal(product(inverse(matrix), matrix), np.eye(size))


def test_a_matrix_without_inverse_is_refused() -> None:
    with pytest.raises(ValueError, match="of 2 rows is singular in column 1"):
        inverse(np.array([[1, 2], [1, 2]], np.uint8))


@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("m", range(1, 5))
def test_any_k_fragments_are_enough(k: int, m: int) -> None:
    code = Code(RS, k, m)
    everything, data = tuple(range(code.n)), tuple(range(k))
    generator = coefficients(code, data, everything)
    for have in itertools.combinations(everything, k):
        matrix = coefficients(code, have, everything)
        assert np.array_equal(product(matrix, generator[list(have)]), generator)


def test_coefficients_are_shared_and_so_never_written() -> None:
    matrix = coefficients(Code(RS, 4, 2), (0, 1, 2, 5), (3, 4))
    assert matrix.shape == (2, 4)
    assert matrix is coefficients(Code(RS, 4, 2), (0, 1, 2, 5), (3, 4))
    with pytest.raises(ValueError, match="read-only"):
        matrix[0, 0] = 1


def test_xor_adds_everything() -> None:
    assert coefficients(Code(XOR, 3, 1), (0, 1, 2), (3,)).tolist() == [[1, 1, 1]]
    assert coefficients(Code(XOR, 3, 1), (0, 2, 3), (1,)).tolist() == [[1, 1, 1]]
