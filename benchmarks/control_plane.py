"""How long 512 agents take to agree, what their heartbeats cost, and what they do when 8 die."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import psutil

from mnemo.launcher.c10d import C10dStores
from mnemo.membership import Driver, Epoch, Machine, Member, Rules, Seal

if TYPE_CHECKING:
    from typing_extensions import Self

    from benchmarks.harness import Report

PROCESSES = 4
SPARES = 8
STEADY_S = 10.0


def run(quick: bool, report: Report) -> None:
    """Measure with few agents and with 512, on one Store of torch's."""
    agree = float("nan")
    for nodes in (64,) if quick else (64, 512):
        with _Store() as place, _Agents(nodes, place) as agents:
            asked = time.monotonic()
            agents.tell("start")
            agree = agents.wait_for(epoch=1) - asked
            before, time_before = agents.cpu_s(), time.monotonic()
            time.sleep(STEADY_S)
            cpu = (agents.cpu_s() - before) / (time.monotonic() - time_before)
            epochs = agents.newest
            asked = time.monotonic()
            agents.tell("lose", agents=[0])
            replaced = agents.wait_for(epoch=epochs + 1) - asked
        report.row(
            agents=nodes + SPARES,
            agree_s=agree,
            heartbeat_cpu_ms_per_s_each=1000 * cpu / (nodes + SPARES),
            epochs_while_steady=epochs,
            lost=SPARES,
            replaced_s=replaced,
        )
    report.bar("agree_512_s" if not quick else "agree_64_s", agree, 2.0, "lower")


class _Store:
    """A Store in a process of its own, as the agent of its host has one."""

    def __enter__(self) -> str:
        command = [sys.executable, "-m", "mnemo.launcher.c10d_host"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("0\n")
        self._process.stdin.flush()
        return f"127.0.0.1:{int(self._process.stdout.readline())}"

    def __exit__(self, *exc: object) -> None:
        self._process.communicate()


class _Agents:
    """Processes with many agents each; the first one also holds those that will die."""

    def __init__(self, nodes: int, place: str) -> None:
        self._nodes = nodes
        self._place = place
        self.newest = 1

    def __enter__(self) -> Self:
        total = self._nodes + SPARES
        self._processes = []
        for index in range(PROCESSES):
            count = total // PROCESSES + (index < total % PROCESSES)
            arguments = [str(index), str(count), str(self._nodes), self._place]
            command = [sys.executable, "-m", "benchmarks.control_plane", *arguments]
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
            self._processes.append(process)
        for process in self._processes:
            self._read(process)
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self._processes:
            process.communicate()

    def _read(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        return json.loads(process.stdout.readline())

    def tell(self, what: str, agents: list[int] | None = None) -> None:
        """Have all processes, or these, do something."""
        for index in range(PROCESSES) if agents is None else agents:
            pipe = self._processes[index].stdin
            assert pipe is not None
            pipe.write(what + "\n")
            pipe.flush()

    def wait_for(self, epoch: int) -> float:
        """When the last member of ``epoch``, or of a later one, was told to start."""
        running: dict[int, tuple[int, float]] = {}
        # One line each time that a process has somebody begin or end.
        while sum(count for count, _ in running.values()) < self._nodes:
            self.tell(f"running {epoch}")
            for index, process in enumerate(self._processes):
                said = self._read(process)
                running[index] = said["running"], said["at"]
                self.newest = max(self.newest, said["newest"])
            time.sleep(0.02)
        return max(at for _, at in running.values())

    def cpu_s(self) -> float:
        """CPU time of all agents so far."""
        return sum(sum(psutil.Process(p.pid).cpu_times()[:2]) for p in self._processes)


class _Workers:
    """Of one agent: only when they were started."""

    def __init__(self) -> None:
        self.epoch = 0
        self.at = 0.0

    def start(self, epoch: Epoch, node_rank: int) -> None:
        del node_rank
        self.epoch, self.at = epoch.number, time.monotonic()

    async def stop(self) -> None:
        self.epoch = -abs(self.epoch)


async def _serve(index: int, count: int, nodes: int, place: str) -> None:
    """Run ``count`` agents; obey what comes on standard input."""
    rules, seal = Rules(nodes=nodes), Seal(b"s" * 32, "bench")
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    workers = [_Workers() for _ in range(count)]
    agents = [C10dStores("bench", patience_s=5.0) for _ in range(count)]
    tasks: list[asyncio.Task[None]] = []
    print(json.dumps({"ready": True}), flush=True)
    async for line in reader:
        what, _, number = line.decode().strip().partition(" ")
        if what == "start":
            for each in range(count):
                # The first process's first agents would host the Store and lead.
                me = Member(f"{index:02}-{each:04}", "0", store="" if index or each else place)
                machine = Machine(me, seal, rules, (place,), time.monotonic())
                driver = Driver(machine, agents[each], workers[each], rules)
                tasks.append(asyncio.create_task(driver.run()))
        elif what == "lose":
            told = [i for i, each in enumerate(workers) if each.epoch > 0 and i > 0]
            for each in told[-SPARES:]:
                tasks[each].cancel()
                workers[each].epoch = 0
        else:
            wanted = [each for each in workers if each.epoch >= int(number)]
            said = {
                "running": len(wanted),
                "at": max((each.at for each in wanted), default=0.0),
                "newest": max(abs(each.epoch) for each in workers),
            }
            print(json.dumps(said), flush=True)
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task
    for each in agents:
        await each.close()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
