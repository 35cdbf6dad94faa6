"""Every error that mnemo raises, in one tree.

::

    MnemoError
    ├── ConfigError (ValueError)          a setting is unknown or its value is wrong
    ├── MissingExtraError (ImportError)   an optional package is needed and absent
    ├── IdentityError                     which run this is, and whether it may be resumed
    │   ├── RunInUseError                 another live job holds this run's directory
    │   ├── ModelChangedError             the snapshot belongs to another model
    │   └── NothingToResumeError          resume was required and nothing is there
    ├── HostMemoryError (MemoryError)     the snapshot buffers do not fit
    ├── SmpError (ConnectionError)        the snapshot process cannot be reached or refused
    │   └── ProtocolError                 a message that breaks the protocol
    ├── PeerError (ConnectionError)       another node fails or breaks the protocol
    │   ├── PeerLostError                 it cannot be reached, hung up or was reset
    │   ├── PeerTimeoutError (TimeoutError)  it did not go on in time
    │   ├── AuthenticationError           it did not prove the run's secret
    │   └── FrameError                    it sent what is no frame of this protocol
    ├── IntegrityError                    stored bytes are not what was written
    ├── SnapshotError                     a snapshot could not be taken; training goes on
    ├── StorageError (OSError)            the persistent tier failed
    │   └── WriteCancelledError           a checkpoint was given up, as was asked
    ├── ErasureError                      what erasure coding was asked for cannot be done
    │   ├── CodeError (ValueError)        no such code: its id, or k and m out of range
    │   ├── FragmentError (ValueError)    buffers or indexes do not fit the code
    │   ├── TooFewFragmentsError          fewer than k fragments are left
    │   └── EngineError                   the engine asked for is absent or computes wrongly
    ├── ProtectionError                   a generation could not be protected over nodes, or rebuilt
    │   ├── ShardsLostError               more nodes were lost than the parities make up for
    │   └── SalvageError                  what is left when a job ends could not be stored
    ├── MembershipError                   which nodes belong to the run could not be agreed on
    │   ├── StoreLostError (ConnectionError)  a Store did not answer in time
    │   └── MembershipRecordError         a Store holds what this run did not write
    ├── CommError (RuntimeError)          what was asked of a process group cannot be done
    │   ├── GroupBrokenError              a member is gone; no collective of the group ends any more
    │   └── ReplayError                   a lost rank cannot begin again among those that went on
    ├── LaunchError                       ``mnemo run`` cannot start or go on
    │   └── CrashLoopError                the same batch fails again and again
    └── FaultNotFiredError (AssertionError)  an injected fault never happened

A message says what happened, the value, and what to do.
"""

from __future__ import annotations


class MnemoError(Exception):
    """Base of everything that mnemo raises on purpose."""


class ConfigError(MnemoError, ValueError):
    """A setting is unknown, ill-typed or contradicts another."""


class MissingExtraError(MnemoError, ImportError):
    """An optional dependency is needed; the message names the extra that brings it."""


class IdentityError(MnemoError):
    """The run's identity forbids what was asked."""


class RunInUseError(IdentityError):
    """Another live job uses the same run id and run directory."""


class ModelChangedError(IdentityError):
    """The newest snapshot was taken of a model with other tensors."""


class NothingToResumeError(IdentityError):
    """``run.resume: required`` and there is neither a snapshot nor a checkpoint."""


class HostMemoryError(MnemoError, MemoryError):
    """The snapshot buffers do not fit into the host's or the container's memory."""


class SmpError(MnemoError, ConnectionError):
    """The snapshot management process cannot be started, reached, or refused a request."""


class ProtocolError(SmpError):
    """A message between mnemo's processes that breaks the protocol."""


class PeerError(MnemoError, ConnectionError):
    """The connection to another node failed. It alone is closed; another one may be made.

    Args:
        peer: Who is at the other end, as far as that is known.
        why: What happened, without the name.
    """

    def __init__(self, peer: str, why: str) -> None:
        super().__init__(peer, why)
        self.peer = peer
        self.why = why

    def __str__(self) -> str:
        return f"{self.peer}: {self.why}"


class PeerLostError(PeerError):
    """The other node cannot be reached, hung up, or reset the connection."""


class PeerTimeoutError(PeerError, TimeoutError):
    """The other node did not answer or go on in time."""


class AuthenticationError(PeerError):
    """The other node is not the one expected, or did not prove the run's secret."""


class FrameError(PeerError):
    """The other node sent what is no frame of this protocol, is too long, or fails its MAC."""


class IntegrityError(MnemoError):
    """Bytes read back fail their checksum or MAC, or have an unknown format version."""


class SnapshotError(MnemoError):
    """A snapshot could not be taken or completed. Never ends the training."""


class StorageError(MnemoError, OSError):
    """The persistent tier could not be read or written."""


class WriteCancelledError(StorageError):
    """A write was given up because its ``cancel`` event was set; no checkpoint came of it."""


class ErasureError(MnemoError):
    """What erasure coding was asked for cannot be done."""


class CodeError(ErasureError, ValueError):
    """There is no such erasure code: an unknown id, or k and m out of range."""


class FragmentError(ErasureError, ValueError):
    """Buffers or fragment numbers do not fit the code, or each other."""


class TooFewFragmentsError(ErasureError):
    """Fewer than k fragments are left, so what was encoded cannot come back."""


class EngineError(ErasureError):
    """The erasure coding engine asked for is absent, or fails its self-test."""


class ProtectionError(MnemoError):
    """A generation could not be spread over a group of nodes, or not be rebuilt from them."""


class ShardsLostError(ProtectionError):
    """More nodes of a group were lost than its parities make up for."""


class SalvageError(ProtectionError):
    """Nobody takes a lost node's place, and what the others keep could not be stored."""


class MembershipError(MnemoError):
    """Which nodes belong to the run could not be agreed on."""


class StoreLostError(MembershipError, ConnectionError):
    """A Store did not answer in time; what it was asked may or may not happen."""


class MembershipRecordError(MembershipError):
    """A record in the Store was not made with the run's secret, or not for where it stands."""


class CommError(MnemoError, RuntimeError):
    """What was asked of a process group of mnemo's cannot be done."""


class GroupBrokenError(CommError):
    """A member of a process group is gone, or a link to it. Nothing of it ends until it is rebuilt.

    Args:
        group: Its name and ranks.
        why: What happened, as far as this process knows.
    """

    def __init__(self, group: str, why: str) -> None:
        super().__init__(group, why)
        self.group = group
        self.why = why

    def __str__(self) -> str:
        return f"process group {self.group} is broken: {self.why}"

    def again(self) -> GroupBrokenError:
        """The same to be raised once more, without the frames of the last time."""
        return GroupBrokenError(self.group, self.why)


class ReplayError(CommError):
    """Operations cannot be replayed for a rank that begins again at a boundary; says why.

    Nothing is lost by it: what waits goes on waiting, and all ranks may begin again instead.
    """


class LaunchError(MnemoError):
    """``mnemo run`` cannot start the job or cannot go on with it."""


class CrashLoopError(LaunchError):
    """The job died at the same batch too often; the message names the batch.

    Args:
        message: What happened.
        code: The exit code of the rank that did.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class FaultNotFiredError(MnemoError, AssertionError):
    """A declared fault was never triggered, so the test that declared it proves nothing."""
