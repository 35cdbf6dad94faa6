"""What computes the codes: the fastest library that is here and computes rightly."""

from __future__ import annotations

import logging
import time
from functools import cache
from typing import TYPE_CHECKING, Final

import numpy as np

from mnemo.erasure.codes import Code, CodeKind
from mnemo.erasure.engines.isal import IsalEngine
from mnemo.erasure.engines.numpy import NumpyEngine
from mnemo.erasure.engines.selftest import check
from mnemo.erasure.engines.zfec import ZfecEngine
from mnemo.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mnemo.erasure.engines.base import Engine

_log = logging.getLogger("mnemo.erasure")
_TRIES: Final = 5
"""One alone tells more of what else the machine does."""

ENGINES: Final[dict[str, Callable[[], Engine]]] = {
    "isal": IsalEngine,
    "numpy": NumpyEngine,
    "zfec": ZfecEngine,
}
"""How each is loaded, fastest first; numpy always works, so zfec is only taken by name."""


def usable(name: str | None = None) -> Engine:
    """Return the engine of that name, or the fastest that works here.

    Raises:
        EngineError: There is no such engine, it is not installed, or it fails its self-test.
    """
    return _default() if name is None else _checked(name)


@cache
def _checked(name: str) -> Engine:
    if name not in ENGINES:
        msg = f"there is no erasure coding engine {name!r}, only {', '.join(ENGINES)}"
        raise EngineError(msg)
    engine = ENGINES[name]()
    check(engine)
    return engine


@cache
def _default() -> Engine:
    failures = []
    for name in ENGINES:
        try:
            engine = _checked(name)
        except EngineError as error:
            failures.append(str(error))
            continue
        if failures:
            _log.warning(
                "erasure coding runs on %s, at %.1f GB/s a core where memory is copied at %.1f "
                "GB/s, which ISA-L would keep up with: %s",
                name, *_rates(engine), "; ".join(failures),
            )  # fmt: skip
        return engine
    raise EngineError("; ".join(failures))


def _rates(engine: Engine) -> tuple[float, float]:
    """Return data encoded and copied by a core, in GB/s: the best of some tries, taken in turns."""
    code = Code(CodeKind.REED_SOLOMON, 4, 2)
    fragments = dict(enumerate(np.ones((code.n, 1 << 20), np.uint8)))
    sources = {number: fragments[number] for number in range(code.k)}
    outputs = {number: fragments[number] for number in range(code.k, code.n)}
    data = np.ones(code.k << 20, np.uint8)
    target = data.copy()
    encode_s = copy_s = float("inf")
    for _ in range(_TRIES):
        start = time.perf_counter()
        engine.compute(code, sources, outputs)
        encoded = time.perf_counter()
        np.copyto(target, data)
        copied = time.perf_counter()
        encode_s, copy_s = min(encode_s, encoded - start), min(copy_s, copied - encoded)
    return data.size / encode_s / 1e9, data.size / copy_s / 1e9
