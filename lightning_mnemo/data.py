"""Where a fit is within its training data, and how to get there again."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import torch

from mnemo.session.loader import ReplaySampler, draws_in_workers, make_replayable, pass_position


def _is_stateful(loader: object) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


class DataPosition:
    """The training loaders of one fit, in the order of the combined loader's ``flattened``."""

    def __init__(self, trainer: pl.Trainer, *, seed_samples: bool) -> None:
        self._trainer = trainer
        self._seed = torch.initial_seed() % 2**63 if seed_samples else None
        self._loaders: list[tuple[Any, ReplaySampler | None]] = []
        self._saved: dict[str, Any] | None = None
        self.order_only = False
        """Whether a resume repeats the order of batches but not random numbers drawn in workers."""

    def resume_from(self, saved: dict[str, Any]) -> None:
        """Go on from ``saved`` when the loaders are made."""
        self._saved = saved

    def forget(self) -> None:
        """Start at the beginning after all."""
        self._saved = None

    def adopt(self, loader: Any) -> Any:
        """A training loader on its way to being iterated."""
        number = len(self._loaders)
        replay = make_replayable(loader, seed=self._seed)
        self._loaders.append((loader, replay))
        if draws_in_workers(loader) and self._seed is None:
            self.order_only = True
        if self._saved is not None and replay is not None and number < len(self._saved["loaders"]):
            saved = self._saved["loaders"][number]
            if saved is not None:
                self._set_epoch(replay)
                replay.resume(saved)
        return loader

    def _set_epoch(self, replay: ReplaySampler) -> None:
        """Before the iterator is made: a distributed sampler shuffles by the epoch it was told."""
        epoch = self._trainer.fit_loop.epoch_progress.current.processed
        for sampler in (replay.inner, getattr(replay.inner, "sampler", None)):
            set_epoch = getattr(sampler, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(epoch)

    def reset(self) -> None:
        """The loaders are made anew (``reload_dataloaders_every_n_epochs``)."""
        self._loaders.clear()

    def state(self) -> dict[str, Any]:
        """Position in every loader after the batches consumed so far in this epoch."""
        consumed = self._trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return {
            "consumed": consumed,
            "loaders": [
                None if replay is None else replay.state(pass_position(consumed, _length(loader)))
                for loader, replay in self._loaders
            ],
        }

    def catch_up(self, fetcher: Any) -> None:
        """Draw and drop what was consumed, where no sampler could be moved on without loading."""
        if self._saved is None:
            return
        consumed = self._saved["consumed"]
        self._saved = None
        if (
            all(replay is not None or _is_stateful(loader) for loader, replay in self._loaders)
            or not consumed
        ):
            return
        self.order_only = True
        warnings.warn(
            f"mnemo: a training loader has no sampler and no state_dict, so its first {consumed} batches of this "
            "epoch are loaded again and thrown away. Give it state_dict/load_state_dict "
            "(torchdata's StatefulDataLoader) to resume at once",
            stacklevel=2,
        )
        fetched = fetcher.fetched
        for _ in range(consumed):
            next(fetcher)
        fetcher.fetched = fetched

    def verdict(self) -> str:
        """What was found to differ from the interrupted epoch, or ''."""
        if any(replay is not None and replay.order_differs for _, replay in self._loaders):
            return "the order of batches is not the one of the interrupted epoch: its sampler draws from a source that mnemo does not know"
        return ""


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None
