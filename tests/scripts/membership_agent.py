"""An agent whose workers are a variable: says on standard output what it is told to do.

Arguments: name, port, number of nodes, and the place of the run's first Store, which the agent
hosts itself if it is its own.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from mnemo.launcher.c10d import C10dStores
from mnemo.membership import Driver, Epoch, Machine, Member, Rules, Seal


def say(event: str, **more: object) -> None:
    print(json.dumps({"event": event, "at": time.monotonic(), **more}), flush=True)


class Workers:
    def start(self, epoch: Epoch, node_rank: int) -> None:
        names = [member.node for member in epoch.members]
        say("start", epoch=epoch.number, rank=node_rank, members=names)

    async def stop(self) -> None:
        say("stop")


async def main(name: str, port: str, nodes: str, first: str) -> None:
    place = f"127.0.0.1:{port}"
    stores = C10dStores("run")
    await stores.warm_up()
    if place == first:
        await stores.host(place)
    say("ready")
    rules = Rules(nodes=int(nodes))
    me = Member(name, str(time.time_ns()), store=place)
    machine = Machine(me, Seal(b"s" * 32, "run"), rules, (first,), time.monotonic())
    try:
        await Driver(machine, stores, Workers(), rules).run()
    finally:
        await stores.close()
    assert "torch" not in sys.modules


asyncio.run(main(*sys.argv[1:]))
