"""Data loaders that can go on in the middle of an epoch with the very batches that would have come.

A map-style loader's order is decided by its sampler, and a sampler's by the random state in which
its pass begins. `ReplaySampler` takes the sampler's place, remembers that state, and after a
restart draws the same order again and leaves out what was consumed; no sample is loaded for that.
A digest over the indices proves that the order is the same.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
import torch
import xxhash
from torch.utils.data import DataLoader, IterableDataset

from mnemo import faults
from mnemo.snapshot.rng import capture_rng, restore_rng

_REMEMBERED: Final = 4096
"""Digests kept: more than any loader prefetches."""


class SampleIndex(int):
    """A sample's index that knows which pass it is drawn in; travels to loader workers."""

    epoch: int

    def __new__(cls, index: int, epoch: int) -> SampleIndex:
        """An int equal to ``index``."""
        made = super().__new__(cls, index)
        made.epoch = epoch
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return SampleIndex, (int(self), self.epoch)


class SeededDataset:
    """Seeds every sample by run, epoch and index, and leaves the generators as they were.

    Random augmentation then gives the same sample in whichever worker, and however often the
    training was interrupted.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.wrapped_dataset = dataset
        self._seed = seed

    def __len__(self) -> int:
        return len(self.wrapped_dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "wrapped_dataset":
            raise AttributeError(name)
        return getattr(self.wrapped_dataset, name)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, SampleIndex):
            return self.wrapped_dataset[index]
        before = capture_rng()
        key = f"{self._seed}|{index.epoch}|{int(index)}".encode()
        seed = xxhash.xxh3_64_intdigest(key)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed % 2**63)
        try:
            return self.wrapped_dataset[int(index)]
        finally:
            restore_rng(before)


class ReplaySampler:
    """Stands in for a loader's (batch) sampler; see the module.

    Args:
        sampler: The sampler whose order counts: what it yields is one batch for the loader, or
            one sample where the loader does not batch.
        generator: The loader's own generator, if it has one.
        mark_epoch: Yield `SampleIndex` instead of int, for `SeededDataset`.
    """

    def __init__(
        self, sampler: Any, generator: torch.Generator | None, *, mark_epoch: bool = False
    ) -> None:
        self.inner = sampler
        self._generator = generator
        self._mark_epoch = mark_epoch
        self._skip = 0
        self._resume: dict[str, Any] | None = None
        self._undrawn: dict[str, Any] | None = None
        """The resumed pass, as long as nothing was drawn of it: a snapshot then repeats it."""
        self._passes = 0
        self._start: dict[str, Any] = {}
        self._digests: deque[tuple[int, int]] = deque(maxlen=_REMEMBERED)
        self.order_differs = False
        """Whether the last resumed pass did not draw the order of the one that was interrupted."""

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __iter__(self) -> Iterator[Any]:
        # Not a generator itself: an iterator that is made but never drawn from, as that of an
        # epoch which was interrupted after its last batch, has to count as the resumed pass.
        resumed, self._resume = self._resume, None
        skip, self._skip = self._skip, 0
        self._passes = self._passes + 1 if resumed is None else int(resumed["pass"])
        self._undrawn = resumed
        return self._draw(resumed, skip)

    def _draw(self, resumed: dict[str, Any] | None, skip: int) -> Iterator[Any]:
        self._undrawn = None
        state = self._random_state()
        if resumed is not None:
            self._set_random_state(resumed["random"])
        self._start = self._random_state()
        self._digests.clear()
        digest = xxhash.xxh3_64(self._passes.to_bytes(8, "little"))
        iterator = iter(self.inner)
        count = 0
        for drawn in iterator:
            count += 1
            digest.update(_index_bytes(drawn))
            self._digests.append((count, digest.intdigest()))
            if count < skip:
                continue
            if count == skip:
                self._after_skip(resumed, digest.intdigest(), state)
                continue
            faults.reach("loading")
            yield self._marked(drawn)

    def _after_skip(
        self, resumed: dict[str, Any] | None, digest: int, state: dict[str, Any]
    ) -> None:
        """The consumed part has been drawn again: compare it, and undo what drawing it consumed."""
        if resumed is not None:
            self.order_differs = resumed["digest"] is not None and digest != resumed["digest"]
            self._set_random_state(state)

    def _marked(self, drawn: Any) -> Any:
        if not self._mark_epoch:
            return drawn
        if isinstance(drawn, (list, tuple)):
            return [SampleIndex(int(i), self._passes) for i in drawn]
        return SampleIndex(int(drawn), self._passes)

    def _random_state(self) -> dict[str, Any]:
        own = None if self._generator is None else self._generator.get_state()
        return {"all": capture_rng(), "own": own}

    def _set_random_state(self, state: dict[str, Any]) -> None:
        restore_rng(state["all"])
        if self._generator is not None and state["own"] is not None:
            self._generator.set_state(state["own"])

    def state(self, consumed: int) -> dict[str, Any]:
        """What `resume` needs to go on after ``consumed`` batches of the current pass."""
        if self._undrawn is not None:
            return self._undrawn
        digest = next((d for n, d in reversed(self._digests) if n == consumed), None)
        return {"pass": self._passes, "random": self._start, "digest": digest, "consumed": consumed}

    def resume(self, state: dict[str, Any]) -> None:
        """Make the next pass the interrupted one, without what was consumed of it."""
        if not state["random"]:
            return
        self._resume = state
        self._skip = int(state["consumed"])


def _index_bytes(drawn: Any) -> bytes:
    try:
        return np.asarray(drawn, dtype=np.int64).tobytes()
    except (TypeError, ValueError, OverflowError):
        return repr(drawn).encode()


def make_replayable(loader: Any, *, seed: int | None = None) -> ReplaySampler | None:
    """Put a `ReplaySampler` into ``loader``; None where its order is not a sampler's matter.

    Args:
        loader: A `torch.utils.data.DataLoader`, or anything else that yields batches.
        seed: Seed each sample from this, by epoch and index.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    current = getattr(loader, name)
    if isinstance(current, ReplaySampler):
        return current
    replay = ReplaySampler(current, loader.generator, mark_epoch=seed is not None)
    # DataLoader forbids setting these once it is made; object's own setter does not.
    object.__setattr__(loader, name, replay)
    if seed is not None:
        object.__setattr__(loader, "dataset", SeededDataset(loader.dataset, seed))
    return replay


def draws_in_workers(loader: Any) -> bool:
    """Whether samples are made in worker processes, whose random state is not captured."""
    return isinstance(loader, DataLoader) and loader.num_workers > 0


def pass_position(consumed: int, length: int | None) -> int:
    """Batches consumed of the current pass of a loader that starts over after ``length``."""
    return (
        consumed if not length or consumed == 0 else consumed - length * ((consumed - 1) // length)
    )


def fast_forward(iterator: Iterable[Any], count: int) -> None:
    """Draw and throw away ``count`` batches."""
    it = iter(iterator)
    for _ in range(count):
        next(it, None)
