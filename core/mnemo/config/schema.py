"""Every setting of mnemo, with its type, its default and what it accepts.

The dataclasses are an OmegaConf structured config. Inside, durations are seconds, shares are
fractions, and an empty string means "not set". `mnemo.config.load` reads them from a file, the
environment, the command line and arguments.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Final, get_type_hints

from mnemo.config import kinds

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mnemo.config.kinds import Kind

# OmegaConf reads an enumeration by the names of its members: they are spelt as people write them.


class Resume(str, Enum):
    """What a start does with the state that an earlier life of the run left."""

    auto = "auto"
    """Resume where there is something to resume, else start fresh."""
    never = "never"
    """Start fresh."""
    required = "required"
    """Resume, or fail where there is nothing to resume."""


class InProcess(str, Enum):
    """Whether a rank that dies is replaced while the others stay."""

    auto = "auto"
    """Where that can be."""
    off = "off"
    """All ranks restart."""


class Overrun(str, Enum):
    """What happens when a copy is not finished before the next update."""

    wait = "wait"
    """The update waits for the copy."""
    drop = "drop"
    """That snapshot is given up."""


Then = Enum("Then", {"save-and-exit": "save-and-exit", "exit": "exit"}, type=str)
Then.__doc__ = """What the nodes that are left do where nobody takes a lost one's place: they store
what they keep in memory first (`persist.to`), or not. Either way they exit with 75."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Which run this is, and where its small files lie."""

    name: Annotated[str, kinds.NAME] = ""
    """Shown to people; the prefix of generated ids."""
    id: Annotated[str, kinds.NAME] = ""
    """Stable identity of the run. Empty: from the environment, or new at each launch."""
    resume: Annotated[Resume, kinds.choice(Resume)] = Resume.auto
    """Whether a start resumes the state that is there."""
    dir: Annotated[str, kinds.PATH] = ""
    """Parent of the private run directory with socket and lock. Empty: ``/tmp/mnemo-<uid>``."""
    journal: Annotated[str, kinds.NAMED_PATH] = ".mnemo"
    """Directory of the journal and of the log files of ``mnemo run``."""
    seed_samples: Annotated[bool, kinds.SWITCH] = False
    """Seed each sample by epoch and index, which makes random augmentation in loader workers
    exact after a resume."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotConfig:
    """How often and how state is copied to host memory."""

    overhead: Annotated[float, kinds.FRACTION] = 0.01
    """Share of step time that snapshots may add; chooses the frequency."""
    every: Annotated[int | None, kinds.COUNT] = None
    """Fixed frequency in optimizer steps. None: `overhead` chooses."""
    overrun: Annotated[Overrun, kinds.choice(Overrun)] = Overrun.wait
    """What happens when a copy is not finished before the next update."""
    verify: Annotated[bool, kinds.SWITCH] = False
    """Hash what is to be copied beforehand, which notices writes through ``.data`` and stalls the
    step by half a memcpy."""
    shard_replicas: Annotated[bool, kinds.SWITCH] = True
    """Identical replicas on a node each copy one part of the state instead of all of it."""
    keep_alive: Annotated[float, kinds.DURATION] = 3600.0
    """Seconds that the state of a dead run stays in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProtectConfig:
    """Protection against the loss of whole nodes."""

    nodes: Annotated[str, kinds.CODE] = ""
    """Size of the groups that nodes are divided into, as k+m: of k + m nodes, any m may be lost.
    Empty: off."""
    domain: Annotated[str, kinds.LABEL] = ""
    """What this node fails together with, such as its rack: ``${oc.env:RACK}``. The nodes of a
    group are taken from as many domains as there are. Empty: each node fails by itself."""
    rate: Annotated[float | None, kinds.RATE] = None
    """Bytes that a node sends to others, a second. None: 8 MB/s for each of its cores, and as fast
    as it goes where training waits for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PersistConfig:
    """Checkpoints on storage, written in the background."""

    to: Annotated[str, kinds.URL] = ""
    """Path or fsspec URL of the directory of checkpoints. Empty: off."""
    every: Annotated[float, kinds.DURATION] = 600.0
    """Seconds between two checkpoints."""
    keep: Annotated[int, kinds.COUNT] = 3
    """How many of the newest checkpoints stay."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoverConfig:
    """What may be done after a failure."""

    exact_only: Annotated[bool, kinds.SWITCH] = True
    """Only ways of recovery that repeat the undisturbed run bit by bit."""
    grace: Annotated[float, kinds.DURATION] = 30.0
    """Seconds after SIGTERM to save the state and exit with 75."""
    in_process: Annotated[InProcess, kinds.choice(InProcess)] = InProcess.auto
    """Whether a rank that dies is replaced while the others stay, where training can do that."""
    standbys: Annotated[int, kinds.NUMBER] = 1
    """How many processes wait, with everything imported, to take the place of a rank."""
    hang: Annotated[float, kinds.LIMIT] = 0.0
    """Seconds without progress after which a rank that the others wait for counts as hanging, and
    is replaced. 0: follows from what is measured; infinite: off."""
    no_spare: Annotated[float, kinds.WAIT] = 300.0
    """How long the nodes that are left wait for one that takes a lost node's place: `wait 5min`."""
    then: Annotated[Then, kinds.choice(Then)] = Then["save-and-exit"]
    """What they do then: exit with 75, and before that store the newest step that all have or can
    rebuild, if `persist.to` is set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictConfig:
    """Prediction of lost state. Nothing to set in this version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MonitorConfig:
    """Detectors and metrics. Nothing to set in this version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """Traffic between nodes."""

    interface: Annotated[str, kinds.INTERFACE] = ""
    """Network interface, by name or address, that other nodes reach this one by. Empty: the one
    that packets to other networks leave by."""
    ports: Annotated[str, kinds.PORTS] = ""
    """Port to listen at, or a range of which the first free one is taken. Empty: the system
    chooses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MnemoConfig:
    """All settings, by section."""

    run: RunConfig = field(default_factory=RunConfig)
    snapshot: SnapshotConfig = field(default_factory=SnapshotConfig)
    protect: ProtectConfig = field(default_factory=ProtectConfig)
    persist: PersistConfig = field(default_factory=PersistConfig)
    recover: RecoverConfig = field(default_factory=RecoverConfig)
    predict: PredictConfig = field(default_factory=PredictConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)


SECTIONS: Final = tuple(section.name for section in fields(MnemoConfig))

EXCLUSIVE: Final = ("snapshot.every", "snapshot.overhead")
"""Two settings that answer the same question: one source may give only one of them."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of the schema, for those who read, print or list settings.

    Attributes:
        default: The value where nobody sets it; None where there is none.
        kind: How its text is read and written.
    """

    default: Any
    kind: Kind


@functools.cache
def settings() -> Mapping[str, Setting]:
    """List every setting by its dotted key, in the order of the schema."""
    return {
        f"{section}.{name}": Setting(getattr(section_type(), name), hint.__metadata__[0])
        for section, section_type in get_type_hints(MnemoConfig).items()
        for name, hint in get_type_hints(section_type, include_extras=True).items()
    }
