"""Where a loop is within its loader, and how to get there again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mnemo.session.generators import get_states, set_states
from mnemo.session.loader import (
    ELSEWHERE,
    ReplaySampler,
    draws_in_workers,
    fast_forward,
    kept_generators,
    locate,
    make_replayable,
)
from mnemo.snapshot.rng import capture_rng, restore_rng

_IN_WORKERS = (
    "the order of batches is exact; random numbers drawn in loader workers are not: "
    "set run.seed_samples"
)
_READ_AGAIN = "a loader without sampler and state was read again from its beginning"
_OTHER_ORDER = (
    "the order of batches is not the one of the interrupted epoch: the data has changed, or its "
    "sampler draws from a source that mnemo does not know"
)


class LoaderPosition:
    """One loader of a loop, and the batches drawn of its current pass.

    A loader with a sampler is moved on without loading anything; one with ``state_dict`` and
    ``load_state_dict`` moves itself; anything else is read again from its beginning, with the
    random numbers that the interrupted pass began with.
    """

    def __init__(self, loader: Any, *, seed_samples: bool) -> None:
        self.batch = 0
        """Batches drawn of the current pass."""
        self._loader = loader
        self._seed = torch.initial_seed() % 2**63 if seed_samples else None
        self._stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        self._replay: ReplaySampler | None = None
        self._generators: list[Any] = []
        self._iterator: Any = None
        self._sure = True
        self._begun: dict[str, Any] = {}
        self._saved: dict[str, Any] | None = None
        self._on_event: Callable[[str, str], None] | None = None

    def prepare(self, saved: dict[str, Any] | None, on_event: Callable[[str, str], None]) -> None:
        """Before the first pass.

        Args:
            saved: What `state` gave, if that is to be gone on from.
            on_event: Told of what is not as it was, as ``(kind, words)``.
        """
        self._on_event = on_event
        self._saved = saved
        if saved is not None and self._seed is not None and saved["seed"] is not None:
            self._seed = saved["seed"]
        if not self._stateful:
            self._replay = make_replayable(self._loader, seed=self._seed)
        self._generators = kept_generators(self._loader, self._replay)
        self._sure = saved is None or saved["place"]["sure"]

    @property
    def note(self) -> str:
        """What is not, or may not be, exact when it is gone on from here; empty if all is."""
        if self._replay is None and not self._stateful:
            return _READ_AGAIN
        notes = [] if self._sure else [ELSEWHERE]
        if draws_in_workers(self._loader) and self._seed is None:
            notes.append(_IN_WORKERS)
        return "; ".join(notes)

    def state(self) -> dict[str, Any]:
        """The position behind the batches drawn so far."""
        return {
            "seed": self._seed,
            "batch": self.batch,
            "begun": self._begun,
            "place": locate(self._loader, self._replay, self._iterator, self.batch),
            "loader": self._loader.state_dict() if self._stateful else None,
            "generators": get_states(self._generators),
        }

    def one_pass(self, epoch: int, rng: dict[str, Any] | None) -> Iterator[Any]:
        """The batches of a pass, or of what is left of the interrupted one.

        Args:
            epoch: Told to distributed samplers.
            rng: State of the process's generators that the interrupted pass goes on with.
        """
        saved, self._saved = self._saved, None
        self._tell_epoch(epoch)
        iterator = self._iterator = self._begin() if saved is None else self._go_on(saved)
        self.batch = 0 if saved is None else saved["batch"]
        if saved is not None:
            set_states(self._generators, saved["generators"])
        if rng is not None:
            restore_rng(rng)
        for batch in iterator:
            self._check_order()
            self.batch += 1
            yield batch
        self._check_order()

    def _begin(self) -> Iterator[Any]:
        if self._replay is not None:
            self._replay.end_pass()
        elif not self._stateful:
            self._begun = {"rng": capture_rng(), "generators": get_states(self._generators)}
        return iter(self._loader)

    def _go_on(self, saved: dict[str, Any]) -> Iterator[Any]:
        if self._replay is not None and "passes" in saved["place"]:
            self._replay.resume(saved["place"])
            replayed: Iterator[Any] = iter(self._loader)
            self._replay.bind(replayed)
            return replayed
        if self._stateful and saved["loader"] is not None:
            self._loader.load_state_dict(saved["loader"])
            return iter(self._loader)
        self._begun = saved["begun"]
        if self._begun:
            restore_rng(self._begun["rng"])
            set_states(self._generators, self._begun["generators"])
        iterator: Iterator[Any] = iter(self._loader)
        if saved["batch"]:
            warnings.warn(
                f"mnemo: the loader has no sampler and no state_dict, so its first "
                f"{saved['batch']} batches of this epoch are loaded again and thrown away, which "
                "takes as long as loading them took. Give it state_dict/load_state_dict "
                "(torchdata's StatefulDataLoader) to resume at once",
                stacklevel=2,
            )
            fast_forward(iterator, saved["batch"])
        return iterator

    def _check_order(self) -> None:
        """Say so, once, if what the sampler has drawn again is not what it had drawn."""
        if self._replay is not None and self._replay.order_differs:
            self._replay.order_differs = False
            if self._on_event is not None:
                self._on_event("order", _OTHER_ORDER)

    def _tell_epoch(self, epoch: int) -> None:
        samplers = [getattr(self._loader, "sampler", None), getattr(self._replay, "inner", None)]
        samplers += [getattr(sampler, "sampler", None) for sampler in samplers]
        for sampler in samplers:
            set_epoch = getattr(sampler, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(epoch)
