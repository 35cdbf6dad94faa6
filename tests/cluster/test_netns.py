"""The lab itself: what is cut is cut, what is lost is gone, nothing stays behind."""

from __future__ import annotations

import os
import subprocess
import sys
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


def serve(host: netns.Host) -> None:
    server = host.start([sys.executable, "-c", SERVER], os.environ, stdout=subprocess.PIPE)
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
