"""Where this node can be reached: `network.interface` and `network.ports` made into a socket."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
from collections.abc import Iterable
from typing import Final, NamedTuple

import psutil

from mnemo.config.kinds import parse_ports
from mnemo.errors import ConfigError

_BACKLOG: Final = 512
_ELSEWHERE: Final = (
    (socket.AF_INET, "192.0.2.1"),  # addresses that are nobody's (RFC 5737, RFC 3849)
    (socket.AF_INET6, "2001:db8::1"),
)


class Address(NamedTuple):
    """A numeric IP address and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def family(self) -> socket.AddressFamily:
        """``AF_INET`` or ``AF_INET6``.

        Raises:
            ValueError: The host is a name, which would have to be looked up.
        """
        version = ipaddress.ip_address(self.host).version
        return socket.AF_INET if version == 4 else socket.AF_INET6


def host_of(interface: str) -> str:
    """The address that other nodes reach this one by.

    Args:
        interface: `network.interface`: name or address of a network interface. Empty: the one
            that packets to other networks leave by; without such a one, loopback.

    Raises:
        ConfigError: This machine has no such interface or address, or it is down.
    """
    if not interface:
        return _default_host()
    hosts = {
        name: [entry.address for entry in entries if _is_ip(entry.address)]
        for name, entries in psutil.net_if_addrs().items()
    }
    known = ", ".join(
        f"{name} ({', '.join(found) or 'no address'})" for name, found in sorted(hosts.items())
    )
    if _is_ip(interface):
        wanted = ipaddress.ip_address(interface)
        owner = [
            name for name, found in hosts.items() if wanted in map(ipaddress.ip_address, found)
        ]
        if not owner:
            raise ConfigError(
                f"network.interface is {interface}, which is no address of {socket.gethostname()}. "
                f"It has {known}."
            )
        name, host = owner[0], str(wanted)
    elif interface in hosts:
        if not hosts[interface]:
            raise ConfigError(
                f"network.interface is {interface}, which has no IP address on "
                f"{socket.gethostname()}. It has {known}."
            )
        # IPv4 first: where both exist it is the one that every node has.
        name, host = interface, sorted(hosts[interface], key=lambda found: ":" in found)[0]
    else:
        raise ConfigError(
            f"network.interface is {interface}, which {socket.gethostname()} does not have. "
            f"It has {known}."
        )
    if not psutil.net_if_stats()[name].isup:
        raise ConfigError(
            f"network.interface is {interface}, and {name} is down on {socket.gethostname()}: "
            f"ip link set {name} up"
        )
    return host


def listen(interface: str, ports: str) -> socket.socket:
    """Open a listening socket, non-blocking.

    Args:
        interface: As of `host_of`.
        ports: `network.ports`: one port or a range, of which the first free one is taken. Empty:
            the system chooses.

    Raises:
        ConfigError: There is no such interface, no port is free, or it needs privileges.
    """
    host = host_of(interface)
    wanted = parse_ports(ports) if ports else range(1)
    for port in wanted:
        found = _try(Address(host, port))
        if found is not None:
            return found
    raise ConfigError(
        f"network.ports is {ports}, and {_all_of(wanted)} in use at {host}: give a larger range"
    )


def is_as_asked(address: Address, interface: str, ports: str) -> bool:
    """Whether `listen` might have chosen ``address``, so that there is no need to listen anew.

    Args:
        address: Where this node listens.
        interface: As of `listen`.
        ports: As of `listen`.

    Raises:
        ConfigError: See `host_of`.
    """
    return address.host == host_of(interface) and (not ports or address.port in parse_ports(ports))


def address_of(listener: socket.socket) -> Address:
    """Where others connect to ``listener``."""
    host, port = listener.getsockname()[:2]
    return Address(host, port)


def _try(address: Address) -> socket.socket | None:
    """A socket that listens at ``address``; None if somebody else does."""
    sock = socket.socket(address.family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections just ended
        sock.bind(tuple(address))
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            return None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise ConfigError(
                f"network.ports: port {address.port} needs privileges; give one from 1024 on"
            ) from error
        raise ConfigError(f"network.ports: nothing can listen at {address}: {error}") from error
    return sock


def _all_of(ports: Iterable[int]) -> str:
    count = len(list(ports))
    return "it is" if count == 1 else f"all {count} are"


def _default_host() -> str:
    for family, elsewhere in _ELSEWHERE:
        with (
            contextlib.suppress(OSError),
            socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe,
        ):
            probe.connect((elsewhere, 9))  # chooses a route; nothing is sent
            return str(probe.getsockname()[0])
    return "127.0.0.1"


def _is_ip(text: str) -> bool:
    """Whether it is an IP address that says the same on every node, unlike ``fe80::1%eth0``."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return "%" not in text
