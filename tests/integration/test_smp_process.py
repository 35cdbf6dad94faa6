"""The snapshot process for real: started, shared, asked, left, told to end."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import smp_lab
from smp_lab import Rank, content, run_directory

from mnemo.errors import (
    HostMemoryError,
    IdentityError,
    ProtocolError,
    RunInUseError,
    SmpError,
)
from mnemo.smp import lifecycle, segment
from mnemo.smp import messages as m
from mnemo.smp.client import SmpClient
from mnemo.smp.link import Link
from mnemo.smp.paths import RunPaths
from mnemo.smp.segment import CHUNK
from mnemo.storage import CheckpointStore
from mnemo.transport import auth, local

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def paths() -> Iterator[RunPaths]:
    with run_directory() as found:
        yield found


def wait_until(what: str, met: object, timeout_s: float = 10.0) -> None:
    """Wait until ``met()``, of another process, which announces nothing."""
    deadline = time.monotonic() + timeout_s
    while not met():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.01)


# --- start, find, end -----------------------------------------------------------------------------

START = """
import sys
from mnemo.smp import lifecycle
from mnemo.smp.paths import RunPaths
from pathlib import Path

client = lifecycle.ensure(RunPaths(Path(sys.argv[1])))
print(client.pid, flush=True)
sys.stdin.read()
client.close()
"""


def test_of_eight_that_start_it_at_once_one_lives(paths: RunPaths) -> None:
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", START, str(paths.directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]
    pids = {int(s.stdout.readline()) for s in starters}  # type: ignore[union-attr]
    for starter in starters:
        starter.communicate(timeout=30)
    assert len(pids) == 1
    words = str(paths.directory).encode()

    def serving() -> set[int]:
        found = set()
        for process in psutil.process_iter(["pid"]):
            try:
                line = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            except OSError:
                continue
            if b"mnemo.smp\0" in line and words in line:
                found.add(process.pid)
        return found

    wait_until("the others ended", lambda: serving() == pids)


def test_it_belongs_to_nobody_and_knows_no_torch(paths: RunPaths) -> None:
    with lifecycle.ensure(paths) as client:
        process = psutil.Process(client.pid)
        assert os.getsid(client.pid) == os.getpgid(client.pid) == client.pid
        assert process.ppid() != os.getpid()
        assert "libtorch" not in Path(f"/proc/{client.pid}/maps").read_text()
        assert process.cwd() == "/"
    assert paths.directory.stat().st_mode & 0o777 == 0o700
    assert paths.secret.stat().st_mode & 0o777 == 0o600


def test_a_normal_end_leaves_nothing(paths: RunPaths) -> None:
    ranks = [Rank.join(paths, r, 2) for r in range(2)]
    for rank in ranks:
        rank.write(1)
    for rank in ranks:
        rank.client.tell(m.Leave(finished=True))
        rank.close()
    smp_lab.wait_for_exit(ranks[0].client.pid)
    assert not paths.directory.exists()


def test_a_finished_training_is_kept_until_its_program_is_over(paths: RunPaths) -> None:
    """One buffer a rank; a rank that dies in the last part can be started again."""
    ranks = [Rank.join(paths, r, 2) for r in range(2)]
    for rank in ranks:
        rank.write(1)
        rank.write(2)
        rank.client.tell(m.Finish())
    status = ranks[0].fit()
    assert status["finished"]
    assert [(s["rank"], s["tick"]) for s in status["segments"]] == [(0, 2), (1, 2)]
    with pytest.raises(RunInUseError, match="which is alive"):
        Rank.join(paths, 0, 2)
    ranks[0].client.tell(m.Over())
    for rank in ranks:
        rank.close()  # the second one died
    ranks = [Rank.join(paths, r, 2) for r in range(2)]
    assert ranks[0].newest() == (2, {0: content(0, 2), 1: content(1, 2)})
    assert not ranks[0].fit()["finished"]
    for rank in ranks:
        rank.write(3)
        rank.client.tell(m.Finish())
    for rank in ranks:
        rank.client.tell(m.Over())
        rank.close()
    smp_lab.wait_for_exit(ranks[0].client.pid)
    assert not paths.directory.exists()


def test_where_a_launcher_attends_its_word_counts(paths: RunPaths) -> None:
    with lifecycle.ensure(paths) as launcher:
        launcher.tell(m.Attend())
        going_on, rank = Rank.join(paths, fit=0), Rank.join(paths, fit=1)
        for each in (going_on, rank):
            each.write(1)
        going_on.close()
        rank.client.tell(m.Finish())
        rank.client.tell(m.Over())
        rank.close()
        wait_until("it is gone", lambda: not launcher.status()["fits"][1]["connected"])
        assert [bool(fit["committed"]) for fit in launcher.status()["fits"]] == [True, True]
        launcher.tell(m.Over())
        fits = launcher.status()["fits"]
        assert [bool(fit["committed"]) for fit in fits] == [True, False]  # one never finished
        assert fits[1]["memory"] == 0


def test_an_end_that_may_be_resumed_keeps_the_generation(paths: RunPaths) -> None:
    rank = Rank.join(paths)
    rank.write(1)
    rank.client.tell(m.Leave(finished=False))
    rank.close()
    again = Rank.join(paths)
    assert again.newest() == (1, {0: content(0, 1)})
    again.close()


def test_nobody_comes_back(paths: RunPaths) -> None:
    rank = Rank.join(paths, keep_alive_s=0.3)
    rank.write(1)
    pid = rank.client.pid
    rank.close()
    smp_lab.wait_for_exit(pid, 10.0)
    assert not paths.directory.exists()


def test_back_to_back_runs_of_one_id_never_meet_the_ending_one(paths: RunPaths) -> None:
    """A new run starts at every instant of the end of the one before."""
    for delay in (0.0, 1.0, 1.01, 1.03, 1.06):
        rank = Rank.join(paths)
        rank.write(1)
        rank.client.tell(m.Leave(finished=True))
        rank.close()
        time.sleep(delay)  # the instant is the point
        after = Rank.join(paths)
        assert after.newest() is None
        after.close()


def test_several_trainings_of_one_process(paths: RunPaths) -> None:
    first = Rank.join(paths, fit=0)
    first.write(1)
    second = Rank.join(paths, fit=1)
    assert second.newest() is None
    second.write(5)
    assert first.newest() == (1, {0: content(0, 1)})
    first.client.tell(m.Leave(finished=True))
    assert second.newest() == (5, {0: content(0, 5)})
    first.close()
    second.close()


def test_tools_find_it_and_start_none(paths: RunPaths) -> None:
    assert lifecycle.find(paths) is None
    assert not paths.directory.exists()
    rank = Rank.join(paths)
    rank.write(3)
    with smp_lab.connect(paths) as tool:
        fetched, fds = tool.ask(m.Fetch(0, fit=0), m.Fetched)
        assert fetched.generation == m.Generation(3, 30)
        for tick in range(4, 9):  # it stays as it is, for as long as the tool looks at it
            rank.write(tick)
        assert smp_lab.read_bulk(fds[0]) == content(0, 3)
        local.close_all(fds)
        assert len(rank.fit()["segments"]) == 3
        assert tool.ask(m.Fetch(0, fit=7), m.Fetched)[0].generation is None
        with pytest.raises(ProtocolError, match="before Join"):
            tool.ask(m.Fetch(), m.Fetched)
    wait_until("the third buffer is given back", lambda: len(rank.fit()["segments"]) == 2)
    rank.close()


def test_shutdown(paths: RunPaths) -> None:
    rank = Rank.join(paths)
    rank.write(1)
    with smp_lab.connect(paths) as tool:
        with pytest.raises(RunInUseError, match=rf"is training \(process {os.getpid()}\)"):
            tool.tell(m.Shutdown())
        rank.close()
        wait_until("the rank is gone", lambda: not tool.status()["fits"][0]["connected"])
        tool.tell(m.Shutdown())
        tool.wait_for_end()
    assert not paths.directory.exists()


def test_rollback(paths: RunPaths) -> None:
    rank = Rank.join(paths)
    rank.write(1)
    rank.write(2)
    with smp_lab.connect(paths) as tool:
        with pytest.raises(RunInUseError, match="end it first"):
            tool.tell(m.Rollback(10))
        rank.close()
        wait_until("the rank is gone", lambda: not tool.status()["fits"][0]["connected"])
        tool.tell(m.Rollback(10))
    again = Rank.join(paths)
    assert again.newest() == (1, {0: content(0, 1)})
    again.close()


# --- who may have it ------------------------------------------------------------------------------


def test_two_jobs_on_one_run_id(paths: RunPaths) -> None:
    mine = Rank.join(paths)
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path; from smp_lab import Rank; from mnemo.smp.paths import RunPaths\n"
        "Rank.join(RunPaths(Path(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(paths.directory), str(Path(smp_lab.__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "RunInUseError" in done.stderr
    assert f"its rank 0 is process {os.getpid()}, which is alive" in done.stderr
    mine.write(1)
    mine.close()


def test_a_launch_of_another_shape_is_refused(paths: RunPaths) -> None:
    ranks = [Rank.join(paths, r, 2) for r in (0, 1)]
    for rank, members in ((2, 3), (7, 2)):
        with pytest.raises(IdentityError, match=r"has 2 ranks on this node \(0, 1\)"):
            Rank.join(paths, rank, members)
    for each in ranks:
        each.close()


@pytest.fixture
def rank(paths: RunPaths) -> Iterator[Rank]:
    """A rank that is served, before and after whatever the test does."""
    joined = Rank.join(paths)
    joined.write(1)
    yield joined
    joined.write(2)
    assert joined.newest() == (2, {0: content(0, 2)})
    joined.close()


def raw(paths: RunPaths) -> socket.socket:
    """An unproved connection."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(10.0)
    sock.connect(str(paths.socket))
    return sock


def test_a_wrong_secret(paths: RunPaths, rank: Rank) -> None:
    with pytest.raises(SmpError, match="the run's secret was not proved"):
        SmpClient.connect(paths, bytes(32))
    assert rank.client.status()["counts"]["refused"] == 1


def test_proofs_are_not_replayed_or_reflected(paths: RunPaths, rank: Rank) -> None:
    secret = auth.load_or_create_secret(paths.secret)
    with raw(paths) as first:
        challenge = m.decode_reply(first.recv(1000))
        assert isinstance(challenge, m.Challenge)
        nonce = auth.new_nonce()
        hello = m.Hello(nonce, auth.proof(secret, "client", nonce, challenge.nonce))
        first.send(m.encode(hello))
        welcome = m.decode_reply(first.recv(1000))
        assert isinstance(welcome, m.Welcome)
    for answer in (
        hello,  # recorded
        m.Hello(nonce, welcome.proof),  # its own, back
        m.Hello(challenge.nonce, welcome.proof),
        m.Hello(b"", b""),
    ):
        with raw(paths) as other:
            other.recv(1000)
            other.send(m.encode(answer))
            refused = m.decode_reply(other.recv(1000))
            assert isinstance(refused, m.Failure)
            assert other.recv(1000) == b""


def test_a_server_without_the_secret_is_not_talked_to(paths: RunPaths) -> None:
    """Whoever took the socket's place gets no request, and no descriptor."""
    paths.make()
    with local.listen(paths.socket) as listener:
        listener.setblocking(True)

        def pretend() -> bytes:
            sock, _ = listener.accept()
            with sock:
                sock.send(m.encode(m.Challenge(auth.new_nonce())))
                sock.recv(1000)
                sock.send(m.encode(m.Welcome(bytes(32), os.getpid())))
                return sock.recv(1000)

        with ThreadPoolExecutor(1) as pool:
            heard = pool.submit(pretend)
            with pytest.raises(SmpError, match="does not hold the run's secret"):
                SmpClient.connect(paths, bytes(range(32)))
            assert heard.result(10) == b""


def test_another_version_is_named(paths: RunPaths) -> None:
    paths.make()
    with local.listen(paths.socket) as listener:
        listener.setblocking(True)

        def pretend() -> None:
            sock, _ = listener.accept()
            sock.send(m.encode(m.Challenge(auth.new_nonce(), protocol=99)))
            sock.close()

        with ThreadPoolExecutor(1) as pool:
            pool.submit(pretend)
            says = f"speaks protocol 99, this mnemo {m.PROTOCOL}: .* kill process"
            with pytest.raises(ProtocolError, match=says):
                lifecycle.ensure(paths)


def test_another_user_is_refused(paths: RunPaths, rank: Rank) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    code = (
        "import os, socket, sys\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "d = os.open(os.path.dirname(sys.argv[1]), os.O_PATH)\n"  # past the 0700 directory
        "os.setgid(65534); os.setuid(65534)\n"
        "s.connect(f'/proc/self/fd/{d}/smp.sock'); print(s.recv(1000)); print(s.recv(1000))"
    )
    command = [sys.executable, "-c", code, str(paths.socket)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "PermissionError" in done.stderr
    paths.directory.chmod(0o711)
    paths.socket.chmod(0o666)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    paths.directory.chmod(0o700)
    assert "uid 65534 is not uid 0 of this run's owner" in done.stdout, done.stderr
    assert done.stdout.splitlines()[1] == "b''"


def test_garbage_is_answered_and_disturbs_nobody(paths: RunPaths, rank: Rank) -> None:
    for junk in (b"\0", b"junk" * 1000, m.encode(m.Status()), m.encode(m.Done())):
        with raw(paths) as sock:
            sock.recv(1000)
            sock.send(junk)
            assert isinstance(m.decode_reply(sock.recv(1000)), m.Failure)
            assert sock.recv(1000) == b""


def proved(paths: RunPaths) -> socket.socket:
    """A proved connection, bare."""
    secret = auth.load_or_create_secret(paths.secret)
    sock = raw(paths)
    challenge = m.decode_reply(sock.recv(1000))
    assert isinstance(challenge, m.Challenge)
    nonce = auth.new_nonce()
    sock.send(m.encode(m.Hello(nonce, auth.proof(secret, "client", nonce, challenge.nonce))))
    assert isinstance(m.decode_reply(sock.recv(1000)), m.Welcome)
    return sock


def test_bad_requests_get_a_typed_answer_and_the_connection_lives(
    paths: RunPaths, rank: Rank
) -> None:
    fd = os.memfd_create("mnemo:none")
    before = len(list(Path(f"/proc/{rank.client.pid}/fd").iterdir()))
    with proved(paths) as sock:
        for request, fds in (
            (b"garbage", [fd]),
            (m.encode(m.Begin(1, 1, 10)), []),
            (m.encode(m.Hello(b"", b"")), []),
            (m.encode(m.Join(1, 0, 1, 1.0)), [fd]),  # no board
            (m.encode(m.Join(0, 0, 1, 1.0)), []),  # taken
        ):
            socket.send_fds(sock, [request], fds)
            assert isinstance(m.decode_reply(sock.recv(1000)), m.Failure)
        sock.send(m.encode(m.Join(1, 0, 1, 60.0)))
        assert isinstance(m.decode_reply(sock.recv(1000)), m.Joined)
        for request, fds in (
            (m.encode(m.Join(1, 1, 2, 60.0)), []),
            (m.encode(m.Adopt((0, 1))), [fd]),
            (m.encode(m.Seal(0, 1)), []),
            (m.encode(m.Begin(1, 1, 2**62)), []),
        ):
            socket.send_fds(sock, [request], fds)
            assert isinstance(m.decode_reply(sock.recv(1000)), m.Failure)
        socket.send_fds(sock, [m.encode(m.Adopt((0,)))], [fd])  # not a segment: passed over
        assert isinstance(m.decode_reply(sock.recv(1000)), m.Done)
        sock.send(m.encode(m.Leave(finished=True)))
        assert isinstance(m.decode_reply(sock.recv(1000)), m.Done)
    os.close(fd)
    wait_until(
        "no descriptor is kept",
        lambda: len(list(Path(f"/proc/{rank.client.pid}/fd").iterdir())) <= before,
    )


def test_oversized_and_overloaded_messages_end_that_connection_only(
    paths: RunPaths, rank: Rank
) -> None:
    with proved(paths) as sock:
        sock.send(b"x" * (local.MAX_MESSAGE + 1))
        assert sock.recv(1000) == b""
    with proved(paths) as sock:
        socket.send_fds(sock, [m.encode(m.Status())], [0] * 200)
        assert sock.recv(1000) == b""
    with proved(paths) as sock:
        socket.send_fds(sock, [b""], [0] * 5)
        assert sock.recv(1000) == b""


def test_a_connection_dropped_at_each_point(paths: RunPaths, rank: Rank) -> None:
    raw(paths).close()
    with raw(paths) as sock:
        sock.recv(1000)
    with raw(paths) as sock:
        sock.recv(1000)
        sock.send(m.encode(m.Hello(b"n" * 16, bytes(32))))
    proved(paths).close()
    for requests in (
        (m.Join(1, 0, 1, 60.0),),
        (m.Join(1, 0, 1, 60.0), m.Begin(1, 1, 1000)),
        (m.Join(1, 0, 1, 60.0), m.Flush(1)),
        (m.Join(1, 0, 1, 60.0), m.Leave(finished=False)),
        (m.Status(),),
    ):
        with proved(paths) as sock:
            for request in requests[:-1]:
                sock.send(m.encode(request))
                sock.recv(1000)
            sock.send(m.encode(requests[-1]))  # and gone before the answer
        wait_until(
            "the seat is free",
            lambda: not any(f["connected"] for f in rank.client.status()["fits"] if f["fit"] == 1),
        )
    assert rank.client.status()["clients"] == 1


# --- waiting for a buffer -------------------------------------------------------------------------


def test_a_rank_that_dies_while_it_waits_frees_its_place(paths: RunPaths) -> None:
    ranks = [Rank.join(paths, r, 2) for r in range(2)]
    for tick in (1, 2):
        ranks[0].write(tick)
    ranks[1].write(1)
    waiting = proved(paths)
    ranks[0].close()
    wait_until("it left", lambda: "0" not in ranks[1].fit()["connected"])
    waiting.send(m.encode(m.Join(0, 0, 2, 60.0)))
    waiting.recv(1000)
    waiting.send(m.encode(m.Begin(3, 30, smp_lab.SIZE)))  # has to wait for rank 1
    wait_until("it is here", lambda: "0" in ranks[1].fit()["connected"])
    waiting.close()
    wait_until("its place is free", lambda: "0" not in ranks[1].fit()["connected"])
    again = Rank.join(paths, 0, 2)
    assert again.newest() == (1, {0: content(0, 1), 1: content(1, 1)})
    again.close()
    ranks[1].close()


def test_one_that_waits_is_woken_by_the_other(paths: RunPaths) -> None:
    ranks = [Rank.join(paths, r, 2) for r in range(2)]
    for rank in ranks:
        rank.write(1)
    ranks[0].write(2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ranks[0].begin, 3)
        ranks[1].client.tell(m.Drop(2))
        granted = waiting.result(30)
    ranks[0].finish(granted, 3)
    assert ranks[1].write(3).committed == m.Generation(3, 30)
    for rank in ranks:
        rank.close()


def test_ranks_that_go_on_as_they_like_are_never_stuck(paths: RunPaths, seed: int) -> None:
    import random

    def train(rank: Rank, rng: random.Random) -> None:
        for tick in range(1, 60):
            what = rng.random()
            if what < 0.1:
                rank.client.tell(m.Drop(tick))
            elif what < 0.2:
                continue
            else:
                granted = rank.begin(tick, 1000 if tick < 30 else 2000)
                if rng.random() < 0.1:
                    rank.client.tell(m.Drop(tick))
                else:
                    rank.finish(granted, tick, 1000 if tick < 30 else 2000)
        rank.client.tell(m.Drop(60))

    ranks = [Rank.join(paths, r, 3) for r in range(3)]
    with ThreadPoolExecutor(3) as pool:
        done = [pool.submit(train, r, random.Random(seed + i)) for i, r in enumerate(ranks)]
        for future in done:
            future.result(60)
    assert ranks[0].client.status()["counts"]["committed"] > 3
    newest = ranks[0].newest()
    assert newest is not None
    assert newest[1] == {r: content(r, newest[0], 2000) for r in range(3)}
    for rank in ranks:
        rank.close()


# --- memory ---------------------------------------------------------------------------------------


def test_a_layout_that_changes_gives_the_old_memory_back(paths: RunPaths) -> None:
    rank = Rank.join(paths)
    sizes = [8 * CHUNK, 8 * CHUNK, 2 * CHUNK, 2 * CHUNK, 2 * CHUNK]
    for tick, size in enumerate(sizes, 1):
        rank.write(tick, size)
    assert rank.fit()["memory"] == 4 * CHUNK
    assert smp_lab.memory_of(rank.client.pid) < 5 * CHUNK
    assert sorted(rank.held) == sorted(s["index"] for s in rank.fit()["segments"])
    rank.close()


def test_buffers_that_do_not_fit_are_refused_with_the_numbers(paths: RunPaths, rank: Rank) -> None:
    with pytest.raises(
        HostMemoryError,
        match=r"2 snapshot buffers of 1048576\.0 GiB for 1 ranks need 2097152\.0 GiB; "
        r"the (host|container) has \d+\.\d GiB of \d+\.\d GiB left\. Shard replicas",
    ):
        rank.client.tell(m.Reserve(2**50, 2))
    rank.client.tell(m.Reserve(1000, 2, 0.5))
    with pytest.raises(
        HostMemoryError, match=r"and parities of 1048576\.0 GiB for other nodes need"
    ):
        rank.client.tell(m.Reserve(2**30, 2, 2.0**20))
    with pytest.raises(HostMemoryError, match=r"1048576\.0 GiB for rank 0 does not fit"):
        rank.begin(9, 2**50)
    rank.client.tell(m.Reserve(1000, 2))
    rank.client.tell(m.Drop(9))


def test_the_containers_limit_is_obeyed(paths: RunPaths) -> None:
    group = Path("/sys/fs/cgroup/memory") / f"mnemo-smp-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(256 << 20))
    except OSError as error:
        pytest.skip(f"no memory cgroup (version 1) can be made here: {error}")
    try:
        rank = Rank.join(paths)
        (group / "cgroup.procs").write_text(str(rank.client.pid))
        with pytest.raises(HostMemoryError, match=r"the container has \d+ MiB of 256 MiB left"):
            rank.client.tell(m.Reserve(150 << 20, 2))
        rank.client.tell(m.Reserve(50 << 20, 2))
        rank.write(1, 50 << 20)
        with pytest.raises(HostMemoryError, match="a snapshot buffer of 230 MiB for rank 0"):
            rank.begin(2, 230 << 20)
        assert rank.newest() == (1, {0: content(0, 1, 50 << 20)})
        rank.close()
        smp_lab.end(paths)
    finally:
        wait_until("the group is empty", lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


# --- persisting -----------------------------------------------------------------------------------


def settings(url: object, every_s: float = 0.0) -> m.PersistSettings:
    return m.PersistSettings(str(url), every_s, 2)


def stored_steps(url: object) -> list[int]:
    return [c.step for c in CheckpointStore(str(url), run_id="lab").checkpoints()]


def test_generations_are_persisted_as_they_were_sealed(paths: RunPaths, tmp_path: Path) -> None:
    ranks = [Rank.join(paths, r, 2, persist=settings(tmp_path)) for r in range(2)]
    for tick in (1, 2, 3):
        for rank in ranks:
            rank.write(tick)
    assert ranks[0].client.ask(m.Flush(0), m.Flushed)[0] == m.Flushed(30)
    store = CheckpointStore(str(tmp_path), run_id="lab")
    newest = store.checkpoints()[0]
    assert (newest.step, newest.meta) == (30, {"tick": 3, "members": 2})
    for r in range(2):
        part = newest.part(f"rank-{r:05d}.seg")
        raw_bytes = bytearray(part.size)
        store.read_into(newest, part.name, raw_bytes)
        header = segment.decode_header(bytes(raw_bytes))
        assert header.step == 30
        bulk = bytes(raw_bytes[segment.PAGE : segment.PAGE + header.bulk_size])
        assert bulk == content(r, 3)
    assert ranks[0].fit()["persist"]["newest_step"] == 30
    for rank in ranks:
        rank.close()


def test_who_asks_for_a_generation_that_is_not_there_hears_why_it_is_not_stored(
    paths: RunPaths, tmp_path: Path
) -> None:
    rank = Rank.join(paths, persist=settings(tmp_path, 3600.0))
    rank.write(1)
    flushed, _ = rank.client.ask(m.Flush(0, 7), m.Flushed)
    assert flushed == m.Flushed(-1, "generation 7 is not kept any more")
    rank.close()


def test_what_is_kept_says_of_which_life_it_is(paths: RunPaths) -> None:
    rank = Rank.join(paths)
    rank.write(1, identity={"life": "f00"})
    rank.write(2)
    looked, _ = rank.client.ask(m.Look(), m.Looked)
    assert (looked.steps, looked.lives) == ({1: 10, 2: 20}, {1: "f00", 2: ""})
    rank.close()


def test_a_flipped_byte_is_not_persisted(paths: RunPaths, tmp_path: Path) -> None:
    rank = Rank.join(paths, persist=settings(tmp_path, 3600.0))
    rank.write(1)
    assert rank.client.ask(m.Flush(0), m.Flushed)[0] == m.Flushed(10)
    granted = rank.begin(2)
    rank.finish(granted, 2)
    os.pwrite(rank.held[granted.index], b"\xff\x00\xff", segment.PAGE + 12345)
    flushed, _ = rank.client.ask(m.Flush(0), m.Flushed)
    assert flushed.step == 10
    assert "chunk 0 of snapshot step 20 is damaged" in flushed.failure
    assert rank.fit()["persist"]["failure"] == flushed.failure
    assert stored_steps(tmp_path) == [10]
    assert rank.client.ask(m.Flush(0, 1), m.Flushed)[0] == m.Flushed(10)
    rank.close()


@pytest.fixture
def silent_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """An object store that takes connections and never answers, until it is closed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "none")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "none")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        yield listener


def test_a_store_that_hangs_blocks_no_snapshot(
    paths: RunPaths, silent_store: socket.socket
) -> None:
    rank = Rank.join(paths, persist=settings("s3://bucket/x"))
    rank.write(1)
    silent_store.settimeout(30)
    connection, _ = silent_store.accept()
    for tick in range(2, 8):
        assert rank.write(tick).committed == m.Generation(tick, tick * 10)
    assert len(rank.fit()["segments"]) == 3
    lent = smp_lab.memory_of(rank.client.pid)
    silent_store.close()
    connection.close()
    wait_until("it is given up", lambda: rank.fit()["persist"]["failure"], 60)
    wait_until("the third is given back", lambda: len(rank.fit()["segments"]) == 2)
    assert smp_lab.memory_of(rank.client.pid) <= lent - smp_lab.SIZE
    assert rank.newest() == (7, {0: content(0, 7)})
    rank.close()


def test_a_store_that_hangs_does_not_keep_the_process(
    paths: RunPaths, silent_store: socket.socket
) -> None:
    rank = Rank.join(paths, persist=settings("s3://bucket/x"))
    rank.write(1)
    silent_store.settimeout(30)
    connection, _ = silent_store.accept()
    begun = time.monotonic()
    rank.client.tell(m.Shutdown(force=True))
    rank.client.wait_for_end()
    assert time.monotonic() - begun < 10
    assert not paths.directory.exists()
    connection.close()
    rank.close()


def test_sigterm_persists_the_newest(paths: RunPaths, tmp_path: Path) -> None:
    rank = Rank.join(paths, persist=settings(tmp_path, 3600.0))
    for tick in (1, 2):
        rank.write(tick)
    os.kill(rank.client.pid, signal.SIGTERM)
    smp_lab.wait_for_exit(rank.client.pid)
    assert stored_steps(tmp_path) == [20]
    assert not paths.directory.exists()
    rank.close()


def test_the_last_generation_of_a_finished_training_is_persisted(
    paths: RunPaths, tmp_path: Path
) -> None:
    rank = Rank.join(paths, persist=settings(tmp_path, 3600.0))
    rank.write(1)
    rank.client.tell(m.Leave(finished=True))
    assert stored_steps(tmp_path) == [10]
    rank.close()


def test_the_next_life_has_its_own_place_for_checkpoints(paths: RunPaths, tmp_path: Path) -> None:
    """What the life before had stored stays where it is."""
    old, new = tmp_path / "old", tmp_path / "new"
    rank = Rank.join(paths, persist=settings(old, 3600.0))
    pid = rank.client.pid
    rank.write(1)
    rank.client.ask(m.Flush(0), m.Flushed)
    rank.close()
    rank = Rank.join(paths, persist=settings(new, 0.0))
    assert (rank.client.pid, rank.fit()["persist"]["newest_step"]) == (pid, -1)
    rank.write(2)
    wait_until("a checkpoint", lambda: rank.fit()["persist"]["newest_step"] == 20)
    assert rank.fit()["persist"]["to"] == str(new)
    rank.close()
    rank = Rank.join(paths)
    assert rank.fit()["persist"] is None
    rank.write(3)
    assert rank.client.ask(m.Flush(0), m.Flushed)[0].step == -1
    rank.close()
    assert (stored_steps(old), stored_steps(new)) == ([10], [20])


def test_what_is_persisted_is_of_the_training_that_goes_on(paths: RunPaths, tmp_path: Path) -> None:
    """After going on from an older generation, the same tick is persisted anew."""
    rank = Rank.join(paths, persist=settings(tmp_path, 3600.0))
    for tick in (1, 2):
        rank.write(tick)
    assert rank.client.ask(m.Flush(0), m.Flushed)[0] == m.Flushed(20)
    rank.client.tell(m.Resume(1))
    assert rank.newest() == (1, {0: content(0, 1)})
    assert rank.client.ask(m.Flush(0), m.Flushed)[0] == m.Flushed(10)
    rank.write(2)
    assert rank.client.ask(m.Flush(0), m.Flushed)[0] == m.Flushed(20)
    rank.close()


def test_a_store_that_fails_is_named_and_training_goes_on(paths: RunPaths, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    rank = Rank.join(paths, persist=settings(tmp_path / "file"))
    for tick in range(1, 6):
        assert rank.write(tick).committed == m.Generation(tick, tick * 10)
    flushed, _ = rank.client.ask(m.Flush(0), m.Flushed)
    assert flushed.step == -1
    assert "Not a directory" in flushed.failure
    assert rank.fit()["persist"]["failure"]
    assert rank.client.status()["counts"]["persist_failed"] >= 1
    rank.close()


# --- where there are no sockets -------------------------------------------------------------------


def test_a_place_that_takes_no_socket(paths: RunPaths, tmp_path: Path) -> None:
    """A mounted file where the socket should be: it can be neither bound nor removed."""
    libc = ctypes.CDLL(None, use_errno=True)
    paths.make()
    paths.socket.touch()
    (tmp_path / "file").touch()
    place = os.fsencode(paths.socket)
    if libc.mount(os.fsencode(tmp_path / "file"), place, None, 4096, None):
        pytest.skip(f"mounting is not allowed here: {os.strerror(ctypes.get_errno())}")
    try:
        rank = Rank.join(paths)
        record = paths.read_record()
        assert record is not None
        elsewhere = Path(record.socket)
        assert elsewhere.parent != paths.directory
        assert elsewhere.parent.stat().st_mode & 0o777 == 0o700
        rank.write(1)
        os.kill(rank.client.pid, signal.SIGKILL)  # its successor clears that place, too
        smp_lab.wait_for_exit(rank.client.pid)
        rank.close()
        again = Rank.join(paths)
        assert not elsewhere.parent.exists()
        again.close()
        assert "no unix sockets in" in paths.log.read_text()
    finally:
        libc.umount(place)


def test_a_long_run_directory() -> None:
    base = Path(os.environ["MNEMO_RUN__DIR"])
    paths = RunPaths.of("lab", base / ("d" * 90) / ("e" * 90))
    assert len(str(paths.socket)) > 107
    try:
        rank = Rank.join(paths)
        rank.write(1)
        assert rank.newest() == (1, {0: content(0, 1)})
        rank.close()
    finally:
        smp_lab.end(paths)
    assert list(base.iterdir()) == []


def test_one_that_cannot_start_says_why(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "START_TIMEOUT_S", 3.0)
    paths.make()
    paths.record.with_suffix(".tmp").mkdir()  # in the way of what it has to write
    try:
        with pytest.raises(SmpError, match=r"(?s)no snapshot process answers.*Is a directory"):
            lifecycle.ensure(paths)
    finally:
        paths.record.with_suffix(".tmp").rmdir()


# --- the trainer's standing connection ------------------------------------------------------------


def test_a_link_that_is_left_gives_everything_back(paths: RunPaths) -> None:
    link = Link(paths, m.Join(0, 0, 1, 60.0))
    assert link.newest is None
    link.board.schedule(5)
    link.leave(finished=True)
    smp_lab.wait_for_exit(link.smp_pid)


def test_a_refusal_is_no_loss(paths: RunPaths) -> None:
    lost: list[str] = []
    link = Link(paths, m.Join(0, 0, 1, 60.0), on_loss=lost.append)
    with pytest.raises(ProtocolError, match="no segment 9"):
        link.ask(m.Seal(9, 9), m.Sealed)
    assert lost == []
    link.leave(finished=True)


def test_a_place_that_a_killed_process_still_has_is_waited_for(paths: RunPaths) -> None:
    """The kernel closes its connection only once it has taken its memory back."""
    holder = Rank.join(paths)
    with pytest.raises(RunInUseError):
        Link(paths, m.Join(0, 0, 1, 60.0))
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(Link, paths, m.Join(0, 0, 1, 60.0), patience_s=60.0)
        assert not wait([waits], timeout=0.2).done
        holder.close()
        waits.result(timeout=60).leave(finished=True)
