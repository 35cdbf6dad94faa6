"""What every engine does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mnemo.erasure.codes import Code

Fragment = npt.NDArray[np.uint8]
"""One-dimensional and contiguous, at any address."""


class Engine(Protocol):
    """Multiplies `mnemo.erasure.codes.coefficients` with fragments, into the caller's memory."""

    name: str
    """What a user calls it."""

    def compute(
        self, code: Code, sources: Mapping[int, Fragment], outputs: Mapping[int, Fragment]
    ) -> None:
        """Compute fragments from others, by their numbers.

        What is given was checked: engines may read and write out of bounds if it is wrong.

        Args:
            code: The code of all fragments.
            sources: Exactly k, in ascending order of their numbers.
            outputs: At least one, none of them in ``sources``; overlaps nothing. Of the length of
                the sources, at least one byte.
        """
