"""Erasure coding with zfec, whose code this is.

zfec's C side trusts its caller, and its Python side mostly too: ``decode`` permutes the lists that
it is given, never returns if a number is there twice, and reads out of bounds if one is too large.
So it gets lists of its own, and only numbers that were checked.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mnemo.erasure.codes import CodeKind
from mnemo.erasure.engines.numpy import NumpyEngine
from mnemo.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mnemo.erasure.codes import Code
    from mnemo.erasure.engines.base import Fragment

_CHUNK: Final = 64 << 10
"""Bytes of each fragment worked on at a time: zfec returns new bytes, copied out of the cache."""


class ZfecEngine:
    """Leaves XOR, which zfec does not have, to numpy."""

    name = "zfec"

    def __init__(self) -> None:
        try:
            import zfec
        except ImportError as error:
            msg = f"zfec cannot be imported ({error}); pip install zfec"
            raise EngineError(msg) from error
        self._encoder = lru_cache(maxsize=64)(zfec.Encoder)
        self._decoder = lru_cache(maxsize=64)(zfec.Decoder)
        self._xor = NumpyEngine()

    def compute(
        self, code: Code, sources: Mapping[int, Fragment], outputs: Mapping[int, Fragment]
    ) -> None:
        """See `mnemo.erasure.engines.base.Engine.compute`."""
        if code.kind is CodeKind.XOR:
            self._xor.compute(code, sources, outputs)
            return
        length = next(iter(sources.values())).size
        for start in range(0, length, _CHUNK):
            chunk = slice(start, start + _CHUNK)
            data = self._data(code, list(sources), [source[chunk] for source in sources.values()])
            parities = [number for number in outputs if number >= code.k]
            made = dict(enumerate(data))
            if parities:
                encoder = self._encoder(code.k, code.n)
                made.update(zip(parities, encoder.encode(data, parities), strict=True))
            for number, output in outputs.items():
                output[chunk] = np.frombuffer(made[number], np.uint8)

    def _data(self, code: Code, numbers: list[int], pieces: list[Fragment]) -> Sequence[Any]:
        """Return the k data fragments of one chunk; may permute the lists."""
        if numbers == list(range(code.k)):
            return pieces
        decoded: Sequence[Any] = self._decoder(code.k, code.n).decode(pieces, numbers)
        return decoded
