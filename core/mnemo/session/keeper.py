"""One rank's protection: opens the SMP, restores, takes snapshots at step boundaries, ends well.

The adapters and `mnemo.session.Session` stand on this. They say what the state is and when a step
is done; everything else is decided here. Called by the training thread only.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import logging
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch

from mnemo import faults
from mnemo.config import Overrun, ResolvedConfig, Resume
from mnemo.errors import ConfigError, IdentityError, ModelChangedError, ProtectionError, SmpError
from mnemo.recovery.journal import Journal, journal_path
from mnemo.session import afterwards, announce, nodes, replacing, report
from mnemo.session.accord import Accord
from mnemo.session.agreement import (
    of_all_ranks,
    on_all_ranks,
    or_none,
    require_one_secret,
    require_same_models,
    require_same_settings,
)
from mnemo.session.finder import Finder, Restored, persist_settings
from mnemo.session.identity import RunIdentity, describe_changes, launch_of, require_same_model
from mnemo.session.joining import is_joining
from mnemo.session.losses import Losses
from mnemo.session.pace import Pace
from mnemo.session.place import Place
from mnemo.session.replacing import Replicas
from mnemo.session.saved import Saved, ask_what_is_saved
from mnemo.session.sources import NOTHING
from mnemo.smp import messages as m
from mnemo.smp.board import Position
from mnemo.smp.paths import RunPaths
from mnemo.snapshot import tree
from mnemo.snapshot.engine import SnapshotEngine
from mnemo.snapshot.rng import capture_rng
from mnemo.transport import auth

log = logging.getLogger("mnemo")

_PARTING_S: Final = 1.0
"""That, where the program is about to end."""


class End(enum.Enum):
    """How a fit ended, which decides what becomes of its state."""

    FINISHED = enum.auto()
    """Well: the newest snapshot is kept until the program has ended well, too."""
    INTERRUPTED = enum.auto()
    """By an error or a signal: kept for the next start."""
    GIVEN_UP = enum.auto()
    """Nobody wants to resume it: given back at once."""


class Keeper:
    """See the module.

    Its life: `find`, `accept` or `forget`, `begin`, `announce`; then `before_update`, `pass_update`
    and `boundary` at each step; then `close`.
    """

    def __init__(
        self, config: ResolvedConfig, identity: RunIdentity, place: Place, fit: int = 0
    ) -> None:
        """Open or find the SMP.

        Args:
            config: The effective configuration.
            identity: Which run this is; the same on all ranks.
            place: Where this process stands.
            fit: How many trainings this process has begun before.

        Raises:
            ConfigError: Settings are not the same on all ranks, or not fit for several nodes.
            IdentityError: Ranks are on other nodes than before.
            ProtectionError: What a lost node had cannot come back now, but perhaps later.
            SmpError: No SMP can be had.
            RunInUseError: Another live job has this identity.
        """
        self.config = config
        self.identity = identity
        self.place = place
        self.fit = fit
        self.paths = RunPaths.of(identity.run_id, config.run.dir)
        self.journal = Journal(journal_path(config.run.journal, identity.run_id))
        with on_all_ranks(place, ConfigError, IdentityError, SmpError):
            require_same_settings(config, place)
            require_one_secret(place, self.paths.secret)
            self._protection = protection = nodes.protection_of(config, place, self.paths)
        self._recall = nodes.Recall(reachable=False, lost=False)
        node = "" if protection is None else protection.settings.node
        self._persist = persist = persist_settings(config, node)
        join = m.Join(
            fit,
            place.rank,
            place.members,
            config.snapshot.keep_alive,
            persist,
            None if protection is None else protection.settings,
        )
        self._link = nodes.take_places(
            self.paths, place, join, lambda words: self.degraded("smp replaced", words)
        )
        if protection is not None:
            give_up = config.run.resume is Resume.never
            with on_all_ranks(place, ProtectionError):
                self._recall = nodes.recall(self._link, place, give_up=give_up)
        accord = Accord(place, self.degraded) if len(place.leaders) > 1 else None
        self._pace = Pace(
            config.snapshot, place, self._link.board, accord, persist.every_s if persist else None
        )
        afterwards.give_back()
        faults.identify(rank=place.rank, smp_pid=self._link.smp_pid)
        self._secret = auth.load_or_create_secret(self.paths.secret)
        self._launch = launch_of()
        self._life = place.gather(secrets.token_bytes(7))[0].hex()
        self._finder = Finder(
            config, identity, place, self._link, self._secret, persist, fit, self._launch
        )
        self._engine: SnapshotEngine | None = None
        self._replacing, self.why_not_replaced = replacing.begin(place, self._link, fit)
        """What the second says is why a rank that dies is not replaced while the others go on."""
        self._parts: dict[str, tree.Part] = {}
        self._stopping = False
        self._patience_s = 60.0
        """How long the end of the fit waits for the snapshot process, at each thing."""
        self._base = 0
        """Boundaries that count as done before the run was begun anew."""
        self._losses = Losses(self._link, self.degraded)
        self._reached = place.agree(self._link.board.furthest())[1]
        """Newest step that any rank had done when an earlier life ended."""
        self._opened = time.time()
        self._then: dict[str, str] = {}
        self._changes: list[str] = []
        self._failure = ""
        """Why the newest snapshot that could not be taken failed."""

    # --- beginning ----------------------------------------------------------------------------

    def find(self) -> Restored | None:
        """The newest state that every rank can read back whole, or None. Collective.

        Nothing is given up yet: `accept` or `forget` says what becomes of it.

        Raises:
            NothingToResumeError: Resuming is required and there is nothing.
            IdentityError: What is in memory is of another number of ranks, or of nodes that have
                none in common.
        """
        if self._replacing is not None and self.joins:
            return self._replacing.find(self._finder.memory)
        with self.not_repeated(), on_all_ranks(self.place, IdentityError):
            return self._finder.find()

    @property
    def replaces(self) -> bool:
        """Whether a rank that dies can be replaced while the others go on."""
        return self._replacing is not None

    @property
    def joins(self) -> bool:
        """Whether this process takes a lost rank's place, and the others wait for it."""
        return self._replacing is not None and is_joining()

    def not_repeated(self) -> contextlib.AbstractContextManager[None]:
        """Around what such a process does not ask the others for, as it does the rest."""
        return replacing.not_repeated()

    def accept(
        self,
        restored: Restored,
        model: Mapping[str, torch.Tensor],
        prefixes: Sequence[str],
        flexible: Collection[str] = (),
    ) -> None:
        """Training goes on from ``restored``; what was sealed later is void. Collective.

        Args:
            restored: What `find` found.
            model: The model's tensors by name, to be compared with the snapshot's.
            prefixes: What these names are preceded by in the captured state.
            flexible: See `mnemo.session.identity.flexible_names`.

        Raises:
            ModelChangedError: The snapshot belongs to another model; nothing was touched.
        """
        paths = ["state." + prefix for prefix in prefixes]
        run = self.identity.run_id
        # A rank that joins agrees with itself.
        with self.not_repeated(), or_none(self.place, ModelChangedError):
            require_same_model(restored.entries, model, paths, run, restored.step, flexible)
        kept = restored.tick if restored.origin == "memory" or self.joins else NOTHING
        self._link.ask(m.Resume(kept), m.Done)
        self._base = restored.base
        self._pace.begin(restored.tick // 2, anew=not self.joins)
        self._then = restored.fingerprints

    def forget(self) -> None:
        """Start fresh: whatever is in memory is void. Collective.

        Checkpoints of the run that lie on storage stay, but count as older than all that follows.
        """
        self._link.ask(m.Resume(NOTHING), m.Done)
        self._reached = 0
        with self.not_repeated():
            newest = self._finder.newest_stored()
        every = self.config.snapshot.every or 1
        self._base = -(-(newest // 2 + 1) // every) * every
        self._pace.begin(self._base)

    def begin(self, fingerprints: dict[str, str], replicas: Replicas | None = None) -> None:
        """Training starts now: snapshots can be taken from here on. Collective.

        Args:
            fingerprints: Of what should be the same when the run is resumed; what differs from
                the snapshot resumed from is reported.
            replicas: What all ranks hold alike, if they do.

        Raises:
            ConfigError: They have other models.
        """
        if self.place.replicas and replicas is not None and replicas.model is not None:
            with on_all_ranks(self.place, ConfigError):
                require_same_models(self.place, replicas.model)
        world = str(self.place.world_size)
        identity = {**fingerprints, "launch": self._launch, "life": self._life, "world": world}
        self._start_engine(identity)
        if replicas is not None:
            self.why_not_replaced = replicas.why_not or self.why_not_replaced
            if self._replacing is not None:
                self.why_not_replaced = self._replacing.prepare(identity, replicas)
                self._replacing = None if self.why_not_replaced else self._replacing
        slot, board = self.place.local_rank, self._link.board
        board.report(slot, replace(board.position(slot), time=time.time()))  # this life is here too
        if self._then:
            mine = describe_changes(self._then, fingerprints)
            with self.not_repeated():
                self._changes = of_all_ranks(self.place, mine)
        changes = self._changes
        if changes and self._replacing is not None and self.joins:
            self._replacing.refuse(f"the program was changed meanwhile: {', '.join(changes)}")
        if changes and self.place.rank == 0:
            report.say(f"resumed although these changed since the snapshot: {', '.join(changes)}")
            self.journal.write("changed", run=self.identity.run_id, what=changes)

    def announce(self, restored: Restored | None, *, exact: bool = True, note: str = "") -> None:
        """All is restored: the line that every start prints, and the journal's record of it.

        Rank 0 only. A process that takes a lost rank's place becomes one of the ranks here, of
        which `mnemo run` tells.
        """
        if self._replacing is not None and self.joins:
            if not exact:
                self.degraded("not exact", f"rank {self.place.rank} was replaced: {note}")
            self._replacing.join("" if exact else note)
            return
        if self.place.rank != 0:
            return
        announce.unattended(self.paths)
        start = announce.Start(self.config, self.identity, self.fit, self.place.world_size)
        if restored is None:
            found, gone = self._finder, self._recall.lost
            start.fresh(self.journal, damaged=found.damaged, lost=gone, apart=found.apart)
        else:
            lost = max(0, self._reached - restored.step) if self._reached else None
            if self._changes:
                exact, changed = False, f"changed: {', '.join(self._changes)}"
                note = f"{changed}; {note}" if note else changed
            resumed = announce.Resumed(restored.origin, restored.step, lost, exact, note)
            start.resumed(self.journal, resumed, since=self._opened)

    def _start_engine(self, fingerprints: dict[str, str]) -> None:
        self._share = self.place.share(divide=self.config.snapshot.shard_replicas)
        self._engine = SnapshotEngine(
            self._link,
            self._share,
            rank=self.place.rank,
            secret=self._secret,
            identity=fingerprints,
            drop_on_overrun=self.config.snapshot.overrun is Overrun.drop,
            verify=self.config.snapshot.verify,
            on_event=self.degraded,
        )

    def reserve(self, size: int) -> None:
        """Make sure, before training, that the buffers for ``size`` bytes of state will fit.

        Raises:
            HostMemoryError: They will not; the message has the numbers.
        """
        buffers = 3 if self._persist or self._protection else 2
        parities = self._protection.parity_share if self._protection else 0.0
        self._link.ask(m.Reserve(size // self._share.replicas, buffers, parities), m.Done)
        if self.place.rank == 0:
            total = 2 * size // self._share.replicas * self.place.members
            protection = self._protection if self._recall.reachable else None
            announce.room(total, protection, self._finder.beyond_the_node())

    # --- training -----------------------------------------------------------------------------

    def boundary(
        self,
        position: Position,
        state: Callable[[], object],
        *,
        volatile: Callable[[], Collection[int]] = tuple,
        watch: tuple[str, ...] = (),
        loss: torch.Tensor | None = None,
    ) -> None:
        """An optimizer step and all that belongs to it is done: take a snapshot if one is due.

        Args:
            position: Where the run is. Its tick is even at a step's end, odd after what follows
                it (validation); ``tick // 2`` counts the boundaries.
            state: Gives the state, by reference; only called when a snapshot is taken.
            volatile: Gives the ``data_ptr`` of tensors that change before the next update.
            watch: Path prefixes of tensors that must be finite.
            loss: This step's loss. A snapshot is only taken where it is finite, and the one before
                is void if the first loss computed with it was not.
        """
        position = replace(position, tick=position.tick + 2 * self._base)
        self._link.board.report(self.place.local_rank, position)
        number, after = divmod(position.tick, 2)
        if not after:
            self._losses.observe(loss)
            self._pace.reach(number)
            self._stopping = self._stopping or self._pace.stops_at(number)
        due = self._pace.is_due(number) or self._stopping
        listed = functools.cache(lambda: self._list(state))
        if due:
            self._take(position, listed, volatile, watch, loss)
        if self._replacing is not None:
            self._stand_by(self._replacing, position, listed)
        if not after:
            self._pace.leave(number)

    def _list(self, state: Callable[[], object]) -> tree.TakenApart:
        whole = {"rng": capture_rng(), "base": self._base, "state": state()}
        return tree.take_apart(whole, self._parts)

    def _stand_by(
        self,
        replaces: replacing.Replacing,
        position: Position,
        listed: Callable[[], tree.TakenApart],
    ) -> None:
        """Others can go on without this process, and it without them."""
        if self._stopping:
            replaces.withdraw("it was asked to stop")
        try:
            replaces.boundary(position.tick, position.step, listed())
        except Exception as error:
            log.exception("the state of step %d could not be written down", position.step)
            replaces.withdraw(f"its state could not be written down: {error}")
        replaces.mark(position.tick)

    def _take(
        self,
        position: Position,
        listed: Callable[[], tree.TakenApart],
        volatile: Callable[[], Collection[int]],
        watch: tuple[str, ...],
        loss: torch.Tensor | None,
    ) -> None:
        """A snapshot, unless a loss speaks against it; then the next one is due."""
        assert self._engine is not None
        allowed = self._losses.allow(position, loss)
        if not allowed:
            self._engine.counters.suspect += 1
        else:
            with self._never_fatal(position.step):
                self._engine.capture(
                    position.tick,
                    position.step,
                    listed(),
                    {"step": position.step, "epoch": position.epoch, "batch": position.batch},
                    volatile=volatile(),
                    watch=tuple("state." + w for w in watch),
                )
            self._losses.captured(position.tick)
        number, after = divmod(position.tick, 2)
        if not after:
            self._pace.taken(number, self._engine.counters.copy_s, beside=allowed)

    def stepped(self, step: int) -> None:
        """``step`` optimizer steps are done, the newest of which no boundary has followed yet."""
        board, slot = self._link.board, self.place.local_rank
        board.report(slot, replace(board.position(slot), step=step, time=time.time()))

    def request_stop(self) -> None:
        """Ask all ranks to stop after the same step, with a snapshot; safe in signal handlers."""
        self._link.board.request_stop()

    @property
    def stopping(self) -> bool:
        """Whether this boundary is the one to stop at; its snapshot is under way."""
        return self._stopping

    @contextlib.contextmanager
    def _never_fatal(self, step: int) -> Any:
        """A snapshot that fails is an event, not an error of the training."""
        try:
            yield
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
            if words != self._failure:  # the same again at each step needs no traceback
                log.exception("the snapshot of step %d could not be taken", step)
            self._failure = words
            self.degraded("snapshot failed", f"step {step}: {words}")

    def before_update(self) -> float:
        """Parameters are about to change: wait for the copy that is under way. Seconds waited."""
        return self._engine.before_update() if self._engine is not None else 0.0

    def pass_update(self) -> None:
        """All ranks are about to update their parameters: `before_update`, and a barrier of all."""
        self.before_update()
        if self._replacing is not None:
            self._replacing.pass_update()

    def pause(self) -> None:
        """Something that is not a training step runs now: it does not count as step time."""
        self._pace.pause()

    @property
    def counters(self) -> Any:
        """`mnemo.snapshot.job.Counters` of this rank."""
        assert self._engine is not None
        return self._engine.counters

    @property
    def smp_pid(self) -> int:
        """Process id of the snapshot process."""
        return self._link.smp_pid

    def settle(self, timeout_s: float = 60.0) -> bool:
        """Wait until the newest snapshot is sealed or given up."""
        return self._engine is None or self._engine.finish(timeout_s)

    def saved(self, timeout_s: float) -> Saved:
        """What of this node is safe, once its first rank had the newest snapshot persisted.

        To be called right before `close`, which then hardly waits for the snapshot process either.
        """
        self._patience_s = _PARTING_S
        store = self._persist is not None and self.place.local_rank == 0
        found = ask_what_is_saved(self.paths, self.fit, store=store, timeout_s=timeout_s)
        for why in filter(None, (found.failure, found.not_stored)):
            self.degraded("not known to be saved", why)
        return found

    # --- end ----------------------------------------------------------------------------------

    def close(self, end: End) -> None:
        """End this fit."""
        idle = True
        if self._replacing is not None:
            self._replacing.close(left=end is End.INTERRUPTED)
            self._replacing = None
        if end is End.FINISHED:
            self._pace.close()
        if self._engine is not None:
            self._engine.finish(self._patience_s)
            idle = self._engine.close(self._patience_s)
            counters = self._engine.counters
            self._engine = None
            announce.note_ended(
                self.journal,
                run=self.identity.run_id,
                fit=self.fit,
                rank=self.place.rank,
                finished=end is not End.INTERRUPTED,
                counters=counters,
            )
        if end is End.FINISHED:
            afterwards.keep(self._link)
        elif idle:  # else it is asked something still: the end of this process tells it
            self._link.leave(finished=end is End.GIVEN_UP, timeout_s=self._patience_s)

    def degraded(self, kind: str, words: str) -> None:
        """A degradation: logged and recorded; training goes on."""
        log.warning("%s: %s", kind, words)
        self.journal.write(
            "degraded", run=self.identity.run_id, rank=self.place.rank, kind=kind, text=words
        )
