"""Data loaders that can go on in the middle of an epoch with the very batches that would have come.

A map-style loader's order is decided by its sampler, and a sampler's by the random state in which
its pass begins. `ReplaySampler` takes the sampler's place, remembers that state, and after a
restart draws the same order again and leaves out what was consumed; no sample is loaded for that.
A digest over the indices proves that the order is the same.
"""

from __future__ import annotations

import contextlib
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch.utils.data import DataLoader, IterableDataset

from mnemo import faults
from mnemo.session.generators import (
    generators_of_dataset,
    generators_of_sampler,
    get_states,
    set_states,
    unique,
)
from mnemo.snapshot.rng import capture_rng, restore_rng

ELSEWHERE = (
    "the loader was iterated over elsewhere in the middle of its epoch, or has an iterator of its "
    "own: what was left of the epoch may be other batches"
)
"""Said where a position is not ``sure``."""


@dataclass(frozen=True)
class PassIndex:
    """A sample's index with the pass that it is drawn in; travels to loader workers."""

    index: Any
    number: int


class SeededDataset:
    """Seeds every sample by run, pass and index, and leaves the generators as they were.

    Random augmentation then gives the same sample in whichever worker, and however often the
    training was interrupted.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.wrapped_dataset = dataset
        self._seed = seed

    def __len__(self) -> int:
        return len(self.wrapped_dataset)

    def __getattr__(self, name: str) -> Any:
        # A batched fetch of the dataset's own would go round the seeding.
        if name in ("wrapped_dataset", "__getitems__"):
            raise AttributeError(name)
        return getattr(self.wrapped_dataset, name)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, PassIndex):
            return self.wrapped_dataset[index]
        before = capture_rng()
        key = f"{self._seed}|{index.number}|{index.index!r}".encode()
        seed = xxhash.xxh3_64_intdigest(key)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed % 2**63)
        try:
            return self.wrapped_dataset[index.index]
        finally:
            restore_rng(before)


class ReplaySampler:
    """Stands in for a loader's (batch) sampler; see the module.

    Whoever else iterates over the loader meanwhile has a pass of his own.

    Args:
        sampler: The sampler whose order counts: what it yields is one batch for the loader, or
            one sample where the loader does not batch.
        generators: Random generators of its own and the loader's. They are no part of what is
            replayed: who restores the loader's position puts them back as well.
        mark: Given what is drawn and the pass, makes what is yielded, for `SeededDataset`.
    """

    def __init__(
        self,
        sampler: Any,
        generators: Sequence[Any] = (),
        mark: Callable[[Any, int], Any] | None = None,
    ) -> None:
        self.inner = sampler
        self.generators = generators
        self.mark = mark
        self.passes = 0
        """Passes begun, by whomever and in earlier lives too."""
        self.order_differs = False
        """Whether the last resumed pass did not draw the order of the one that was interrupted."""
        self._resume: dict[str, Any] | None = None
        self._bound: Pass | None = None
        self._begun: list[weakref.ref[Pass]] = []

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __iter__(self) -> Pass:
        return Pass(self, self._resume)

    def state(self, iterator: Any, consumed: int, ahead: int = 0) -> dict[str, Any]:
        """What `resume` needs to go on after ``consumed`` batches of a pass.

        Args:
            iterator: The loader's, whose pass it is.
            consumed: Batches that it gave.
            ahead: How many it may have drawn beyond them.
        """
        own = _pass_of(iterator, self)
        if own is None and self._resume is not None:
            return {**self._resume, "passes": self.passes}  # still to be resumed
        passes = self._living() if own is None else [own]
        fitting = [p for p in passes if p.fits(consumed, ahead)]
        state = (fitting or passes)[-1].state() if passes else {"pass": self.passes}
        # An iterator that begins late draws random numbers of its own when it is gone on with.
        sure = state.get("sure", True) and ((own is not None and bool(fitting)) or not consumed)
        return {**state, "passes": self.passes, "consumed": consumed, "sure": sure}

    def resume(self, state: dict[str, Any]) -> None:
        """Make the next pass the interrupted one, without what was consumed of it."""
        self.passes = max(self.passes, int(state["passes"]))
        if "random" in state:
            self._resume = state

    def bind(self, iterator: Any) -> None:
        """``iterator`` is the loader's that goes on with the interrupted pass, and no other."""
        self._bound = _pass_of(iterator, self)
        if self._bound is not None:
            self._resume = None

    def end_pass(self) -> None:
        """The next pass is a new one. A resumed one of which nothing was left is still checked."""
        left, self._bound = self._bound, None
        if left is None and self._resume is not None:
            left = Pass(self, self._resume)
        if left is not None and not left.begun:
            left.begin()
        self._resume = None

    def has_begun(self, begun: Pass) -> None:
        """The first is about to be drawn of a pass."""
        self._begun = [ref for ref in self._begun if ref() is not None]
        self._begun.append(weakref.ref(begun))
        if begun.resumed is not None:
            self._resume = None

    def _living(self) -> list[Pass]:
        """Passes that somebody may still draw from, in the order in which they began."""
        return [found for ref in self._begun if (found := ref()) is not None]


class Pass:
    """One pass over a `ReplaySampler`, which begins when the first batch is drawn.

    Not before, for a loader with workers makes two iterators and draws from the second.
    """

    def __init__(self, sampler: ReplaySampler, resumed: dict[str, Any] | None) -> None:
        self.sampler = sampler
        self.resumed = resumed
        """The interrupted pass that this one goes on with."""
        self.drawn = 0
        self._number = 0
        self._ended = False
        self._iterator: Iterator[Any] | None = None
        self._ahead: deque[Any] = deque()
        """Drawn in an earlier life, and not consumed there."""
        self._start: dict[str, Any] = {}
        self._digest = xxhash.xxh3_64()

    @property
    def begun(self) -> bool:
        """Whether anything was drawn."""
        return self._iterator is not None

    def __iter__(self) -> Pass:
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            self.begin()
        drawn = self._ahead.popleft() if self._ahead else self._draw()
        faults.reach("loading")
        mark = self.sampler.mark
        return drawn if mark is None else mark(drawn, self._number)

    def begin(self) -> None:
        """Start, or go on with the interrupted pass behind what was consumed of it."""
        sampler, resumed = self.sampler, self.resumed
        sampler.has_begun(self)
        now = {"random": capture_rng(), "own": get_states(sampler.generators)}
        if resumed is None:
            sampler.passes += 1
            self._begin_at(sampler.passes, now)
            return
        _put_back(resumed, sampler.generators)
        self._begin_at(int(resumed["pass"]), {key: resumed[key] for key in now})
        drawn, consumed = int(resumed["drawn"]), int(resumed["consumed"])
        with contextlib.suppress(StopIteration):
            for number in range(drawn + resumed["ended"]):
                batch = self._draw()
                if number >= consumed:
                    self._ahead.append(batch)
        self.sampler.order_differs = resumed["digest"] != self._digest.intdigest()
        _put_back(now, sampler.generators)

    def _begin_at(self, number: int, start: dict[str, Any]) -> None:
        self._number, self._start = number, start
        self._digest.update(number.to_bytes(8, "little"))
        self._iterator = iter(self.sampler.inner)

    def _draw(self) -> Any:
        assert self._iterator is not None
        try:
            drawn = next(self._iterator)
        except StopIteration:
            self._ended = True
            raise
        self.drawn += 1
        self._digest.update(_index_bytes(drawn))
        return drawn

    def fits(self, consumed: int, ahead: int) -> bool:
        """Whether a loader that gave ``consumed`` batches can have drawn what was drawn here."""
        if not self.begun:
            return self.resumed is not None
        return 0 <= self.drawn - consumed <= ahead

    def state(self) -> dict[str, Any]:
        """What was drawn, and how to draw it again."""
        if not self.begun:
            return self.resumed or {"pass": self.sampler.passes}
        return {
            "pass": self._number,
            "digest": self._digest.intdigest(),
            "drawn": self.drawn,
            "ended": self._ended,
            **self._start,
        }


def _put_back(state: dict[str, Any], generators: Sequence[Any]) -> None:
    restore_rng(state["random"])
    set_states(generators, state["own"])


def _pass_of(iterator: Any, sampler: ReplaySampler) -> Pass | None:
    """The one that a `DataLoader`'s iterator draws from; None where it is something else's."""
    found = getattr(iterator, "_sampler_iter", None)
    return found if isinstance(found, Pass) and found.sampler is sampler else None


def _mark_batch(batch: Any, number: int) -> list[PassIndex]:
    return [PassIndex(index, number) for index in batch]


def _index_bytes(drawn: Any) -> bytes:
    try:
        return np.asarray(drawn, dtype=np.int64).tobytes()
    except (TypeError, ValueError, OverflowError):
        return repr(drawn).encode()


def make_replayable(loader: Any, *, seed: int | None = None) -> ReplaySampler | None:
    """Put a `ReplaySampler` into ``loader``; None where its order is not a sampler's matter.

    Args:
        loader: A `torch.utils.data.DataLoader`, or anything else that yields batches.
        seed: Seed each sample from this, by pass and index.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    current = getattr(loader, name)
    if isinstance(current, ReplaySampler):
        return current
    generators = generators_of_sampler(loader)
    mark = None if seed is None else _mark_batch if name == "batch_sampler" else PassIndex
    replay = ReplaySampler(current, generators, mark)
    # DataLoader forbids setting these once it is made; object's own setter does not.
    object.__setattr__(loader, name, replay)
    if seed is not None:
        object.__setattr__(loader, "dataset", SeededDataset(loader.dataset, seed))
    return replay


def draws_in_workers(loader: Any) -> bool:
    """Whether samples are made in worker processes, whose random state is not captured."""
    return isinstance(loader, DataLoader) and loader.num_workers > 0


def locate(loader: Any, replay: ReplaySampler | None, iterator: Any, consumed: int) -> Any:
    """Where the iterator of a loader is that gave ``consumed`` batches, and if that is ``sure``."""
    if replay is not None:
        workers = getattr(loader, "num_workers", 0)
        return replay.state(iterator, consumed, workers * (loader.prefetch_factor or 0))
    # A loader that keeps its own position keeps that of its newest iterator.
    newest = getattr(loader, "_iterator", None) if isinstance(loader, DataLoader) else None
    return {"sure": newest is None or newest is iterator}


def kept_generators(loader: Any, replay: ReplaySampler | None) -> list[Any]:
    """Those whose state belongs to a loader's position.

    A loader that keeps its own position draws its order when it likes.
    """
    order: Sequence[Any] = () if replay is None else replay.generators
    return unique([*order, *generators_of_dataset(loader)])


def fast_forward(iterator: Iterator[Any], count: int) -> None:
    """Draw and throw away ``count`` batches."""
    for _ in range(count):
        next(iterator, None)
