"""The nodes of a run, as `protect.nodes` wants them: who listens where, who protects whom."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from mnemo.config import ResolvedConfig
from mnemo.config.kinds import parse_code
from mnemo.erasure.stripes import Group, make_groups
from mnemo.errors import ConfigError, IdentityError, MnemoError, ProtectionError, SmpError
from mnemo.recovery import control
from mnemo.session import report
from mnemo.session.agreement import or_none
from mnemo.session.place import Place
from mnemo.smp import lifecycle
from mnemo.smp import messages as m
from mnemo.smp.link import Link
from mnemo.smp.paths import RunPaths

_DYING_S: Final = 30.0
"""How long a lost rank may take to be gone altogether, with all its memory."""


class Node(msgspec.Struct, frozen=True):
    """What a node tells the others: where it listens, and what it fails together with."""

    host: str
    port: int
    domain: str


_decode: Final = msgspec.msgpack.Decoder(Node).decode


@dataclass(frozen=True)
class Protection:
    """One node's part in the protection of a run."""

    settings: m.ProtectSettings
    group: Group

    @property
    def parity_share(self) -> float:
        """What a node keeps for others, over the size of one generation of its own: two sets."""
        parities = self.group.parities
        return 2 * parities / (len(self.group.nodes) - parities)

    def __str__(self) -> str:
        parities = self.group.parities
        sizes = " or ".join(map(str, sorted({len(nodes) for nodes in self.settings.groups})))
        many = "one" if parities == 1 else f"any {parities}"
        each = "each group of " if len(self.settings.groups) > 1 else ""
        return f"{many} of {each}{sizes} nodes"


@dataclass(frozen=True)
class Recall:
    """What came of bringing back what lost nodes had."""

    reachable: bool
    """All nodes of a group can connect to each other."""
    lost: bool
    """More of them were lost than their parities make up for."""


def protection_of(config: ResolvedConfig, place: Place, paths: RunPaths) -> Protection | None:
    """Divide the nodes into groups, and have this one's snapshot process listen. Collective.

    Returns:
        None where there is but one node, or protection is off.

    Raises:
        ConfigError: There are several nodes and `protect.nodes` is not set, or they have no secret
            in common, or this node cannot be reached as `network` says.
        IdentityError: The ranks are given to the nodes in another order than before.
        SmpError: A node has no snapshot process. Each of them on all ranks.
    """
    count = len(place.leaders)
    if not config.protect.nodes:
        if count > 1:
            raise ConfigError(
                f"{place.world_size} ranks on {count} nodes: give protect.nodes, such as "
                f"{max(1, count - 1)}+1, so that what a lost node had can come back (ranks count "
                "as on one node where they share machine and run.dir, which TMPDIR may change)"
            )
        return None
    data, parities = parse_code(config.protect.nodes)
    if count == 1:
        if place.rank == 0:
            report.say(
                f"protect.nodes is {config.protect.nodes}, and there is one node: nothing protects "
                "against its loss"
            )
        return None
    nodes = _exchange(config, place, paths)
    grouping = make_groups(
        {name: node.domain for name, node in nodes.items()}, size=data + parities, parities=parities
    )
    if place.rank == 0:
        for line in grouping.degraded:
            report.say(line)
    me = m.node_name(place.node)
    group = grouping.of(me)
    assert group is not None  # there are at least two nodes
    groups = tuple(each.nodes for each in grouping.groups)
    reached = {*group.nodes, groups[0][0]}
    addresses = {name: (nodes[name].host, nodes[name].port) for name in sorted(reached)}
    settings = m.ProtectSettings(me, groups, group.parities, addresses, config.protect.rate)
    return Protection(settings, group)


def _exchange(config: ResolvedConfig, place: Place, paths: RunPaths) -> dict[str, Node]:
    """What all nodes tell, by name.

    Raises:
        ConfigError, IdentityError, SmpError: On all ranks: one of them cannot take part.
    """
    with or_none(place, ConfigError, IdentityError, SmpError):
        mine = _listen(config, place, paths)
    told = place.gather(msgspec.msgpack.encode(mine))
    return {m.node_name(i): _decode(told[leader]) for i, leader in enumerate(place.leaders)}


def _listen(config: ResolvedConfig, place: Place, paths: RunPaths) -> Node:
    """Have this node's snapshot process listen, if this is the node's first rank.

    See `protection_of` for what it raises.
    """
    if not os.environ.get("MNEMO_SECRET_FILE"):
        raise ConfigError(
            f"protect.nodes is {config.protect.nodes}, and the {len(place.leaders)} nodes need the "
            "same secret: set MNEMO_SECRET_FILE on all of them to a file that you made with "
            "'(umask 077; head -c 32 /dev/urandom > FILE)'"
        )
    with lifecycle.ensure(paths) as client:
        if place.local_rank:  # the first rank's settings count
            return Node("", 0, config.protect.domain)
        network = config.network
        request = m.Listen(m.node_name(place.node), network.interface, network.ports)
        at, _ = client.ask(request, m.Listening)
    return Node(at.host, at.port, config.protect.domain)


def take_places(
    paths: RunPaths, place: Place, join: m.Join, on_loss: Callable[[str], None]
) -> Link:
    """This rank's place at its snapshot process, once all ranks have theirs. Collective.

    Args:
        paths: The run's files.
        place: Where this process stands.
        join: Who it is.
        on_loss: See `Link`.

    Raises:
        IdentityError: Some rank's place is taken, or the launch has another shape.
        SmpError: Some rank has no snapshot process. Each of them on all ranks.
    """
    link: Link | None = None
    try:
        with or_none(place, IdentityError, SmpError):
            patience_s = 0.0 if control.joins() is None else _DYING_S
            link = Link(paths, join, on_loss, patience_s=patience_s)
    except MnemoError:
        if link is not None:
            link.leave(finished=False)
        raise
    assert link is not None
    return link


def recall(link: Link, place: Place, *, give_up: bool) -> Recall:
    """Have what a lost node had brought back, and say which nodes cannot be reached. Collective.

    Returns when all nodes have what can be had.

    Args:
        link: To this node's snapshot process.
        place: Where this process stands.
        give_up: The run begins anew whatever is there.

    Raises:
        ProtectionError: A node has something, and what another one had cannot come back now, but
            perhaps later: to begin anew would void the state of all.
    """
    place.agree(0)  # all ranks have joined: whoever does not answer now is lost
    mine: m.Recalled | None = None
    if place.local_rank == 0:
        with _progress() as progress:
            words = f"rank {place.rank}: what this node had comes back"
            bar = progress.add_task(words, visible=False)
            while mine is None or not mine.over:
                mine, _ = link.ask(m.Recall(), m.Recalled)
                if mine.total:
                    progress.update(bar, completed=mine.done, total=mine.total, visible=True)
                    progress.refresh()
    told = place.gather(msgspec.msgpack.encode(mine or m.Recalled(over=True)))
    answers = [msgspec.msgpack.decode(answer, type=m.Recalled) for answer in told]
    anything = any(answer.kept for answer in answers)
    failures = {rank: answer for rank, answer in enumerate(answers) if answer.failure}
    unreachable = [line for answer in answers for line in answer.unreachable]
    if place.rank == 0:
        for line in unreachable:
            report.say(line)
        for rank, answer in failures.items():
            if answer.lost:
                report.say(f"what the node of rank {rank} had does not come back: {answer.failure}")
    for rank, answer in failures.items():
        if anything and not answer.lost and not give_up:
            link.leave(finished=False)
            why, when = answer.failure, "when that is mended"
            if answer.unreachable:
                why, when = answer.unreachable[0], "when all nodes can reach each other"
            raise ProtectionError(
                f"what the node of rank {rank} had cannot come back now: {why}. Other nodes keep "
                f"their state: start again with the settings that it was begun with, {when}; or "
                "set run.resume=never to give it up"
            )
    return Recall(not unreachable, any(answer.lost for answer in failures.values()))


def _progress() -> Progress:
    """On a terminal only: it would fill a log."""
    return Progress(
        "{task.description}",
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
