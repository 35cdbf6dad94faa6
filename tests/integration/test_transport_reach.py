"""The start-up check, on loopback and between network namespaces."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
import transport_lab as lab
from transport_lab import QUICK, Messages, identity, listening, run

from mnemo.transport.address import address_of, listen
from mnemo.transport.peer import Peer
from mnemo.transport.reach import Unreachable, find_unreachable

if TYPE_CHECKING:
    from collections.abc import Iterator


def test_every_pair_that_cannot_reach_each_other_is_named() -> None:
    async def main() -> None:
        async with (
            listening("a", rules=QUICK) as a,
            listening("b", rules=QUICK) as b,
            listening("c", secret=bytes(32)) as c,
        ):
            with listen("127.0.0.1", "") as sock:
                closed = address_of(sock)
            with listen("127.0.0.1", "") as mute:
                where = {
                    "a": a.listener.address,
                    "b": b.listener.address,
                    "c": c.listener.address,
                    "d": closed,
                    "e": address_of(mute),
                    "f": b.listener.address,
                }
                found = await find_unreachable(identity("a"), where, QUICK)
                unproved = (
                    "not authenticated: a has not the secret of run lab (the same "
                    "MNEMO_SECRET_FILE and run id are needed on all nodes), says c"
                )
                late = "timed out: the handshake took longer than 0.5 s"
                assert [str(one) for one in found] == [
                    f"node a cannot reach c at {where['c']}: {unproved}",
                    f"node a cannot reach d at {closed}: connection refused",
                    f"node a cannot reach e at {where['e']}: {late}",
                    f"node a cannot reach f at {where['f']}: b answers there, not f",
                ]
                back = await find_unreachable(identity("b"), where, QUICK)
                assert [(one.node, one.target) for one in back] == [
                    ("b", target) for target in ("c", "d", "e", "f")
                ]
                both = {name: where[name] for name in ("a", "b")}
                assert await find_unreachable(identity("b"), both) == []
                assert (
                    msgspec.msgpack.decode(msgspec.msgpack.encode(found), type=list[Unreachable])
                    == found
                )

    run(main())


def test_many_nodes_try_each_other_at_once() -> None:
    async def main() -> None:
        async def serve(peer: Peer[Messages]) -> None:
            await peer.receive()

        names = [f"n{number:02}" for number in range(24)]
        async with contextlib.AsyncExitStack() as stack:
            nodes = {
                name: (await stack.enter_async_context(listening(name, serve=serve))).listener
                for name in names
            }
            where = {name: node.address for name, node in nodes.items()}
            found = await asyncio.gather(
                *(find_unreachable(identity(name), where) for name in names)
            )
            assert found == [[]] * len(names)
            assert [node.refused for node in nodes.values()] == [0] * len(names)

    run(main())


# --- two machines, or nearly ----------------------------------------------------------------------

NODE = """
import asyncio, json, sys
sys.path.insert(0, sys.argv[1])
import transport_lab as lab
from mnemo.errors import PeerError
from mnemo.transport import address
from mnemo.transport.address import Address
from mnemo.transport.endpoints import Listener, connect
from mnemo.transport.reach import find_unreachable

def say(what):
    print(json.dumps(what), flush=True)

async def drain(peer):
    try:
        while True:
            received = await peer.receive()
            if received.message.text == "hold":
                say("holding")
    except PeerError as error:
        if "hung up" not in error.why:
            say(type(error).__name__)

async def main():
    me = lab.identity(sys.argv[2])
    sock = address.listen(sys.argv[3], "5000-5010")
    listener = Listener(me, sock, lab.DECODER, drain, lab.QUICK)
    say(listener.address)
    while True:
        line = await asyncio.to_thread(sys.stdin.readline)
        if not line:
            break
        word, nodes = json.loads(line)
        where = {name: Address(*given) for name, given in nodes.items()}
        if word == "reach":
            say([str(one) for one in await find_unreachable(me, where, lab.QUICK)])
        else:
            (target,) = where.values()
            peer = await connect(me, target, lab.DECODER, rules=lab.QUICK)
            await peer.send(lab.Note("hold"))
            try:
                while True:
                    await peer.send(lab.Note("x"), memoryview(bytes(1 << 20)))
            except PeerError as error:
                say(type(error).__name__)
            await peer.close()
    await listener.close()

asyncio.run(main())
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass
class Machine:
    """A network namespace with one interface, and a node in it."""

    namespace: str
    process: subprocess.Popen[str]
    address: list[object] = field(default_factory=list)

    def ask(self, word: str, **nodes: Machine) -> None:
        where = {name: machine.address for name, machine in nodes.items()}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([word, where]) + "\n")
        self.process.stdin.flush()

    def hear(self) -> object:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ip(self, *words: str) -> None:
        ip("-n", self.namespace, *words)


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    """Two of them with a wire between: gpu-a at 10.77.0.1, gpu-b at 10.88.0.2 behind 10.77.0.2."""
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip, of iproute2")
    names = [f"mnemo-{os.getpid()}-{letter}" for letter in "ab"]
    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "del", name)
            ends = ["mn0", "netns", names[0], "type", "veth", "peer", "name", "mn0"]
            ip("link", "add", *ends, "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"needs network namespaces: {error.stderr.strip()}")
        made = []
        for number, (name, interface) in enumerate(
            zip(names, ("mn0", "10.88.0.2"), strict=True), 1
        ):
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "mn0")
            ip("-n", name, "link", "set", "mn0", "up")
            if number == 1:
                ip("-n", name, "route", "add", "10.88.0.2", "via", "10.77.0.2")
            else:
                ip("-n", name, "address", "add", "10.88.0.2/32", "dev", "lo")
            code = [sys.executable, "-c", NODE, str(Path(lab.__file__).parent), f"gpu-{name[-1]}"]
            process = subprocess.Popen(
                ["ip", "netns", "exec", name, *code, interface],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            machine = Machine(name, process)
            stack.callback(_end, machine)
            made.append(machine)
        for machine in made:
            found = machine.hear()
            assert isinstance(found, list)
            machine.address = found
        yield made[0], made[1]


def _end(machine: Machine) -> None:
    with machine.process as process:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(20)


def test_a_direction_that_does_not_work_is_named(machines: tuple[Machine, Machine]) -> None:
    a, b = machines
    nodes = {"gpu-a": a, "gpu-b": b}
    assert [a.address, b.address] == [["10.77.0.1", 5000], ["10.88.0.2", 5000]]

    def check() -> list[object]:
        for machine in machines:
            machine.ask("reach", **nodes)
        return [machine.hear() for machine in machines]

    to_b = "node gpu-a cannot reach gpu-b at 10.88.0.2:5000: "
    to_a = "node gpu-b cannot reach gpu-a at 10.77.0.1:5000: "
    late = "timed out: connecting took longer than 0.5 s"
    assert check() == [[], []]
    a.ip("route", "del", "10.88.0.2")
    assert check() == [[f"{to_b}network is unreachable"], []]
    a.ip("neighbour", "add", "10.77.0.9", "lladdr", "02:00:00:00:00:09", "dev", "mn0")  # nobody's
    a.ip("route", "add", "10.88.0.2", "via", "10.77.0.9")
    assert check() == [[f"{to_b}{late}"], []]
    b.ip("route", "del", "10.77.0.0/24")
    assert check() == [[f"{to_b}{late}"], [f"{to_a}network is unreachable"]]


def test_a_wire_that_is_cut_ends_the_connection_at_both_ends(
    machines: tuple[Machine, Machine],
) -> None:
    a, b = machines
    a.ask("flood", b=b)
    assert b.hear() == "holding"
    b.ip("link", "set", "mn0", "down")
    assert (a.hear(), b.hear()) == ("PeerTimeoutError", "PeerTimeoutError")
    b.ip("link", "set", "mn0", "up")
    found: object = None
    for _ in range(20):  # the first packets may be lost to the way that has to be found again
        a.ask("reach", **{"gpu-b": b})
        found = a.hear()
        if found == []:
            break
    assert found == []
