"""TCP ports for what is told its port before it listens there."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """A port of the loopback that no other process is given until the end of the block.

    It is bound here and does not listen, both with SO_REUSEADDR: so whoever asks for that port
    and sets the option too, as torch's store and mnemo's transport do, listens there.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
