"""Where several nodes meet, as flags say it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading

import pytest

from mnemo.errors import ConfigError, LaunchError
from mnemo.launcher import rendezvous
from mnemo.launcher.rendezvous import Nodes


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("1", Nodes(1)),
        ("1:1", Nodes(1)),
        ("4", Nodes(4)),
        ("4:6", Nodes(4, 2)),
        ("1:2", Nodes(1, 1)),
    ],
)
def test_numbers_of_nodes(text: str, nodes: Nodes) -> None:
    assert Nodes.parse(text) == nodes
    assert Nodes.parse(str(nodes)) == nodes


@pytest.mark.parametrize("text", ["", "0", "0:2", "3:2", "two", "-1", "1:", "1:2:3", "1.5", "4+1"])
def test_wrong_numbers_of_nodes(text: str) -> None:
    with pytest.raises(LaunchError, match="neither a number of nodes nor MIN:MAX"):
        Nodes.parse(text)


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("10.0.0.1", ("10.0.0.1:29400",)),
        ("10.0.0.1:7000, 10.0.0.2", ("10.0.0.1:7000", "10.0.0.2:29400")),
        ("[fd00::1]:7000,[fd00::2]", ("[fd00::1]:7000", "[fd00::2]:29400")),
        ("10.0.0.1,10.0.0.1:29400", ("10.0.0.1:29400",)),
        ("10.0.0.2,10.0.0.1", ("10.0.0.1:29400", "10.0.0.2:29400")),
        ("localhost:1", ("127.0.0.1:1",)),
        ("gone.invalid,10.0.0.2", ("10.0.0.2:29400", "gone.invalid:29400")),
    ],
)
def test_endpoints(text: str, places: tuple[str, ...]) -> None:
    assert rendezvous.endpoints(text, 29400) == places


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "several nodes have to meet somewhere"),
        (" , ", "several nodes have to meet somewhere"),
        ("host:port", "host:port is not HOST or HOST:PORT"),
        ("10.0.0.1:70000", "is not HOST or HOST:PORT"),
        ("10.0.0.1:0", "is not HOST or HOST:PORT"),
        ("fd00::1", "is not HOST or HOST:PORT"),
        ("no-such-host.invalid", "the host no-such-host.invalid is not known here"),
        ("no.invalid,such.invalid", "the host no.invalid, such.invalid is not known here"),
    ],
)
def test_wrong_endpoints(text: str, said: str) -> None:
    with pytest.raises(LaunchError, match=said):
        rendezvous.endpoints(text, 29400)


def test_a_host_that_is_not_known_keeps_its_place() -> None:
    """It may be the node that was lost, whose name is gone."""
    places = rendezvous.endpoints("gone.invalid:7000,10.0.0.2,[fd00::1]", 29400)
    assert "gone.invalid:7000" in places
    assert rendezvous.unknown(places) == ["gone.invalid"]


def test_static_meets_where_rank_0_is() -> None:
    assert rendezvous.meeting_point("static", "", "10.0.0.1", 7000) == "10.0.0.1:7000"
    assert rendezvous.meeting_point("static", "", "10.0.0.1", None) == "10.0.0.1:29400"
    assert rendezvous.meeting_point("static", "", "127.0.0.1", None) == ""
    assert rendezvous.meeting_point("c10d", "a,b", "10.0.0.1", None) == "a,b"
    with pytest.raises(LaunchError, match="--rdzv-backend=zookeeper is none of"):
        rendezvous.meeting_point("zookeeper", "a", "127.0.0.1", None)


def test_the_own_place_is_the_endpoint_or_has_its_port() -> None:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    own, other = f"127.0.0.1:{port}", f"192.0.2.1:{port}"
    assert place(other, own) == own
    assert place(other) == own
    with socket.socket() as listener:
        listener.bind(("", port))
        listener.listen()
        found = place(other, own)
        assert found.startswith("127.0.0.1:")
        assert found != own


def test_another_programs_port_is_not_where_nodes_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_LEAVES_S", 0.1)
    with socket.create_server(("", 0)) as listener:
        own = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(LaunchError, match=f"nodes meet at {own} here, where another program"):
            place(own)


def test_a_store_that_is_just_ending_is_waited_for() -> None:
    listener = socket.create_server(("", 0))
    own = f"127.0.0.1:{listener.getsockname()[1]}"
    ends = threading.Timer(0.2, listener.close)
    ends.start()
    assert place(own) == own
    ends.join()


@pytest.mark.parametrize(
    ("host", "places", "seen"),
    [
        ("10.0.0.1", ("127.0.1.1:1", "10.0.0.2:1"), ("10.0.0.1:1", "10.0.0.2:1")),
        ("fd00::1", ("[::1]:1", "b.invalid:1"), ("[fd00::1]:1", "b.invalid:1")),
        ("10.0.0.1", ("127.0.0.1:1", "10.0.0.1:1"), ("10.0.0.1:1",)),
        ("127.0.0.1", ("127.0.0.1:1", "127.0.0.1:2"), ("127.0.0.1:1", "127.0.0.1:2")),
    ],
)
def test_a_name_that_is_loopback_here_is_another_address_for_others(
    host: str, places: tuple[str, ...], seen: tuple[str, ...]
) -> None:
    """As distributions have it in /etc/hosts for the machine's own name."""
    rendezvous.require_reachable(host, places)
    assert rendezvous.as_others_see(places, host) == seen


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_loopback_is_no_address_for_other_nodes(host: str) -> None:
    with pytest.raises(ConfigError, match=f"look for this one at {host}, .*network.interface"):
        rendezvous.require_reachable(host, ("127.0.0.1:1", "10.0.0.2:1"))


def test_agents_on_one_machine_have_places_of_their_own_before_they_listen() -> None:
    with socket.socket() as probe:
        probe.bind(("", 0))
        own = f"127.0.0.1:{probe.getsockname()[1]}"
    first, claim = rendezvous.claim_place("run", "127.0.0.1", (own,))
    with claim:
        assert first == own
        assert place(own) != own
    assert place(own) == own


def test_an_agent_of_another_run_that_hosts_nothing_takes_no_place_away() -> None:
    with socket.socket() as probe:
        probe.bind(("", 0))
        own = f"127.0.0.1:{probe.getsockname()[1]}"
    _, claim = rendezvous.claim_place("other", "127.0.0.1", (own,))
    with claim:
        assert place(own) == own


def test_where_no_place_can_be_had_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a sandbox without such sockets, or with too many open files."""
    monkeypatch.setattr(rendezvous, "_name", lambda *_: None)
    with pytest.raises(LaunchError, match=r"no port of 127\.0\.0\.1 can be had"):
        place("192.0.2.1:1")


def place(*places: str) -> str:
    found, claim = rendezvous.claim_place("run", "127.0.0.1", places)
    claim.close()
    return found


def test_who_accepts_or_refuses_is_reached() -> None:
    def look(port: int) -> str:
        return asyncio.run(rendezvous.why_unreached("127.0.0.1", port, "127.0.0.1"))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert not look(port)
    assert not look(port)


def test_an_address_that_is_this_nodes_own_leads_to_no_other() -> None:
    """As that of a bridge which every machine has."""
    why = asyncio.run(rendezvous.why_unreached("127.0.0.1", 1, "10.0.0.1"))
    assert why == "that is an address of this node, too"


def test_who_gives_no_answer_is_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_REACH_S", 0.3)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):  # more than it takes in: nobody who comes now hears anything
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        host, port = listener.getsockname()
        why = asyncio.run(rendezvous.why_unreached(host, port, host))
        assert why == "no answer within 0.3 s"
