"""What all ranks have to have in common at the start, and errors that all of them come upon."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from operator import attrgetter
from typing import Final

import msgspec

from mnemo.config import ResolvedConfig, settings
from mnemo.config.uncaught import say_once
from mnemo.errors import ConfigError, MnemoError
from mnemo.session.place import Place
from mnemo.smp import messages as m
from mnemo.smp.client import error_of

_OWN: Final = {
    "run.dir",
    "run.journal",
    "protect.domain",
    "protect.rate",
    "network.interface",
    "network.ports",
}
"""Settings that each node may have of its own."""


@contextlib.contextmanager
def on_all_ranks(place: Place, *kinds: type[MnemoError]) -> Iterator[None]:
    """Errors of ``kinds`` that the block raises are raised on all ranks: rank 0 says them.

    Raises:
        MnemoError: Of ``kinds``, as the block did.
    """
    try:
        yield
    except kinds as error:
        if place.world_size > 1:
            say_once(error, here=place.rank == 0)
        raise


@contextlib.contextmanager
def or_none(place: Place, *kinds: type[MnemoError]) -> Iterator[None]:
    """The block succeeds on all ranks, or an error of ``kinds`` is raised on all. Collective.

    Raises:
        MnemoError: Of ``kinds``, that of the first rank that had one.
    """
    mine: MnemoError | None = None
    try:
        yield
    except kinds as error:
        mine = error
    if place.world_size == 1:
        if mine is not None:
            raise mine
        return
    failure = None if mine is None else m.Failure(type(mine).__name__, str(mine))
    told = place.gather(msgspec.msgpack.encode(failure))
    decode = msgspec.msgpack.Decoder(m.Failure | None).decode
    for rank, other in enumerate(map(decode, told)):
        if other is not None:
            found = error_of(m.Failure(other.kind, f"rank {rank}: {other.text}"))
            say_once(found, here=place.rank == 0)
            raise found from mine


def require_same_settings(config: ResolvedConfig, place: Place) -> None:
    """Compare all ranks' settings: with others they would wait for each other. Collective.

    Raises:
        ConfigError: On all ranks: two have been given something else.
    """
    mine = {
        key: "" if (value := attrgetter(key)(config.config)) is None else setting.kind.format(value)
        for key, setting in settings().items()
        if key not in _OWN
    }
    decode = msgspec.msgpack.Decoder(dict[str, str]).decode
    told = [decode(words) for words in place.gather(msgspec.msgpack.encode(mine))]
    for key, value in told[0].items():
        for rank, other in enumerate(told):
            if other.get(key) != value:
                raise ConfigError(
                    f"{key} is {value or 'not set'} on rank 0 and {other.get(key) or 'not set'} on "
                    f"rank {rank}: give all ranks the same"
                )


def of_all_ranks(place: Place, mine: list[str]) -> list[str]:
    """What any rank names, and which rank where not all name it. Collective."""
    if place.world_size == 1:
        return mine
    decode = msgspec.msgpack.Decoder(list[str]).decode
    told = [decode(words) for words in place.gather(msgspec.msgpack.encode(mine))]
    named: dict[str, list[int]] = {}
    for rank, words in enumerate(told):
        for word in words:
            named.setdefault(word, []).append(rank)
    return [
        word if len(ranks) == place.world_size else f"{word} on rank {', '.join(map(str, ranks))}"
        for word, ranks in sorted(named.items())
    ]
