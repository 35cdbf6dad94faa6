"""Which membership epoch this process has heard of, and what a newer one puts an end to."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from mnemo.comm.gloo import LinkError
from mnemo.errors import GroupBrokenError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mnemo.comm.gloo import GlooLinks


class Losses:
    """Those that were told to this process."""

    def __init__(self) -> None:
        self.changing = threading.RLock()
        """Held while groups get new links, and while a loss is told to them."""
        self._epoch = 0
        self._under_way: set[GlooLinks] = set()

    def hear(self, epoch: int) -> None:
        """A loss begins a membership epoch: what is done for an older one is given up."""
        with self.changing:
            self._epoch = max(self._epoch, epoch)
            under_way = list(self._under_way)
        for links in under_way:
            links.cut(f"a loss has begun membership epoch {epoch}")

    def over(self, epoch: int) -> bool:
        """Whether a newer one has begun."""
        return self._epoch > epoch

    def see_that_it_lasts(self, epoch: int) -> None:
        """Raise if a newer one has begun.

        Raises:
            GroupBrokenError: It has.
        """
        if self.over(epoch):
            why = f"another rank was lost: membership epoch {self._epoch} has begun"
            raise GroupBrokenError(f"of membership epoch {epoch}", why)

    @contextlib.contextmanager
    def cutting(self, links: GlooLinks, epoch: int) -> Iterator[None]:
        """A newer membership epoch cuts these links while this is entered.

        Raises:
            GroupBrokenError: It did, or they broke.
        """
        with self.changing:
            self.see_that_it_lasts(epoch)
            self._under_way.add(links)
        try:
            yield
        except LinkError as error:
            raise GroupBrokenError(f"of membership epoch {epoch}", str(error)) from None
        finally:
            with self.changing:
                self._under_way.discard(links)


losses = Losses()
"""Of this process."""
