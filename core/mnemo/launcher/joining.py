"""Makes this node's agent one of a cluster, as flags and settings say."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from mnemo.errors import ConfigError
from mnemo.launcher import rendezvous
from mnemo.launcher.c10d import C10dStores
from mnemo.launcher.cluster import Cluster
from mnemo.launcher.etcd import EtcdStores
from mnemo.launcher.watch import status_of
from mnemo.membership import Member, Rules, Seal
from mnemo.membership.records import KEEPS
from mnemo.smp.paths import RunPaths, default_parent
from mnemo.transport import auth
from mnemo.transport.address import host_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from mnemo.launcher.rendezvous import Nodes
    from mnemo.launcher.stores import AgentStores


def join(
    nodes: Nodes,
    backend: str,
    endpoint: str,
    *,
    run_id: str,
    ranks: int,
    interface: str,
    paths: RunPaths,
    wait_s: float,
    saves: bool,
    say: Callable[[str], None],
) -> Cluster:
    """This node's agent among those of a job.

    Args:
        nodes: How many there are.
        backend: ``--rdzv-backend``.
        endpoint: Where they meet: ``--rdzv-endpoint``.
        run_id: Of the run.
        ranks: Of this node.
        interface: `network.interface`.
        paths: The run's on this node; tell agents on one machine apart.
        wait_s: Seconds to wait for enough nodes.
        saves: Whether what the others keep is stored where they wait in vain.
        say: Tells the user.

    Raises:
        ConfigError: There is no secret, or no such interface, or others cannot reach it.
        LaunchError: The endpoint is none, or another program's.
    """
    file = os.environ.get("MNEMO_SECRET_FILE")
    if not file:
        raise ConfigError(
            f"--nnodes is {nodes}, and the agents of several nodes need the same secret: set "
            "MNEMO_SECRET_FILE on all of them to a file that you made with "
            "'(umask 077; head -c 32 /dev/urandom > FILE)'"
        )
    host = host_of(interface)
    etcd = backend == "etcd"
    places = rendezvous.endpoints(endpoint, rendezvous.PORTS[backend])
    for name in rendezvous.unknown(places):
        say(f"--rdzv-endpoint: the host {name} is not known here; looking for the run elsewhere")
    rendezvous.require_reachable(host, places)
    stores: AgentStores
    if etcd:
        store, stores = "", EtcdStores(run_id)
        places = (",".join(f"http://{place}" for place in places),)
    else:
        places = rendezvous.as_others_see(places, host)
        store, claim = rendezvous.claim_place(run_id, host, places)
        stores = C10dStores(run_id, claim)
    home = paths.directory.parent
    me = Member(
        node=host if home == default_parent() else f"{host} {home}",
        incarnation=secrets.token_hex(8),
        address=host,
        store=store,
        ranks=ranks,
        labels=_labels(paths),
    )
    return Cluster(
        me,
        places,
        nodes,
        rules=Rules(nodes=nodes.count, spares=nodes.spares, give_up_s=wait_s, arbiter=etcd),
        seal=Seal(auth.load_or_create_secret(Path(file)), run_id),
        stores=stores,
        paths=paths,
        saves=saves,
        say=say,
    )


def _labels(paths: RunPaths) -> tuple[str, ...]:
    """What else the others have to know: which ranks' state an earlier launch has left here."""
    kept = [segment["rank"] for fit in status_of(paths) for segment in fit["segments"]]
    return (f"{KEEPS}{min(kept)}",) if kept else ()
