"""Where a fit is within its training data, and how to get there again.

Lightning's fetcher draws one batch ahead from loaders without a length. That batch was made with
random numbers of an earlier moment, so it is kept with the state instead of being made again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import sized_len

from mnemo.session.generators import (
    generators_of_dataset,
    generators_of_sampler,
    get_states,
    set_states,
    unique,
)
from mnemo.session.loader import (
    ELSEWHERE,
    ReplaySampler,
    draws_in_workers,
    fast_forward,
    kept_generators,
    locate,
    make_replayable,
)

_CYCLE = "max_size_cycle"
_IN_WORKERS = (
    "the order of batches is exact; random numbers drawn in loader workers are not: "
    "set run.seed_samples"
)
_READ_AGAIN = "a loader without sampler and state was read again from its beginning"
_OTHER_ORDER = (
    "the order of batches is not the one of the interrupted epoch: the data has changed, or its "
    "sampler draws from a source that mnemo does not know"
)


def _is_stateful(loader: object) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


class DataPosition:
    """The training loaders of one fit, in the order of the combined loader's ``flattened``."""

    def __init__(self, trainer: pl.Trainer, *, seed_samples: bool) -> None:
        self._trainer = trainer
        self._seed = torch.initial_seed() % 2**63 if seed_samples else None
        self._loaders: list[tuple[Any, ReplaySampler | None]] = []
        self._passes: list[int] = []
        """Passes of the loaders that were there before these."""
        self._saved: dict[str, Any] | None = None
        self._iterators: list[Any] = []
        self._begun: list[int] = []
        """How many batches had been fetched when each loader's current pass began."""
        self._notes: list[str] = []
        self._armed: list[ReplaySampler] = []
        """Told to resume in the epoch that was interrupted."""

    def resume_from(self, saved: dict[str, Any]) -> None:
        """Go on from ``saved`` when the loaders are made."""
        self._saved = saved
        if self._seed is not None and saved["seed"] is not None:
            self._seed = saved["seed"]

    def forget(self) -> None:
        """Start at the beginning after all."""
        self._saved = None

    @property
    def loaded_in_epoch(self) -> int | None:
        """In which epoch the loaders to be resumed were made."""
        return None if self._saved is None else int(self._saved["loaded_in_epoch"])

    @property
    def note(self) -> str:
        """What is not, or may not be, exact after this resume; empty if all is."""
        return "; ".join(self._notes)

    def adopt(self, loader: Any) -> Any:
        """A training loader on its way to being iterated."""
        number = len(self._loaders)
        replay = None if _is_stateful(loader) else make_replayable(loader, seed=self._seed)
        self._loaders.append((loader, replay))
        if replay is not None:
            if number < len(self._passes):
                replay.passes = max(replay.passes, self._passes[number])
            self._arm(number)
        return loader

    def _arm(self, number: int) -> None:
        """Let the next pass of a loader with a sampler be the interrupted one."""
        replay = self._loaders[number][1]
        if replay is None or self._saved is None or number >= len(self._saved["loaders"]):
            return
        place = self._saved["loaders"][number]
        if "passes" not in place:
            return
        _tell_epoch(replay, self._epoch())  # before the iterator is made
        replay.resume(place)
        self._armed.append(replay)

    def _epoch(self) -> int:
        progress: Any = self._trainer.fit_loop.epoch_progress.current
        return int(progress.processed)

    def reset(self) -> None:
        """The loaders are made anew (``reload_dataloaders_every_n_epochs``)."""
        self._passes = [0 if replay is None else replay.passes for _, replay in self._loaders]
        self._loaders.clear()

    def begin_epoch(self) -> None:
        """A new epoch begins, which resumes nothing."""
        self._iterators = []
        for replay in self._armed:
            # Where nothing was left of the interrupted epoch, its order is drawn only now.
            _tell_epoch(replay, self._epoch() - 1)
            replay.end_pass()
            _tell_epoch(replay, self._epoch())
        self._armed.clear()

    def observe(self, fetcher: Any) -> None:
        """After each batch: notice which loaders have begun another pass."""
        iterators = _iterators(fetcher)
        if len(self._iterators) != len(iterators) or fetcher.fetched < max(self._begun, default=0):
            self._begun = [0] * len(iterators)
        else:
            for i, (then, now) in enumerate(zip(self._iterators, iterators, strict=True)):
                if then is not now:
                    self._begun[i] = fetcher.fetched - 1
        self._iterators = iterators

    def state(self) -> dict[str, Any]:
        """Position in every loader after the batches fetched so far in this epoch."""
        loop = self._trainer.fit_loop
        fetcher = loop._data_fetcher
        assert fetcher is not None
        iterator: Any = fetcher.combined_loader._iterator
        positions = [self._position(i, fetcher) for i in range(len(self._loaders))]
        return {
            "seed": self._seed,
            "loaded_in_epoch": max(loop._last_train_dl_reload_epoch, 0),
            "fetched": fetcher.fetched,
            "done": fetcher.done,
            "ahead": list(getattr(fetcher, "batches", ())),
            "batch_index": getattr(fetcher, "_batch_idx", 0),
            "index": iterator._idx,
            "consumed": list(getattr(iterator, "_consumed", ())),
            "positions": positions,
            "begun": list(self._begun),
            "loaders": [
                locate(loader, replay, its_iterator, position)
                for (loader, replay), its_iterator, position in zip(
                    self._loaders, _iterators(fetcher), positions, strict=True
                )
            ],
            "stateful": fetcher.combined_loader._state_dicts(),
            "generators": get_states(self._generators()),
        }

    def _generators(self) -> list[Any]:
        """Those of all loaders of the fit; loaders for validation often share the training's."""
        found = [g for pair in self._loaders for g in kept_generators(*pair)]
        evaluated = self._trainer.fit_loop.epoch_loop.val_loop._combined_loader
        for loader in () if evaluated is None else evaluated.flattened:
            if not _is_stateful(loader):
                found += generators_of_sampler(loader)
            found += generators_of_dataset(loader)
        return unique(found)

    def _position(self, number: int, fetcher: Any) -> int:
        """Batches drawn of a loader's current pass."""
        fetched = int(fetcher.fetched)
        length = sized_len(self._loaders[number][0])
        if length is None:
            return fetched - (self._begun[number] if number < len(self._begun) else 0)
        if fetcher.combined_loader._mode != _CYCLE or not length or not fetched:
            return min(fetched, length)
        return fetched - length * ((fetched - 1) // length)

    def catch_up(self, fetcher: Any) -> None:
        """Before the first batch is fetched from ``fetcher``: be where the snapshot was."""
        saved, combined = self._saved, fetcher.combined_loader
        if saved is None or len(saved["loaders"]) != len(self._loaders):
            return
        plain = [
            i
            for i, (loader, replay) in enumerate(self._loaders)
            if replay is None and not _is_stateful(loader)
        ]
        if plain or saved["stateful"] or fetcher.length is None:
            for number in range(len(self._loaders)):
                self._arm(number)
            combined._load_state_dicts(saved["stateful"])
            _iterate_without_prefetch(fetcher)
            self._read_again(plain, saved["positions"], combined._iterator.iterators)
        combined._iterator._idx = saved["index"]
        if hasattr(combined._iterator, "_consumed"):
            combined._iterator._consumed = list(saved["consumed"])
        fetcher.fetched, fetcher.done = saved["fetched"], saved["done"]
        if hasattr(fetcher, "batches"):
            fetcher.batches = list(saved["ahead"])
        if hasattr(fetcher, "_batch_idx"):
            fetcher._batch_idx = saved["batch_index"]
        self._begun, self._iterators = list(saved["begun"]), _iterators(fetcher)
        for (_, replay), iterator in zip(self._loaders, self._iterators, strict=True):
            if replay is not None:
                replay.bind(iterator)
        set_states(self._generators(), saved["generators"])
        twice = len({id(loader) for loader, _ in self._loaders}) < len(self._loaders)
        if twice or not all(place["sure"] for place in saved["loaders"]):
            self._notes.append(ELSEWHERE)
        if self._seed is None and any(draws_in_workers(loader) for loader, _ in self._loaders):
            self._notes.append(_IN_WORKERS)
        self._saved = None

    def _read_again(self, plain: list[int], positions: list[int], iterators: list[Any]) -> None:
        """Draw and drop what was consumed of loaders that cannot be moved on without loading."""
        count = sum(positions[i] for i in plain)
        if not count:
            return
        self._notes.append(_READ_AGAIN)
        warnings.warn(
            f"mnemo: a training loader has no sampler and no state_dict, so its first {count} "
            "batches of this epoch are loaded again and thrown away, which takes as long as "
            "loading them took. Give it state_dict/load_state_dict (torchdata's "
            "StatefulDataLoader) to resume at once",
            stacklevel=2,
        )
        for i in plain:
            fast_forward(iterators[i], positions[i])

    def verdict(self) -> str:
        """After the first batch of a resumed epoch: what differs from the interrupted, or ''."""
        differs = any(replay is not None and replay.order_differs for _, replay in self._loaders)
        return _OTHER_ORDER if differs else ""


def _tell_epoch(replay: ReplaySampler, epoch: int) -> None:
    """A distributed sampler shuffles by the epoch that it was told."""
    for sampler in (replay.inner, getattr(replay.inner, "sampler", None)):
        set_epoch = getattr(sampler, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)


def _iterators(fetcher: Any) -> list[Iterator[Any]]:
    iterator = fetcher.combined_loader._iterator
    return [] if iterator is None else list(iterator.iterators)


def _iterate_without_prefetch(fetcher: Any) -> None:
    """Make new iterators from the loaders' current positions."""
    ahead = getattr(fetcher, "prefetch_batches", None)
    if ahead is None:
        iter(fetcher)
        return
    fetcher.prefetch_batches = 0
    try:
        iter(fetcher)
    finally:
        fetcher.prefetch_batches = ahead
