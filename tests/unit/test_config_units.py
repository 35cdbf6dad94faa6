"""Durations, shares and sizes: what is read, what is refused, and that printing is exact."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemo.config import (
    format_duration,
    format_fraction,
    format_size,
    parse_duration,
    parse_fraction,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10min", 600),
        ("1h", 3600),
        ("90s", 90),
        ("1h30m", 5400),
        ("1h 30min", 5400),
        ("500ms", 0.5),
        ("1s500ms", 1.5),
        ("1.5h", 5400),
        (".5s", 0.5),
        ("2 days", 172800),
        ("1D", 86400),
        (" 30 ", 30),
        ("0.25", 0.25),
        ("1e3", 1000),
        ("0", 0),
    ],
)
def test_duration_is_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        *["", " ", "-5s", "-1", "+5s", "nan", "inf", "1e999", "1e999s", "s", "10 parsecs"],
        *["1h1h", "5m1h", "1h,30m", "1:30", "10min!", "1_000s", "٣s", "ten minutes"],
    ],
)
def test_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match=r"duration|too large"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *[(600.0, "10min"), (3600.0, "1h"), (5400.0, "1h30min"), (90.0, "1min30s"), (0.0, "0s")],
        *[(0.5, "500ms"), (1.5, "1.5s"), (90061.0, "1d1h1min1s"), (1e-7, "1e-07s")],
    ],
)
def test_duration_is_written(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.floats(min_value=0, max_value=1e15, allow_subnormal=False))
def test_duration_round_trip(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == seconds


@given(st.integers(0, 10**9))
def test_duration_round_trip_of_milliseconds(milliseconds: int) -> None:
    assert parse_duration(format_duration(milliseconds / 1000)) == milliseconds / 1000


@pytest.mark.parametrize(
    ("text", "value"),
    [("1%", 0.01), ("0.01", 0.01), (" 2.5 % ", 0.025), ("100%", 1.0), ("0%", 0.0), ("1e-3", 0.001)],
)
def test_fraction_is_read(text: str, value: float) -> None:
    assert parse_fraction(text) == value


@pytest.mark.parametrize("text", ["1", "1.0", "5", "101%", "-1%", "-0.1", "nan", "%", "", "1%%"])
def test_no_fraction(text: str) -> None:
    with pytest.raises(ValueError, match="share"):
        parse_fraction(text)


@pytest.mark.parametrize(("value", "text"), [(0.01, "1%"), (0.07, "7%"), (1.0, "100%"), (0, "0%")])
def test_fraction_is_written(value: float, text: str) -> None:
    assert format_fraction(value) == text


@given(st.floats(min_value=0, max_value=1))
def test_fraction_round_trip(value: float) -> None:
    assert parse_fraction(format_fraction(value)) == value


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 * 2**30),
        ("512MB", 512_000_000),
        ("512 mb", 512_000_000),
        ("1.5KiB", 1536),
        ("0.1MB", 100_000),
        ("17", 17),
        ("0B", 0),
        ("2PiB", 2**51),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_size_is_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "4G", "4 gigabytes", "nan", "1e999B", "1,5GB"]
)
def test_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|too large"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(4 * 2**30, "4GiB"), (512_000_000, "512MB"), (1000, "1kB"), (1025, "1025B"), (0, "0B")],
)
def test_size_is_written(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 2**60))
def test_size_round_trip(size: int) -> None:
    assert parse_size(format_size(size)) == size
