"""Data loaders that can go on in the middle of an epoch with the very batches that would have come.

A map-style loader's order is decided by its sampler, and a sampler's by the random state in which
its pass begins. `ReplaySampler` takes the sampler's place, remembers that state, and after a
restart draws the same order again and leaves out what was consumed; no sample is loaded for that.
A digest over the indices proves that the order is the same.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import xxhash
from torch.utils.data import DataLoader, IterableDataset

from mnemo import faults
from mnemo.session.generators import generators_of_sampler, get_states, set_states
from mnemo.snapshot.rng import capture_rng, restore_rng

_REMEMBERED: Final = 4096
"""Digests kept: more than any loader prefetches."""


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

    Args:
        sampler: The sampler whose order counts: what it yields is one batch for the loader, or
            one sample where the loader does not batch.
        generators: Random generators of its own and the loader's.
        mark: Given what is drawn and the pass, makes what is yielded, for `SeededDataset`.
    """

    def __init__(
        self,
        sampler: Any,
        generators: Sequence[Any] = (),
        mark: Callable[[Any, int], Any] | None = None,
    ) -> None:
        self.inner = sampler
        self.passes = 0
        """Passes begun, earlier lives included."""
        self.order_differs = False
        """Whether the last resumed pass did not draw the order of the one that was interrupted."""
        self._generators = generators
        self._mark = mark
        self._resume: dict[str, Any] | None = None
        self._start: dict[str, Any] = {}
        self._digests: deque[tuple[int, int]] = deque(maxlen=_REMEMBERED)

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __iter__(self) -> Iterator[Any]:
        # A generator, so that a pass begins with its first draw: a loader with workers makes two
        # iterators and draws from the second.
        iterator, count, digest = self._begin()
        for drawn in iterator:
            count += 1
            self._note(digest, drawn, count)
            faults.reach("loading")
            yield drawn if self._mark is None else self._mark(drawn, self.passes)

    def _begin(self) -> tuple[Iterator[Any], int, Any]:
        """Start a pass, or go on with the interrupted one behind what was consumed of it."""
        resumed, self._resume = self._resume, None
        self.passes = self.passes + 1 if resumed is None else int(resumed["pass"])
        now = capture_rng()
        if resumed is not None:
            restore_rng(resumed["random"])
            set_states(self._generators, resumed["own"])
        self._start = {"random": capture_rng(), "own": get_states(self._generators)}
        self._digests.clear()
        digest = xxhash.xxh3_64(self.passes.to_bytes(8, "little"))
        iterator = iter(self.inner)
        if resumed is None:
            return iterator, 0, digest
        count = 0
        for drawn in itertools.islice(iterator, int(resumed["consumed"])):
            count += 1
            self._note(digest, drawn, count)
        self.order_differs = resumed["digest"] not in (None, digest.intdigest())
        restore_rng(now)  # its own generators stay: they are where the interrupted pass left them
        return iterator, count, digest

    def _note(self, digest: Any, drawn: Any, count: int) -> None:
        digest.update(_index_bytes(drawn))
        self._digests.append((count, digest.intdigest()))

    def state(self, consumed: int) -> dict[str, Any]:
        """What `resume` needs to go on after ``consumed`` batches of the current pass."""
        if self._resume is not None:
            return self._resume  # nothing was drawn of it yet: it is to be resumed again
        digest = next((d for n, d in reversed(self._digests) if n == consumed), None)
        return {"pass": self.passes, "digest": digest, "consumed": consumed, **self._start}

    def resume(self, state: dict[str, Any]) -> None:
        """Make the next pass the interrupted one, without what was consumed of it."""
        if "random" in state:
            self._resume = state

    def end_pass(self) -> None:
        """The next pass is a new one, even if nothing was drawn of a resumed one."""
        if self._resume is not None:
            self._begin()


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


def fast_forward(iterator: Iterator[Any], count: int) -> None:
    """Draw and throw away ``count`` batches."""
    for _ in range(count):
        next(iterator, None)
