"""Snapshot processes as a group: what their ranks commit is protected, and survives their loss."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import smp_lab as lab
from ports import held_port
from smp_lab import memory_group

from mnemo.smp import lifecycle
from mnemo.smp import messages as m
from mnemo.smp.paths import RunPaths
from mnemo.transport import auth

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PATIENCE_S = 30.0
RANKS = 2


class Smp:
    """One node: its snapshot process and the ranks that it serves."""

    def __init__(self, directory: Path, settings: m.ProtectSettings) -> None:
        self.paths = RunPaths.of("lab", str(directory / settings.node))
        self._settings = settings
        self.address = settings.addresses[settings.node]
        self.ranks: list[lab.Rank] = []
        self._board = -1

    def join(self) -> None:
        """Have all ranks take their places, one after the other; `recall` has to follow."""
        for number in range(RANKS):
            client = lifecycle.ensure(self.paths)
            rank = lab.Rank(client, number)
            self.ranks.append(rank)
            request = m.Join(0, number, RANKS, 60.0, None, self._settings)
            _, fds = client.ask(request, m.Joined, timeout_s=PATIENCE_S)
            if number:
                os.close(fds[0])
            else:
                self._board = fds[0]

    def recall(self) -> m.Recalled:
        """Wait until what other nodes keep of this one has come back."""
        while True:
            found, _ = self.ranks[0].client.ask(m.Recall(), m.Recalled)
            if found.over:
                return found

    def replace_process(self) -> None:
        """The snapshot process dies alone; the ranks hand what they hold to another."""
        pid = self.ranks[0].client.pid
        os.kill(pid, signal.SIGKILL)
        for rank in self.ranks:
            rank.client.close()
        lab.wait_for_exit(pid)
        for rank in self.ranks:
            rank.client = lifecycle.ensure(self.paths)
            request = m.Join(0, rank.rank, RANKS, 60.0, None, self._settings)
            _, fds = rank.client.ask(request, m.Joined, [self._board], timeout_s=PATIENCE_S)
            os.close(fds[0])
            adopt = m.Adopt(tuple(rank.held))
            rank.client.ask(adopt, m.Done, list(rank.held.values()))

    def write(self, tick: int, size: int = lab.SIZE) -> None:
        for rank in self.ranks:
            rank.write(tick, size)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.ranks[0].fit()["protect"]
        return found

    def hang_up(self) -> None:
        for rank in self.ranks:
            rank.close()
        if self.ranks:
            os.close(self._board)
        self.ranks = []

    def kill(self) -> None:
        """The node is lost: its ranks, its snapshot process, its memory."""
        pid = self.ranks[0].client.pid
        os.kill(pid, signal.SIGKILL)
        self.hang_up()
        lab.wait_for_exit(pid)
        self.paths.remove()


@pytest.fixture
def secret_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auth.load_or_create_secret(tmp_path / "secret")
    monkeypatch.setenv("MNEMO_SECRET_FILE", str(tmp_path / "secret"))


@contextlib.contextmanager
def group_of(
    number: int,
    parities: int,
    directory: Path,
    *,
    groups: int = 1,
    rates: dict[int, float] | None = None,
) -> Iterator[list[Smp]]:
    """Nodes dealt out to groups; ``rates`` are most bytes a second that a node sends, by node."""
    names = [f"node{i}" for i in range(number)]
    dealt = tuple(tuple(names[first::groups]) for first in range(groups))
    with contextlib.ExitStack() as stack:
        addresses = {name: ("127.0.0.1", stack.enter_context(held_port())) for name in names}
        smps = []
        for i, name in enumerate(names):
            known = {n: addresses[n] for n in {names[0], *dealt[i % groups]}}
            rate = (rates or {}).get(i)
            settings = m.ProtectSettings(name, dealt, parities, known, rate)
            smps.append(Smp(directory, settings))
        try:
            yield smps
        finally:
            for smp in smps:
                smp.hang_up()
                lab.end(smp.paths)


def all_join(smps: list[Smp]) -> None:
    """Each as `mnemo.session` has it: all join, then what was lost comes back."""
    for smp in smps:
        smp.join()
    for smp in smps:
        assert smp.recall().unreachable == ()
    for smp in smps:
        for rank in smp.ranks:
            newest = rank.newest()
            rank.client.tell(m.Resume(-1 if newest is None else newest[0]))


def all_protect(smps: list[Smp], step: int) -> None:
    """Wait until a step is protected."""
    wait_for(smps, "step", step)


def wait_for(smps: list[Smp], key: str, value: object) -> None:
    """Wait until all of ``smps`` say so in their status."""
    deadline = time.monotonic() + PATIENCE_S
    while not all(smp.status()[key] == value for smp in smps):
        assert time.monotonic() < deadline, [smp.status() for smp in smps]
        time.sleep(0.02)


@pytest.mark.usefixtures("secret_file")
@pytest.mark.parametrize(("number", "parities"), [(4, 1), (4, 2)])
def test_lost_nodes_come_back_with_what_their_ranks_had_committed(
    number: int, parities: int, tmp_path: Path, seed: int
) -> None:
    with group_of(number, parities, tmp_path) as smps:
        all_join(smps)
        for tick in (1, 2, 3):
            for smp in smps:
                smp.write(tick)
            all_protect(smps, 10 * tick)
        assert {len(smp.ranks[0].fit()["segments"]) for smp in smps} <= {4, 6}

        lost = random.Random(seed).sample(smps, parities)
        for smp in lost:
            smp.kill()
        all_join(lost)
        for smp in lost:
            for rank in smp.ranks:
                assert rank.newest() == (3, {i: lab.content(i, 3) for i in range(RANKS)})
            assert smp.status()["step"] == 30

        for tick in (4, 5, 6):  # all is as before
            for smp in smps:
                smp.write(tick)
            all_protect(smps, 10 * tick)


@pytest.mark.usefixtures("secret_file")
@pytest.mark.parametrize(
    ("lost", "kept"), [((0, 1), [1, 2]), ((2, 3), [1])], ids=["leader lost", "leader left"]
)
def test_groups_out_of_step_come_back_with_the_same(
    lost: tuple[int, int], kept: list[int], tmp_path: Path
) -> None:
    """One group has the next generation whole, the other does not when one is lost of each.

    A leader that is left gives up what is not whole everywhere.
    """
    slow = {1: 1e6, 3: 1e6}
    with group_of(4, 1, tmp_path, groups=2, rates=slow) as smps:
        all_join(smps)
        for tick in (1, 2):
            for smp in smps:
                smp.write(tick)
            if tick == 1:
                all_protect(smps, 10)
        wait_for(smps[0::2], "kept", [1, 2])
        wait_for(smps[1::2], "kept", [1])
        assert {smp.status()["step"] for smp in smps} == {10}

        for number in lost:
            smps[number].kill()
        left = [smp for number, smp in enumerate(smps) if number not in lost]
        wait_for(left[:1], "kept", kept)
        for number in lost:
            smps[number].join()
        for number, common in zip(lost, (kept, [1]), strict=True):
            assert smps[number].recall().kept
            assert smps[number].status()["kept"] == common
            for rank in smps[number].ranks:
                assert rank.newest(below=2) == (1, {i: lab.content(i, 1) for i in range(RANKS)})

        for smp in smps:
            for rank in smp.ranks:
                rank.client.tell(m.Resume(1))
        for smp in smps:
            smp.write(2)
        all_protect(smps, 20)
        assert [smp.status()["kept"] for smp in smps] == [[2]] * 4


@pytest.mark.usefixtures("secret_file")
def test_training_that_went_back_is_protected_anew(tmp_path: Path) -> None:
    with group_of(3, 1, tmp_path) as smps:
        all_join(smps)
        for tick in (1, 2):
            for smp in smps:
                smp.write(tick)
            all_protect(smps, 10 * tick)
        for smp in smps:
            for rank in smp.ranks:
                rank.client.tell(m.Resume(1))
        all_protect(smps, 10)
        for smp in smps:
            smp.write(2)
        all_protect(smps, 20)


@pytest.mark.usefixtures("secret_file")
@pytest.mark.parametrize("position", [0, 2])
def test_a_snapshot_process_that_dies_alone_takes_part_again(position: int, tmp_path: Path) -> None:
    """Its segments come back from its ranks, so nothing is rebuilt; its parities are made anew."""
    with group_of(3, 1, tmp_path) as smps:
        all_join(smps)
        for smp in smps:
            smp.write(1)
        all_protect(smps, 10)
        smps[position].replace_process()
        assert smps[position].status()["to_rebuild"] == 0
        for tick in (2, 3):
            for smp in smps:
                smp.write(tick)
            all_protect(smps, 10 * tick)
        smps[1].kill()
        all_join(smps[1:2])
        assert smps[1].ranks[0].newest() == (3, {i: lab.content(i, 3) for i in range(RANKS)})


@pytest.mark.usefixtures("secret_file")
def test_what_does_not_fit_where_it_comes_back_voids_nothing(tmp_path: Path) -> None:
    """Where there is room it comes back, in the same process."""
    size = 16 << 20
    with memory_group(40 << 20) as memory, group_of(3, 1, tmp_path) as smps:
        all_join(smps)
        for smp in smps:
            smp.write(1, size)
        all_protect(smps, 10)
        smps[1].kill()
        smps[1].join()
        pid = smps[1].ranks[0].client.pid
        (memory / "cgroup.procs").write_text(str(pid))
        for _ in range(2):
            found = smps[1].recall()
            assert re.fullmatch(
                r"\d+ bytes for lost segments do not fit: the container has \d+ of 41943040 left",
                found.failure,
            )
            assert (found.kept, found.lost, found.unreachable) == (False, False, ())
        assert lab.memory_of(pid) < 20 << 20, "parities at most"
        assert {smps[i].status()["step"] for i in (0, 2)} == {10}
        (memory / "memory.limit_in_bytes").write_text(str(400 << 20))
        assert smps[1].recall().kept
        expected = {i: lab.content(i, 1, size) for i in range(RANKS)}
        assert smps[1].ranks[0].newest() == (1, expected)
        smps[1].kill()


NOISE = {
    "nothing": b"",
    "garbage": bytes(range(256)) * 8,
    "a truncated frame": b"mnmo\1\0\1\0\x40\0\0\0" + bytes(8) + b"\x81",
    "an oversized frame": b"mnmo\1\0\1\0\xff\xff\xff\xff" + b"\xff" * 8,
    "no handshake": b"mnmo\1\0\2\0\1\0\0\0" + bytes(8) + b"\xc0" + bytes(32),
}


@pytest.mark.usefixtures("secret_file")
def test_strangers_cost_a_snapshot_process_nothing(tmp_path: Path) -> None:
    with group_of(3, 1, tmp_path) as smps, contextlib.ExitStack() as stack:
        all_join(smps)
        pids = [smp.ranks[0].client.pid for smp in smps]
        for tick in (1, 2, 3):
            for smp in smps:
                smp.write(tick)
            for smp in smps:
                for noise in NOISE.values():
                    stranger = stack.enter_context(socket.create_connection(smp.address))
                    stranger.sendall(noise)
            all_protect(smps, 10 * tick)
        assert [smp.ranks[0].client.pid for smp in smps] == pids
        assert all(smp.status()["failure"] == "" for smp in smps)


@pytest.mark.usefixtures("secret_file")
def test_a_training_that_ends_well_leaves_nothing(tmp_path: Path) -> None:
    with group_of(3, 1, tmp_path) as smps:
        all_join(smps)
        for smp in smps:
            smp.write(1)
        all_protect(smps, 10)
        pids = [smp.ranks[0].client.pid for smp in smps]
        for smp in smps:
            for rank in smp.ranks:
                rank.client.tell(m.Leave(finished=True))
            smp.hang_up()
        for pid in pids:
            lab.wait_for_exit(pid)


def test_without_settings_nothing_listens() -> None:
    with lab.run_directory() as paths:
        rank = lab.Rank.join(paths)
        rank.write(1)
        assert rank.fit()["protect"] is None
        assert psutil.Process(rank.client.pid).net_connections("inet") == []
        rank.close()
