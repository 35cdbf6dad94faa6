"""Trainings over several nodes: how they find each other, agree and degrade."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import torch
from commands import mnemo
from nodes_lab import Cluster, until
from ports import held_port

from mnemo.smp.client import SmpClient
from mnemo.types import EXIT_STATE_SAVED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from warm import Zygote


@pytest.fixture
def cluster(zygote: Zygote, tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Makes a cluster of ``nodes`` nodes with one rank each, and settings by variable."""
    numbers = itertools.count()
    with contextlib.ExitStack() as stack:

        def make(nodes: int = 2, *, steps: int = 20, ranks: int = 1, **settings: str) -> Cluster:
            directory = tmp_path / f"cluster-{next(numbers)}"
            made = Cluster(zygote, directory, nodes, ranks, steps, settings)
            stack.callback(made.close)
            return made

        yield make


def lines(said: str) -> str:
    """What mnemo says, without torch's warnings."""
    return "\n".join(line for line in said.splitlines() if "reducer.cpp" not in line)


def only_error(said: str) -> str:
    """The error that all ranks come upon: one of them says it, in one line."""
    found = [line for line in said.splitlines() if "Error: " in line]
    assert len(found) == 1, said
    assert "Traceback" not in said, said
    return found[0]


def unreachable(said: str) -> list[tuple[str, str]]:
    """Numbers of nodes that cannot reach each other, as they are named."""
    return sorted(re.findall(r"mnemo: node node-(\d) cannot reach node-(\d) at \S+: ", said))


def steps_of(store: Path) -> set[int]:
    return {int(checkpoint.name.removeprefix("step-")) for checkpoint in store.glob("step-*")}


def test_several_nodes_want_protection(cluster: Callable[..., Cluster]) -> None:
    made = cluster()
    assert made.codes() == [1, 1]
    assert only_error(made.said[0]).startswith(
        "mnemo: ConfigError: 2 ranks on 2 nodes: give protect.nodes, such as 1+1, so that what a "
        "lost node had can come back"
    )


@pytest.mark.parametrize("without", [(0, 1), (1,)], ids=["on all nodes", "on one"])
def test_they_want_a_secret_in_common(
    cluster: Callable[..., Cluster], without: tuple[int, ...]
) -> None:
    made = cluster(MNEMO_PROTECT__NODES="1+1")
    made.own.update({node: {"MNEMO_SECRET_FILE": ""} for node in without})
    assert made.codes() == [1, 1]
    assert re.match(
        f"mnemo: ConfigError: rank {without[0]}: .* the 2 nodes need the same secret: set "
        "MNEMO_SECRET_FILE on all of them",
        only_error(made.said[0]),
    )


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("MNEMO_NETWORK__INTERFACE", "eth77", "ConfigError: rank 1: .*eth77"),
        ("MNEMO_NETWORK__PORTS", "{taken}", "ConfigError: rank 1: .*{taken}"),
    ],
)
def test_a_node_that_cannot_listen_is_named(
    cluster: Callable[..., Cluster], variable: str, value: str, says: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        made = cluster(MNEMO_PROTECT__NODES="1+1")
        made.own[1] = {variable: value.format(taken=taken)}
        assert made.codes() == [1, 1]
        assert re.search(says.format(taken=taken), only_error(made.said[0]))


def test_the_port_that_was_given_is_listened_at(cluster: Callable[..., Cluster]) -> None:
    made = cluster(steps=400, MNEMO_PROTECT__NODES="1+1", MNEMO_SNAPSHOT__EVERY="1")
    with held_port() as given:
        made.own[1] = {"MNEMO_NETWORK__PORTS": str(given)}
        with made.life():
            until("a protected step", lambda: made.protected_step() > 0)
        assert listening_at(made, 1) == {given}


def listening_at(made: Cluster, node: int) -> set[int]:
    """TCP ports of a node's snapshot process."""
    record = made.paths(node).read_record()
    assert record is not None
    return {
        line.laddr.port
        for line in psutil.Process(record.pid).net_connections("tcp")
        if line.status == psutil.CONN_LISTEN
    }


@pytest.mark.campaign
def test_settings_that_were_changed_are_in_force_at_the_next_start(
    cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    """Although the snapshot processes of the life before go on."""
    old, new = tmp_path / "old", tmp_path / "new"
    made = cluster(
        steps=600,
        MNEMO_PROTECT__NODES="1+1",
        MNEMO_SNAPSHOT__EVERY="1",
        MNEMO_PERSIST__TO=str(old),
        MNEMO_PERSIST__EVERY="100ms",
        MNEMO_PERSIST__KEEP="1000",
    )
    with made.life():
        until("checkpoints", lambda: all(s > 0 for s in made.stored_steps()))
        until("a protected step", lambda: made.protected_step() > 0)
    before, steps = made.steps_done(), {n: steps_of(old / f"cluster.node-{n}") for n in (0, 1)}
    made.settings["MNEMO_PERSIST__TO"] = str(new)
    with held_port() as given:
        made.own[1] = {"MNEMO_NETWORK__PORTS": str(given)}
        with made.life() as ranks:
            until("checkpoints", lambda: all(s > before for s in made.stored_steps()))
            until("a protected step", lambda: made.protected_step() > before)
            assert listening_at(made, 1) == {given}
            for rank in ranks:
                rank.kill()
    for node in (0, 1):
        assert steps_of(old / f"cluster.node-{node}") == steps[node]
        assert min(steps_of(new / f"cluster.node-{node}")) >= before
    made.lose([], [0, 1])
    assert "resumed from storage at step" in made.run()


@pytest.fixture
def other_secret(tmp_path: Path) -> str:
    other = tmp_path / "other"
    other.touch(0o600)
    other.write_bytes(b"x" * 32)
    return str(other)


def test_another_secret_is_named_and_training_goes_on(
    cluster: Callable[..., Cluster], other_secret: str
) -> None:
    made = cluster(MNEMO_PROTECT__NODES="1+1")
    made.own[1] = {"MNEMO_SECRET_FILE": other_secret}
    said = made.run()
    assert re.search(r"mnemo: node node-0 cannot reach node-1 at \S+: not authenticated", said)
    assert re.search(r"mnemo: node node-1 cannot reach node-0 at \S+: not authenticated", said)
    assert "not the loss of the node" in said
    assert "does not come back" not in said


def test_ranks_of_one_node_have_one_secret(
    cluster: Callable[..., Cluster], other_secret: str
) -> None:
    made = cluster(1, ranks=2)
    made.ranks_own[1] = {"MNEMO_SECRET_FILE": other_secret}
    assert made.codes() == [1, 1]
    assert only_error(made.said[0]) == (
        "mnemo: ConfigError: rank 1 has another secret than rank 0: let MNEMO_SECRET_FILE name the "
        "same file on all ranks of a node, or be set on none"
    )
    assert other_secret not in made.said[0]


def test_a_secret_that_one_rank_cannot_read_ends_all(cluster: Callable[..., Cluster]) -> None:
    made = cluster(1, ranks=2)
    made.ranks_own[1] = {"MNEMO_SECRET_FILE": str(made.directory / "nowhere")}
    assert made.codes() == [1, 1]
    assert re.match(
        r"mnemo: SmpError: rank 1: the secret file \S+/nowhere cannot be read: No such file",
        only_error(made.said[0]),
    )


def test_each_pair_of_a_group_that_cannot_reach_each_other_is_named(
    cluster: Callable[..., Cluster], other_secret: str
) -> None:
    """The groups are of nodes 0, 2, 4 and of 1, 3: of the other one, node 0 alone is wanted."""
    made = cluster(5, MNEMO_PROTECT__NODES="1+1")
    made.own[4] = {"MNEMO_SECRET_FILE": other_secret}
    said = made.run()
    assert unreachable(said) == [("0", "4"), ("2", "4"), ("4", "0"), ("4", "2")], said


def test_fewer_nodes_than_asked_for(cluster: Callable[..., Cluster]) -> None:
    said = cluster(MNEMO_PROTECT__NODES="4+2").run()
    assert (
        "mnemo: 2 nodes where groups of 6 were asked for: one group of 2, which survives the loss "
        "of 1\n"
    ) in said
    assert "survives" in said
    assert "the loss of one of 2 nodes · not the loss of 2 of them" in said


def test_one_node_alone(cluster: Callable[..., Cluster]) -> None:
    said = cluster(1, ranks=2, MNEMO_PROTECT__NODES="4+2").run()
    assert "there is one node: nothing protects against its loss" in said


def test_nodes_that_fail_together_are_said(cluster: Callable[..., Cluster]) -> None:
    made = cluster(3, MNEMO_PROTECT__NODES="2+1")
    made.own.update({n: {"MNEMO_PROTECT__DOMAIN": d} for n, d in enumerate(("a", "a", "b"))})
    assert "domain a has 2 nodes of group 0, which survives the loss of 1" in made.run()


def test_snapshots_within_a_budget_are_taken_of_the_same_steps(
    cluster: Callable[..., Cluster],
) -> None:
    made = cluster(ranks=2, steps=400, MNEMO_PROTECT__NODES="1+1", MNEMO_SNAPSHOT__OVERHEAD="20%")
    with made.life() as ranks:
        until("a protected step", lambda: made.protected_step() > 10)
        assert all(rank.running() for rank in ranks), "protected by the end alone"
        made.lose(ranks, [0])
    resumed = re.search(r"resumed from memory at step (\d+)", made.run())
    assert resumed
    assert int(resumed[1]) > 10


def test_lightning_goes_on_with_a_replaced_node(cluster: Callable[..., Cluster]) -> None:
    made = cluster(steps=120, MNEMO_PROTECT__NODES="1+1", TORCHELASTIC_RUN_ID="cluster")
    made.script = "nodes_lightning.py"
    made.settings["MNEMO_SNAPSHOT__EVERY"] = "1"
    with made.life() as ranks:
        until("a protected step", lambda: made.protected_step() > 5)
        made.lose(ranks, [1])
    resumed = re.search(r"resumed from memory at step (\d+)", made.run())
    assert resumed
    assert int(resumed[1]) > 5
    assert sorted(made.losses(0)) == sorted(made.losses(1)) == list(range(1, 121))


def test_sigterm_on_all_nodes_in_a_validation_loses_nothing(
    cluster: Callable[..., Cluster],
) -> None:
    settings = {
        "MNEMO_PROTECT__NODES": "1+1",
        "MNEMO_SNAPSHOT__EVERY": "7",
        "TORCHELASTIC_RUN_ID": "cluster",
    }
    undisturbed, stopped = (cluster(steps=40, **settings) for _ in range(2))
    undisturbed.script = stopped.script = "nodes_lightning.py"
    undisturbed.run()
    stopped.settings["STOP_AT"] = "20"
    assert stopped.codes() == [EXIT_STATE_SAVED] * 2, stopped.said[-1]
    [done] = {max(stopped.losses(rank)) for rank in range(2)}
    assert 20 <= done <= 25, "they agree on the end within some steps"
    assert f"resumed from memory at step {done}, 0 steps lost" in stopped.run()
    assert stopped.outcome() == undisturbed.outcome()


@pytest.mark.parametrize("node", [pytest.param(0, marks=pytest.mark.campaign), 1])
def test_sigterm_on_one_node_stops_all_at_the_same_step(
    cluster: Callable[..., Cluster], node: int
) -> None:
    made = cluster(ranks=2, steps=400, MNEMO_PROTECT__NODES="1+1", MNEMO_SNAPSHOT__EVERY="7")
    with made.life() as ranks:
        until("some steps", lambda: made.steps_done() >= 5)
        os.kill(ranks[2 * node + 1].pid, signal.SIGTERM)
        assert [rank.wait() for rank in ranks] == [EXIT_STATE_SAVED] * 4
    done = {max(made.losses(rank)) for rank in range(4)}
    assert len(done) == 1
    said = made.run()
    assert f"resumed from memory at step {done.pop()}, 0 steps lost" in said


@pytest.mark.campaign
def test_a_hung_snapshot_process_holds_nobody_up_at_the_end(
    cluster: Callable[..., Cluster],
) -> None:
    made = cluster(steps=600, MNEMO_PROTECT__NODES="1+1", MNEMO_SNAPSHOT__EVERY="1")
    made.settings["MNEMO_RECOVER__GRACE"] = "9s"
    with made.life() as ranks:
        until("a protected step", lambda: made.protected_step() > 0)
        record = made.paths(1).read_record()
        assert record is not None
        os.kill(record.pid, signal.SIGSTOP)
        try:
            os.kill(ranks[0].pid, signal.SIGTERM)
            begun = time.monotonic()
            assert [rank.wait() for rank in ranks] == [EXIT_STATE_SAVED] * 2
            assert time.monotonic() - begun < 15
        finally:
            os.kill(record.pid, signal.SIGCONT)
    assert (
        "is saved is not known: rank 1: the snapshot process did not answer within" in made.said[0]
    )
    assert "is saved (" not in made.said[0]
    assert "resumed from memory at step" in made.run()


def test_snapshots_that_a_slow_attempt_leaves_no_buffer_for_are_counted(
    cluster: Callable[..., Cluster],
) -> None:
    made = cluster(steps=3000, MNEMO_PROTECT__NODES="1+1", MNEMO_SNAPSHOT__EVERY="1")
    made.settings["MNEMO_PROTECT__RATE"] = "100kB/s"

    def skipped() -> int:
        with SmpClient.connect(made.paths(0), made.secret) as client:
            counts: dict[str, int] = client.status()["counts"]
        return counts["skipped"]

    with made.life():
        until("a protected step", lambda: made.protected_step() > 0)
        until("some are skipped", lambda: skipped() > 3)
    assert "snapshots are skipped while one is being protected" in made.said[0]


@pytest.mark.campaign
def test_who_keeps_protection_from_going_on_is_named_on_every_node(
    cluster: Callable[..., Cluster],
) -> None:
    made = cluster(3, steps=20_000, MNEMO_PROTECT__NODES="2+1", MNEMO_SNAPSHOT__EVERY="1")

    def failures() -> list[str]:
        told = [made.status(node) for node in (0, 1)]
        return [fit["protect"]["failure"] if fit else "" for fit in told]

    with made.life():
        until("a protected step", lambda: made.protected_step() > 0)
        record = made.paths(2).read_record()
        assert record is not None
        os.kill(record.pid, signal.SIGSTOP)
        try:
            until("both name it", lambda: all("node-2" in words for words in failures()))
        finally:
            os.kill(record.pid, signal.SIGCONT)
        until("it is back", lambda: not any(failures()))


def test_nothing_is_given_up_while_other_nodes_cannot_be_reached(
    cluster: Callable[..., Cluster], other_secret: str
) -> None:
    made = cluster(steps=400, MNEMO_PROTECT__NODES="1+1", MNEMO_SNAPSHOT__EVERY="1")
    with made.life() as ranks:
        until("a protected step", lambda: made.protected_step() > 0)
        made.lose(ranks, [1])
    made.own[1] = {"MNEMO_SECRET_FILE": other_secret}
    assert made.codes() == [1, 1]
    assert re.search(
        r"ProtectionError: what the node of rank 1 had cannot come back now: node node-1 cannot "
        r"reach node-0 at \S+: not authenticated.* start again with the settings that it was "
        r"begun with, when all nodes can reach each other",
        only_error(made.said[1]),
    )
    assert unreachable(made.said[1]) == [("0", "1"), ("1", "0")]
    made.lose([], [1])
    del made.own[1]
    assert "resumed from memory at step" in lines(made.run())


@pytest.mark.parametrize(
    "skews",
    [
        pytest.param((0, -86_400), id="behind", marks=pytest.mark.campaign),
        pytest.param((86_400, 0), id="ahead"),
    ],
)
def test_clocks_that_differ_by_a_day_change_nothing(
    cluster: Callable[..., Cluster], skews: tuple[int, int]
) -> None:
    made = cluster(steps=400, MNEMO_PROTECT__NODES="1+1", MNEMO_SNAPSHOT__EVERY="1")
    made.own.update({node: {"SKEW": str(skew)} for node, skew in enumerate(skews)})
    with made.life() as ranks:
        until("a protected step", lambda: made.protected_step() > 0)
        made.lose(ranks, [1])
    del made.own[0]  # and one that is set right meanwhile
    resumed = re.search(r"resumed from memory at step \d+.*", made.run())
    assert resumed
    assert not re.search(r"-\d", resumed[0]), "a negative time"


@pytest.mark.campaign
def test_another_code_from_one_life_to_the_next(cluster: Callable[..., Cluster]) -> None:
    made = cluster(4, steps=400, MNEMO_PROTECT__NODES="3+1", MNEMO_SNAPSHOT__EVERY="1")
    with made.life() as ranks:
        until("a protected step", lambda: made.protected_step() > 0)
        for rank in ranks:
            rank.kill()
    before = made.steps_done()
    made.settings["MNEMO_PROTECT__NODES"] = "2+2"
    with made.life() as ranks:
        until("a newer protected step", lambda: made.protected_step() > before)
        made.lose(ranks, [1, 2])
    said = lines(made.run())
    assert "resumed from memory at step" in lines(made.said[1])
    assert "resumed from memory at step" in said


@pytest.mark.campaign
def test_another_code_when_a_node_is_lost_gives_nothing_up(cluster: Callable[..., Cluster]) -> None:
    made = cluster(3, steps=400, MNEMO_PROTECT__NODES="2+1", MNEMO_SNAPSHOT__EVERY="1")
    with made.life() as ranks:
        until("a protected step", lambda: made.protected_step() > 0)
        made.lose(ranks, [2])
    made.settings["MNEMO_PROTECT__NODES"] = "1+2"
    assert made.codes() == [1, 1, 1]
    assert "start again with the settings that it was begun with" in made.said[1]
    made.settings["MNEMO_PROTECT__NODES"] = "2+1"
    assert "resumed from memory at step" in lines(made.run())


@pytest.mark.campaign
def test_another_number_of_nodes_is_refused(cluster: Callable[..., Cluster]) -> None:
    made = cluster(3, steps=400, MNEMO_PROTECT__NODES="2+1", MNEMO_SNAPSHOT__EVERY="1")
    with made.life() as ranks:
        until("a protected step", lambda: made.protected_step() > 0)
        for rank in ranks:
            rank.kill()
    made.nodes = 2
    assert made.codes() == [1, 1]
    assert (
        "IdentityError: the snapshot of run cluster is of 3 ranks, this launch has 2"
    ) in only_error(made.said[1])
    made.nodes, made.settings["MNEMO_PROTECT__NODES"] = 4, "1+1"
    assert made.codes() == [1, 1, 1, 1]
    assert "is of 3 ranks, this launch has 4" in made.said[2]
    made.nodes, made.settings["MNEMO_PROTECT__NODES"] = 3, "2+1"
    made.lose([], [3])
    said = made.run()
    assert "resumed from memory at step" in lines(said)
    assert not unreachable(said), "a node of a refused start is not one of the run's"


@pytest.mark.campaign
def test_a_node_that_was_away_voids_nothing(cluster: Callable[..., Cluster]) -> None:
    """A spare took its place, and the others went on with that."""
    made = cluster(3, steps=600, MNEMO_PROTECT__NODES="2+1", MNEMO_SNAPSHOT__EVERY="1")
    with made.life() as ranks:
        until("a protected step", lambda: made.protected_step() > 0)
        for rank in ranks:
            rank.kill()
    before = made.steps_done()
    away = Path(made.home(2)).rename(made.directory / "away")
    with made.life() as ranks:
        until("a newer protected step", lambda: made.protected_step() > before)
        made.lose(ranks, [2])
    away.rename(made.home(2))
    assert made.codes() == [1, 1, 1]
    assert "keep snapshots in memory, but none that all of them have" in made.said[2]
    made.lose([], [2])
    assert "resumed from memory at step" in lines(made.run())


@pytest.mark.parametrize(
    ("variable", "key", "value"),
    [
        ("MNEMO_PROTECT__NODES", "protect.nodes", "1+2"),
        ("MNEMO_RUN__RESUME", "run.resume", "never"),
        ("MNEMO_PERSIST__TO", "persist.to", "/tmp/nowhere"),
        ("MNEMO_SNAPSHOT__EVERY", "snapshot.every", "3"),
    ],
)
def test_other_settings_on_one_node(
    cluster: Callable[..., Cluster], variable: str, key: str, value: str
) -> None:
    made = cluster(3, MNEMO_PROTECT__NODES="2+1")
    made.own[1] = {variable: value}
    assert made.codes() == [1, 1, 1]
    assert f"ConfigError: {key} is " in only_error(made.said[0])
    assert f"on rank 0 and {value} on rank 1: give all ranks the same" in made.said[0]


@pytest.mark.campaign
def test_what_one_rank_comes_upon_is_said_once(cluster: Callable[..., Cluster]) -> None:
    """A rank of the life before that still lives, and another number of ranks on the nodes."""
    made = cluster(3, steps=600, MNEMO_PROTECT__NODES="1+1", MNEMO_SNAPSHOT__EVERY="1")
    with made.life() as ranks:
        until("a protected step", lambda: made.protected_step() > 0)
        os.kill(ranks[1].pid, signal.SIGSTOP)
        for rank in (ranks[0], ranks[2]):
            rank.kill()
        assert made.codes() == [1, 1, 1]
        assert re.search(
            r"mnemo: RunInUseError: rank 1: run cluster is in use: its rank 1 is process \d+",
            only_error(made.said[-1]),
        )
    made.own[1] = {"MNEMO_RUN__DIR": made.home(0)}
    assert made.codes() == [1, 1, 1]
    assert "mnemo: IdentityError: rank " in only_error(made.said[-1])
    del made.own[1]
    assert "resumed from memory at step" in made.run()


@pytest.mark.campaign
def test_another_model_is_said_once(cluster: Callable[..., Cluster]) -> None:
    made = cluster(steps=600, MNEMO_PROTECT__NODES="1+1", MNEMO_SNAPSHOT__EVERY="1")
    with made.life():
        until("a protected step", lambda: made.protected_step() > 0)
    made.settings["WIDTH"] = "128"
    assert made.codes() == [1, 1]
    assert "was taken of another model" in only_error(made.said[-1])
    del made.settings["WIDTH"]
    assert "resumed from memory at step" in made.run()


def test_another_program_on_one_rank_alone_is_said_and_not_exact(
    cluster: Callable[..., Cluster],
) -> None:
    made = cluster(steps=400, MNEMO_PROTECT__NODES="1+1", MNEMO_SNAPSHOT__EVERY="1")
    with made.life() as ranks:
        until("a protected step", lambda: made.protected_step() > 0)
        made.lose(ranks, [1])
    made.own[1] = {"LR": "1e-4"}
    said = lines(made.run())
    assert "resumed although these changed since the snapshot: optimizer on rank 1\n" in said
    assert re.search(
        r"resumed from memory at step \d+, .*, not exact \(changed: optimizer on rank 1\)", said
    )


def test_a_wrong_setting_is_said_in_one_line_by_who_has_it(
    cluster: Callable[..., Cluster],
) -> None:
    """What torch makes of it on the others is torch's."""
    made = cluster(MNEMO_PROTECT__NODES="1+1")
    made.own[1] = {"MNEMO_SNAPSHOT__EVERI": "1"}
    codes = made.codes()
    assert codes[1] == 1
    assert re.search(r"^mnemo: ConfigError: .*everi", made.said[0], re.MULTILINE | re.IGNORECASE)
    assert not re.search(r"^\S*ConfigError", made.said[0], re.MULTILINE), "a traceback's end"


def test_ranks_on_other_nodes_than_before(cluster: Callable[..., Cluster]) -> None:
    made = cluster(steps=400, MNEMO_PROTECT__NODES="1+1", MNEMO_SNAPSHOT__EVERY="1")
    with made.life() as ranks:
        until("a protected step", lambda: made.protected_step() > 0)
        for rank in ranks:
            rank.kill()
    made.own = {0: {"MNEMO_RUN__DIR": made.home(1)}, 1: {"MNEMO_RUN__DIR": made.home(0)}}
    assert made.codes() == [1, 1]
    assert re.search(r"this node was node-1 of run cluster, and is node-0 in this", made.said[1])


def test_more_nodes_lost_than_parities_go_on_from_storage(
    cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    made = cluster(
        3,
        steps=400,
        MNEMO_PROTECT__NODES="2+1",
        MNEMO_SNAPSHOT__EVERY="1",
        MNEMO_PERSIST__TO=str(tmp_path / "store"),
        MNEMO_PERSIST__EVERY="200ms",
        MNEMO_PERSIST__KEEP="100",  # all: on a busy machine a node may skip some
    )
    with made.life() as ranks:
        until("a protected step", lambda: made.protected_step() > 0)
        until("checkpoints", lambda: all(s > 0 for s in made.stored_steps()))
        made.lose(ranks, [0, 2])
    assert "resumed from storage at step" in lines(made.run())

    out, store = tmp_path / "state.pt", str(tmp_path / "store")
    done = mnemo("export", "cluster", str(out), "--from=storage", "--persist-to", store)
    assert (done.code, done.out) == (
        0,
        f"step 400 of cluster, from storage, written to {out}\n",
    ), done.err
    assert torch.load(out, weights_only=False)["position"]["step"] == 400
    done = mnemo("rollback", "cluster", "--to=300", "--yes", "--persist-to", store)
    assert done.code == 0, done.err
    kept = {node: steps_of(tmp_path / "store" / f"cluster.node-{node}") for node in range(3)}
    assert max(set.intersection(*kept.values())) <= 300
    assert max(set.union(*kept.values())) <= 300
