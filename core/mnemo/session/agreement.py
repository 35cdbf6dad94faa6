"""What all ranks have to have in common at the start, and errors that all of them come upon."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Final

import msgspec
import torch
from torch.nn.parameter import is_lazy

from mnemo.config import ResolvedConfig, settings
from mnemo.config.uncaught import say_once
from mnemo.errors import ConfigError, MnemoError, SmpError
from mnemo.session.place import Place
from mnemo.smp import messages as m
from mnemo.smp.client import error_of
from mnemo.snapshot.layout import dtype_name
from mnemo.transport import auth

_PURPOSE: Final = "mnemo-same-secret-1"
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


def require_same_models(place: Place, model: torch.nn.Module) -> None:
    """Compare the names and forms of what all ranks train alike. Collective.

    Raises:
        ConfigError: On all ranks: two have other ones.
    """
    tensors = (*model.named_parameters(), *model.named_buffers())
    mine = [f"{name}: {_form(each)}" for name, each in tensors]
    digest = hashlib.sha256("\n".join(mine).encode()).digest()
    if len(set(place.gather(digest))) == 1:
        return
    decode = msgspec.msgpack.Decoder(list[str]).decode
    first, *others = (decode(words) for words in place.gather(msgspec.msgpack.encode(mine)))
    for rank, other in enumerate(others, start=1):
        if other != first:
            more, less = _only(other, first), _only(first, other)
            said = [f"has {more}"] * bool(more) + [f"lacks {less}"] * bool(less)
            how = " and ".join(said) or "has the same in another order"
            raise ConfigError(
                f"rank {rank} has another model than rank 0: it {how}. Make the same on all ranks"
            )


def _form(tensor: torch.Tensor) -> str:
    return "not known yet" if is_lazy(tensor) else f"{dtype_name(tensor)}{list(tensor.shape)}"


def _only(ones: list[str], others: list[str]) -> str:
    """What only the first have."""
    found = [each for each in ones if each not in others]
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def require_one_secret(place: Place, path: Path) -> None:
    """Compare what ``MNEMO_SECRET_FILE`` holds on the ranks of each node. Collective.

    (A node with another secret than the others is not protected, which is said elsewhere.)

    Args:
        place: This rank's.
        path: Where a secret is kept if the variable is not set.

    Raises:
        ConfigError: On all ranks: one of them has another secret than the first of its node.
        SmpError: On all ranks: one of them cannot read it.
    """
    if place.world_size == 1:
        return
    with or_none(place, SmpError):
        given = bool(os.environ.get("MNEMO_SECRET_FILE"))
        mine = auth.load_or_create_secret(path) if given else b""
    nonce = place.gather(auth.new_nonce())[0]
    node = place.node.to_bytes(4, "big")
    proofs: dict[bytes, tuple[int, bytes]] = {}
    for rank, told in enumerate(place.gather(node + auth.mac(mine, _PURPOSE, nonce))):
        first, proof = proofs.setdefault(told[:4], (rank, told[4:]))
        if told[4:] != proof:
            raise ConfigError(
                f"rank {rank} has another secret than rank {first}: let MNEMO_SECRET_FILE name the "
                "same file on all ranks of a node, or be set on none"
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
