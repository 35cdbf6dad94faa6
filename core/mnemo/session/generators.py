"""Random generators that samplers and datasets keep for themselves."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch

KINDS: Final = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_SAMPLER_PARTS: Final = ("sampler", "batch_sampler")
_DATASET_PARTS: Final = ("wrapped_dataset", "dataset", "datasets")
_DEPTH: Final = 8


def generators_of_sampler(loader: Any) -> list[Any]:
    """Those that decide the order of ``loader``."""
    parts = [getattr(loader, name, None) for name in _SAMPLER_PARTS]
    own = getattr(loader, "generator", None)
    return unique([own, *(g for part in parts for g in _search(part, _SAMPLER_PARTS, _DEPTH))])


def generators_of_dataset(loader: Any) -> list[Any]:
    """Those that samples of ``loader`` are made with, in this process."""
    return unique(_search(getattr(loader, "dataset", None), _DATASET_PARTS, _DEPTH))


def get_states(generators: Sequence[Any]) -> list[Any]:
    """A copy of each generator's state."""
    return [_get(generator) for generator in generators]


def set_states(generators: Sequence[Any], states: Sequence[Any]) -> None:
    """Put generators back, where there are as many as then."""
    if len(generators) == len(states):
        for generator, state in zip(generators, states, strict=True):
            _set(generator, state)


def _search(part: Any, names: tuple[str, ...], depth: int) -> Iterator[Any]:
    if isinstance(part, (list, tuple)):
        for item in part:
            yield from _search(item, names, depth - 1)
        return
    attributes = getattr(part, "__dict__", None)
    if attributes is None or depth == 0:
        return
    yield from (attributes[name] for name in sorted(attributes))
    for name in names:
        if name in attributes:
            yield from _search(attributes[name], names, depth - 1)


def unique(found: Iterable[Any]) -> list[Any]:
    """The generators among ``found``, each once."""
    return list({id(g): g for g in found if isinstance(g, KINDS)}.values())


def _get(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return copy.deepcopy(generator.bit_generator.state)
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.getstate()


def _set(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.setstate(state)
