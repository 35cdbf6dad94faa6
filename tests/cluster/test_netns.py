"""The lab itself: what is cut is cut, what is lost is gone, nothing stays behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import netns

SERVER = """
import socket
server = socket.create_server(("", 7000))
print("listening", flush=True)
while True:
    connection, _ = server.accept()
    connection.sendall(b"here")
    connection.close()
"""
CLIENT = """
import socket, sys
try:
    with socket.create_connection((sys.argv[1], 7000), timeout=1.0) as connection:
        connection.settimeout(1.0)
        print(connection.recv(4).decode())
except OSError as error:
    print(type(error).__name__)
"""


def serve(host: netns.Host, program: str = SERVER) -> None:
    server = host.start([sys.executable, "-c", program], os.environ, stdout=subprocess.PIPE)
    assert server.stdout is not None
    with server.stdout:
        assert server.stdout.readline() == b"listening\n"


def ask(client: netns.Host, server: netns.Host) -> str:
    process = client.start(
        [sys.executable, "-c", CLIENT, server.address], os.environ, stdout=subprocess.PIPE
    )
    return process.communicate()[0].decode().strip()


def test_hosts_are_cut_off_and_lost(tmp_path: Path) -> None:
    with netns.network(tmp_path, 3) as net:
        one, two, three = net.hosts
        for host in net.hosts:
            serve(host)
        assert ask(one, two) == ask(three, one) == "here"
        two.cut()
        assert ask(one, two) == "TimeoutError"  # silence
        assert ask(one, three) == "here"
        two.mend()
        assert ask(one, two) == "here"
        two.pull()
        assert ask(two, one) == "OSError"  # told: the network is unreachable
        two.mend()
        assert ask(two, one) == "here"
        net.split([one, two], [three])
        assert ask(one, two) == "here"
        assert ask(one, three) == ask(three, two) == "TimeoutError"
        net.join()
        assert ask(one, three) == "here"
        one.mute_to(two)
        assert ask(one, two) == ask(two, one) == "TimeoutError"  # neither gets an answer
        assert ask(three, two) == ask(three, one) == "here"
        one.mend()
        assert ask(one, two) == "here"
        (three.home / "state").write_text("memory")
        three.lose()
        assert three.pids() == []
        assert not list(three.home.iterdir())
        assert ask(one, three) == "ConnectionRefusedError"
    assert not {net.switch, one.namespace, two.namespace, three.namespace} & set(netns.names())


SENDER = """
import socket, sys
with socket.create_connection((sys.argv[1], 7000), timeout=20.0) as connection:
    connection.sendall(bytes(1 << 20))
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)
"""
RECEIVER = """
import socket
server = socket.create_server(("", 7000))
print("listening", flush=True)
while True:
    connection, _ = server.accept()
    while connection.recv(1 << 16):
        pass
    connection.close()
"""


def test_a_link_is_slow(tmp_path: Path) -> None:
    """Late both ways, and with little room: what is sent is whole all the same."""
    with netns.network(tmp_path, 2) as net:
        one, two = net.hosts
        serve(two, RECEIVER)
        fast = time_to_send(one, two)
        two.slow(0.2)
        # The connection takes a round, the bytes and the end another each.
        assert time_to_send(one, two) - fast > 0.8 * 3 * 2 * 0.2
        two.slow(0.0, rate=1e6)
        assert time_to_send(one, two) - fast > 0.8
        two.slow(0.0)
        two.cut()
        assert ask(one, two) == "TimeoutError"
        two.mend()
        assert time_to_send(one, two) - fast < 0.8


def time_to_send(one: netns.Host, two: netns.Host) -> float:
    """Seconds that 1 MiB takes, with what it takes to start the sender."""
    begun = time.monotonic()
    assert one.start([sys.executable, "-c", SENDER, two.address], os.environ).wait(60) == 0
    return time.monotonic() - begun
