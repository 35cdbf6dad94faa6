"""Where the agents of several nodes meet, as torchrun's ``--rdzv-…`` flags say."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import os
import re
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import psutil

from mnemo.errors import ConfigError, LaunchError, StoreLostError
from mnemo.membership.records import HEAD
from mnemo.transport.address import Address

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mnemo.membership import Epoch, Stores

PORTS: Final[Mapping[str, int]] = {"static": 29400, "c10d": 29400, "etcd": 2379}
"""Default port of each backend."""
_LEAVES_S: Final = 2.0
"""How long the Store of an agent that was killed may take to end."""
_LOOK_S: Final = 0.05
_MOST_PORTS: Final = 100
"""So many are tried."""
_REACH_S: Final = 5.0
"""How long another node may take to accept or refuse a connection."""
_AGAIN_S: Final = 0.5
_ENDPOINT: Final = re.compile(r"(?P<host>\[[0-9a-fA-F:]+\]|[^:,\[\]]+)(:(?P<port>\d{1,5}))?")


@dataclass(frozen=True, slots=True)
class Nodes:
    """How many nodes an epoch has, and how many may wait as spares."""

    count: int
    spares: int = 0

    def __str__(self) -> str:
        return f"{self.count}:{self.count + self.spares}" if self.spares else f"{self.count}"

    @classmethod
    def parse(cls, text: str) -> Nodes:
        """Read ``--nnodes``: a number, or ``MIN:MAX``.

        Raises:
            LaunchError: It is neither.
        """
        match = re.fullmatch(r"(\d{1,5})(?::(\d{1,5}))?", text)
        least, most = (int(n) for n in match.groups(match[1])) if match else (0, 0)
        if not 1 <= least <= most:
            msg = (
                f"--nnodes={text} is neither a number of nodes nor MIN:MAX with MIN <= MAX; use "
                "--nnodes=4, or --nnodes=4:5 for a spare"
            )
            raise LaunchError(msg)
        return cls(least, most - least)


def meeting_point(backend: str, endpoint: str, addr: str, port: int | None) -> str:
    """The endpoint that torchrun's flags mean.

    Args:
        backend: ``--rdzv-backend``; with ``static``, the node that hosts rank 0 is where all meet.
        endpoint: ``--rdzv-endpoint``.
        addr: ``--master-addr``.
        port: ``--master-port``.

    Raises:
        LaunchError: There is no such backend.
    """
    if backend not in PORTS:
        msg = f"--rdzv-backend={backend} is none of {', '.join(PORTS)}"
        raise LaunchError(msg)
    if endpoint or backend != "static" or addr == "127.0.0.1":
        return endpoint
    return f"{addr}:{port or PORTS[backend]}"


def endpoints(text: str, default_port: int) -> tuple[str, ...]:
    """The places that ``--rdzv-endpoint`` names: ``HOST[:PORT]``, several with commas between.

    A host that is not known keeps its place, by name: it may be one that was lost. They come in an
    order of their own, so that all nodes begin at the same one.

    Args:
        text: What it is.
        default_port: Where none is given.

    Raises:
        LaunchError: One of them is none, or none of the hosts is known.
    """
    found = []
    unknown: list[str] = []
    for word in sorted(filter(None, (part.strip() for part in text.split(",")))):
        match = _ENDPOINT.fullmatch(word)
        port = int(match["port"] or default_port) if match else 0
        if match is None or not 0 < port < 1 << 16:
            msg = f"--rdzv-endpoint={text}: {word} is not HOST or HOST:PORT"
            raise LaunchError(msg)
        host = match["host"].strip("[]")
        known = _resolve(host)
        if not known:
            unknown.append(host)
        found.append(str(Address(known or host, port)))
    if found and len(unknown) == len(found):
        msg = f"--rdzv-endpoint: the host {', '.join(unknown)} is not known here"
        raise LaunchError(msg)
    if not found:
        msg = (
            "several nodes have to meet somewhere: --rdzv-endpoint=HOST[:PORT] with a host of "
            "theirs, the same for all; name several (HOST,HOST,…), so that a node that comes "
            "later finds the job also when the first of them was lost"
        )
        raise LaunchError(msg)
    return tuple(dict.fromkeys(found))


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _resolve(host: str) -> str:
    """The address of ``host``; empty if it is not known."""
    if _is_ip(host):
        return str(ipaddress.ip_address(host))
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return ""
    return min((str(entry[4][0]) for entry in found), key=lambda ip: ":" in ip)


def unknown(places: tuple[str, ...]) -> list[str]:
    """Hosts of `endpoints` that have no address here: they are there by name."""
    return [host for host in map(_host, places) if not _is_ip(host)]


def require_reachable(host: str, places: tuple[str, ...]) -> None:
    """Check that other nodes can mean this one by ``host``, unless all are on this machine.

    Args:
        host: The address that other nodes are told.
        places: See `endpoints`.

    Raises:
        ConfigError: It is loopback, and where they meet is not.
    """
    if _is_loopback(host) and not all(_is_loopback(_host(place)) for place in places):
        raise ConfigError(
            f"other nodes would look for this one at {host}, which is their own: set "
            "network.interface to the name of the interface that they reach it by"
        )


def as_others_see(places: tuple[str, ...], host: str) -> tuple[str, ...]:
    """``places``, with ``host`` for the name that this machine knows as loopback: its own."""
    seen = [
        str(Address(host, _port(place))) if _is_loopback(_host(place)) else place
        for place in places
    ]
    return tuple(dict.fromkeys(seen))


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):  # a name
        return ipaddress.ip_address(host).is_loopback
    return False


def _host(place: str) -> str:
    return place.rpartition(":")[0].strip("[]")


def _port(place: str) -> int:
    return int(place.rpartition(":")[2])


def claim_place(run_id: str, host: str, places: tuple[str, ...]) -> tuple[str, socket.socket]:
    """Where this node would host a Store: at one of ``places`` if that is its own.

    Args:
        run_id: Of the run, whose agents on this machine get along with each other.
        host: The address that other nodes reach this one by.
        places: See `endpoints`.

    Returns:
        The place, and what holds it against other agents on this machine until it is closed.

    Raises:
        LaunchError: The run's first Store has to be here, and another program, or run, has its
            port; or no port can be had.
    """
    own = _own_hosts()
    port = _port(places[0])
    mine = [place for place in places if _host(place) in own]
    wanted = mine[0] if mine else str(Address(host, port))
    claim = _claim(run_id, _port(wanted))
    deadline = time.monotonic() + _LEAVES_S
    while claim is None and wanted == places[0] and not _is_an_agents(run_id, _port(wanted)):
        if time.monotonic() > deadline:
            raise LaunchError(
                f"--rdzv-endpoint: nodes meet at {wanted} here, where another program or run "
                "listens: use another port, on all nodes"
            )
        time.sleep(_LOOK_S)
        claim = _claim(run_id, _port(wanted))
    for _ in range(_MOST_PORTS):
        if claim is not None:
            return wanted, claim
        with socket.socket() as probe:  # another agent has it, or will host there before long
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        wanted, claim = str(Address(host, port)), _claim(run_id, port)
    raise LaunchError(f"no port of {host} can be had for the run's Store: see ss -xl and ulimit -n")


def _own_hosts() -> set[str]:
    """Addresses of this machine."""
    interfaces = psutil.net_if_addrs().values()
    return {entry.address.partition("%")[0] for found in interfaces for entry in found}


def _claim(run_id: str, port: int) -> socket.socket | None:
    """Have ``port`` among the run's agents on this machine, long before anybody listens there.

    By a name that ends with its process and is known where the port is: in the network namespace.
    """
    claim = _name(run_id, port)
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    except OSError:
        if claim is not None:
            claim.close()
        return None
    return claim


def _name(run_id: str, port: int) -> socket.socket | None:
    run = hashlib.sha256(f"{os.getuid()} {run_id}".encode()).hexdigest()[:16]
    name = socket.socket(socket.AF_UNIX)
    try:
        name.bind(f"\0mnemo-store-{run}-{port}")
    except OSError:
        name.close()
        return None
    return name


def _is_an_agents(run_id: str, port: int) -> bool:
    """Whether an agent of the run on this machine has claimed it."""
    name = _name(run_id, port)
    if name is not None:
        name.close()
    return name is None


async def host_first(stores: Stores, places: tuple[str, ...], own: str) -> None:
    """Host the first of ``places`` if that is ``own``, unless the run goes on elsewhere.

    Raises:
        LaunchError: It cannot be hosted.
    """
    first = places[0]
    if own != first or not await _is_needed(stores, places):
        return
    try:
        await stores.host(first)
    except StoreLostError as error:
        msg = f"{error}; use another port in --rdzv-endpoint, on all nodes"
        raise LaunchError(msg) from error


async def _is_needed(stores: Stores, places: tuple[str, ...]) -> bool:
    """Whether no node that answers has a Store of this run, as at its beginning."""

    async def has_one(place: str) -> bool:
        with contextlib.suppress(StoreLostError):
            store = await stores.store(place)
            (head,) = await store.get((HEAD,))
            return head is not None
        return False

    return not any(await asyncio.gather(*map(has_one, places)))


def require_fit(epoch: Epoch, nodes: Nodes, ranks: int) -> None:
    """Refuse to take part, or to wait, where the others were started otherwise.

    Args:
        epoch: Theirs.
        nodes: ``--nnodes`` of this one.
        ranks: ``--nproc-per-node`` of this one.

    Raises:
        LaunchError: They were.
    """
    if len(epoch.members) != nodes.count:
        raise LaunchError(
            f"--nnodes={nodes}, but the others run with {len(epoch.members)} nodes: use the same "
            "on all nodes"
        )
    theirs = {member.ranks for member in epoch.members}
    if ranks not in theirs:
        raise LaunchError(
            f"--nproc-per-node={ranks}, but no other node of this run has so many ranks: they have "
            f"{', '.join(map(str, sorted(theirs)))}"
        )


async def why_unreached(host: str, port: int, me: str) -> str:
    """Why nothing at an address of another node's can be connected to; empty if something can.

    Who refuses is reached.

    Args:
        host: The address.
        port: A port there that somebody has, or will have.
        me: The address that others reach this node by.
    """
    if host != me and host in _own_hosts():
        return "that is an address of this node, too"
    deadline = time.monotonic() + _REACH_S
    while True:
        connecting = asyncio.open_connection(host, port)
        try:
            _, writer = await asyncio.wait_for(connecting, max(deadline - time.monotonic(), 0.0))
        except ConnectionRefusedError:
            return ""
        except asyncio.TimeoutError:
            return f"no answer within {_REACH_S:g} s"
        except OSError as error:
            if time.monotonic() + _AGAIN_S > deadline:
                return error.strerror or str(error)
        else:
            writer.close()
            return ""
        await asyncio.sleep(_AGAIN_S)
