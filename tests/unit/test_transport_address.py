"""`network.interface` and `network.ports`: what is accepted, and the socket that comes of it."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import psutil
import pytest

from mnemo.config import load_config
from mnemo.errors import ConfigError
from mnemo.transport import address
from mnemo.transport.address import Address, address_of, host_of, listen

# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("", ""),
        (5000, "5000"),
        ("5000", "5000"),
        ("5000-5100", "5000-5100"),
        (" 5000 - 5100 ", "5000-5100"),
        ("5000-5000", "5000"),
        ("1-65535", "1-65535"),
    ],
)
def test_ports_that_are_accepted(given: object, meant: str) -> None:
    assert load_config(environ={}, network={"ports": given}).config.network.ports == meant


@pytest.mark.parametrize(
    "given", ["0", "65536", "5100-5000", "5000-", "-5000", "5000-5100-5200", "http", "5000,5001"]
)
def test_ports_that_are_not(given: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(environ={"MNEMO_NETWORK__PORTS": given})
    assert str(caught.value) == (
        f"network.ports is {given!r} (in the variable MNEMO_NETWORK__PORTS). Give a port or a "
        "range of ports within 1 to 65535, such as 5000-5100."
    )


@pytest.mark.parametrize("given", ["", "eth0", "bond0.100", "ib-0", "10.0.0.2", "fd00::2", "::1"])
def test_interfaces_that_are_accepted(given: str) -> None:
    assert load_config(environ={}, network={"interface": given}).config.network.interface == given


@pytest.mark.parametrize(
    "given",
    ["0.0.0.0", "::", "fe80::1%eth0", "eth0:1", "a b", "../x", "..", "worker-1.cluster.local"],
)
def test_interfaces_that_are_not(given: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(environ={}, overrides=[f"network.interface={given}"])
    assert str(caught.value) == (
        f"network.interface is {given!r} (on the command line). Give the name of a network "
        "interface (up to 15 characters) or one of its IP addresses."
    )


# --- the address ----------------------------------------------------------------------------------


def interfaces(monkeypatch: pytest.MonkeyPatch, down: str = "", **found: list[str]) -> None:
    """Give this machine other interfaces."""
    monkeypatch.setattr(
        psutil,
        "net_if_addrs",
        lambda: {name: [SimpleNamespace(address=a) for a in some] for name, some in found.items()},
    )
    monkeypatch.setattr(
        psutil,
        "net_if_stats",
        lambda: {name: SimpleNamespace(isup=name != down) for name in found},
    )
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu-b")


def test_an_interface_by_name_or_address(monkeypatch: pytest.MonkeyPatch) -> None:
    interfaces(
        monkeypatch,
        lo=["127.0.0.1", "::1", "00:00:00:00:00:00"],
        eth0=["fe80::1%eth0", "fd00::2", "10.0.0.2", "02:42:ac:11:00:02"],
        ib0=["fe80::1%ib0", "fd00:0::3"],
    )
    assert host_of("eth0") == "10.0.0.2"
    assert host_of("ib0") == "fd00:0::3"
    assert host_of("10.0.0.2") == "10.0.0.2"
    assert host_of("FD00::0002") == "fd00::2"
    assert host_of("lo") == "127.0.0.1"


def test_an_interface_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    interfaces(
        monkeypatch, down="eth1", lo=["127.0.0.1"], eth0=["10.0.0.2"], eth1=["10.1.0.2"], ib0=[]
    )
    has = "It has eth0 (10.0.0.2), eth1 (10.1.0.2), ib0 (no address), lo (127.0.0.1)."
    for given, says in [
        ("eth9", f"network.interface is eth9, which gpu-b does not have. {has}"),
        ("10.9.9.9", f"network.interface is 10.9.9.9, which is no address of gpu-b. {has}"),
        ("ib0", f"network.interface is ib0, which has no IP address on gpu-b. {has}"),
        (
            "eth1",
            "network.interface is eth1, and eth1 is down on gpu-b: ip link set eth1 up",
        ),
        (
            "10.1.0.2",
            "network.interface is 10.1.0.2, and eth1 is down on gpu-b: ip link set eth1 up",
        ),
    ]:
        with pytest.raises(ConfigError) as caught:
            host_of(given)
        assert str(caught.value) == says


def test_by_default_an_address_of_this_machine() -> None:
    mine = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    assert host_of("") in mine


def test_by_default_loopback_where_there_is_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "_ELSEWHERE", ((socket.AF_INET, "255.255.255.255"),))
    assert host_of("") == "127.0.0.1"


def test_an_address_as_text() -> None:
    assert str(Address("10.0.0.2", 5001)) == "10.0.0.2:5001"
    assert str(Address("::1", 5001)) == "[::1]:5001"
    assert Address("10.0.0.2", 1).family == socket.AF_INET
    assert Address("::1", 1).family == socket.AF_INET6
    with pytest.raises(ValueError, match="localhost"):
        _ = Address("localhost", 1).family


# --- the socket -----------------------------------------------------------------------------------


def test_the_first_free_port_of_a_range_is_taken() -> None:
    with listen("127.0.0.1", "") as first:
        start = address_of(first).port
        with listen("lo", f"{start}-{min(start + 20, 65535)}") as second:
            assert start < address_of(second).port <= start + 20
            assert address_of(second).host == "127.0.0.1"
            assert not second.getblocking()


def test_no_free_port() -> None:
    with listen("127.0.0.1", "") as taken:
        port = address_of(taken).port
        with pytest.raises(
            ConfigError, match=rf"network.ports is {port}, and it is in use at 127.0.0.1: give a"
        ):
            listen("127.0.0.1", str(port))


def test_all_ports_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "_try", lambda _: None)
    with pytest.raises(ConfigError, match=r"network.ports is 7000-7002, and all 3 are in use at"):
        listen("127.0.0.1", "7000-7002")


def test_a_port_that_needs_privileges(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object, __: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(
        ConfigError, match=r"network.ports: port 80 needs privileges; give one from"
    ):
        listen("127.0.0.1", "80")


def test_a_port_is_free_again_at_once() -> None:
    with listen("127.0.0.1", "") as first:
        where = address_of(first)
        with socket.create_connection(where) as caller:
            accepted = None
            while accepted is None:
                try:
                    accepted, _ = first.accept()
                except BlockingIOError:
                    continue
            accepted.close()  # this end waits in TIME_WAIT from here on
            caller.recv(1)
    with listen("127.0.0.1", str(where.port)) as again:
        assert address_of(again) == where
