"""Section ``protect``: what is accepted."""

from __future__ import annotations

import pytest

from mnemo.config import load_config
from mnemo.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "meant"), [("4+2", "4+2"), (" 3 + 1 ", "3+1"), ("1+255", "1+255"), ("", "")]
)
def test_codes(given: str, meant: str) -> None:
    assert load_config(environ={}, protect={"nodes": given}).protect.nodes == meant


@pytest.mark.parametrize(
    "given", ["4", "4+", "0+2", "4+0", "200+57", "4+2+1", "-4+2", "4-2", "yes"]
)
def test_what_is_no_code(given: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(environ={"MNEMO_PROTECT__NODES": given})
    assert str(caught.value) == (
        f"protect.nodes is {given!r} (in the variable MNEMO_PROTECT__NODES). Give nodes with data "
        "and nodes with parities, each at least 1 and at most 256 together, such as 4+2."
    )


@pytest.mark.parametrize(
    ("given", "meant"), [("100MB/s", 1e8), ("1GiB/s", 2.0**30), ("8 mb", 8e6), ("2500", 2500.0)]
)
def test_rates(given: str, meant: float) -> None:
    assert load_config(environ={}, protect={"rate": given}).protect.rate == meant


@pytest.mark.parametrize("given", ["0", "fast", "-1MB/s", "1MB/min"])
def test_what_is_no_rate(given: str) -> None:
    with pytest.raises(ConfigError, match="Give bytes per second above 0, such as 100MB/s"):
        load_config(environ={"MNEMO_PROTECT__RATE": given})


def test_a_domain_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RACK", "r7")
    assert load_config(environ={}, protect={"domain": "${oc.env:RACK}"}).protect.domain == "r7"


@pytest.mark.parametrize("given", ["x" * 129, "a\nb"])
def test_what_is_no_domain(given: str) -> None:
    with pytest.raises(ConfigError, match="Give a label of at most 128 printable characters"):
        load_config(environ={}, protect={"domain": given})
