"""What a core encodes and reconstructs with each engine, over a copy of the same data.

Blocks of 16 MiB lie at page boundaries, as in snapshots. Reconstruction brings back the first m
data blocks from the rest. All is done in turns with a copy of the k data blocks within memory, and
a ratio is that of rates, so more is better. Each is done twice and the second time counts, as what
was done before it leaves something in the cache; and seconds are those of the core, as there may be
other processes. The bars are about the worst shape, with the default
engine and the code that `Code.of` takes; Reed-Solomon with one parity is measured beside it.

``zfec itself`` is what its own ``Encoder.encode`` does with whole blocks; the engine of that name
gives it pieces that stay in the cache. It has no XOR, so one parity is compared with its
Reed-Solomon.
"""

from __future__ import annotations

import mmap
import time
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import zfec

from benchmarks.harness import Report, Samples, interleaved
from mnemo.erasure import Code, CodeKind, codec
from mnemo.erasure.engines import ENGINES

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = 16 << 20
USED = [Code.of(k, m) for k, m in ((3, 1), (4, 2), (8, 2), (6, 2))]
CODES = [*USED, Code(CodeKind.REED_SOLOMON, 3, 1)]


def run(quick: bool, report: Report) -> None:
    """Fill ``report``."""
    default = codec(USED[0]).engine
    memory = Blocks()
    worst: dict[str, float] = {}
    for code in CODES:
        taken = _measure(memory, code, rounds=3 if quick else 15)
        memcpy = taken.pop(("memcpy", ""))
        for (engine, what), times in taken.items():
            over = memcpy.over(times)
            low, high = over.quartiles
            rate = code.k * BLOCK / times.median / 1e9
            report.row(
                code=str(code), engine=engine, what=what, gb_per_s=rate, over_memcpy=over.median,
                q1=low, q3=high,
            )  # fmt: skip
        if code in USED:
            encoding, reconstruction = taken[default, "encode"], taken[default, "reconstruct"]
            for bar, ratio in (
                ("encode_over_memcpy", memcpy.over(encoding)),
                ("reconstruct_over_memcpy", memcpy.over(reconstruction)),
                ("encode_over_zfec", taken["zfec itself", "encode"].over(encoding)),
            ):
                worst[bar] = min(worst.get(bar, ratio.median), ratio.median)
    for bar, value in worst.items():
        report.bar(bar, value, 10 if bar == "encode_over_zfec" else 1.3, "higher")


class Blocks:
    """Fragments, and where the copy goes to; all pages touched."""

    def __init__(self) -> None:
        most = max(code.n for code in CODES)
        self.fragments = self._map(most)
        self.targets = self._map(most)
        self.fragments[:] = np.random.default_rng(0).integers(0, 256, BLOCK, np.uint8)

    @staticmethod
    def _map(number: int) -> np.ndarray:
        blocks = np.frombuffer(mmap.mmap(-1, number * BLOCK), np.uint8).reshape(number, BLOCK)
        blocks.fill(1)
        return blocks

    def copy(self, number: int) -> None:
        """Copy so many fragments, one after the other."""
        for target, fragment in zip(self.targets[:number], self.fragments, strict=False):
            np.copyto(target, fragment)


def _measure(memory: Blocks, code: Code, *, rounds: int) -> dict[tuple[str, str], Samples]:
    """Return a core's seconds by engine and work; the copy is an engine too."""
    fragments = dict(enumerate(memory.fragments[: code.n]))
    data = list(memory.fragments[: code.k])
    parities = list(memory.fragments[code.k : code.n])
    have = {number: fragments[number] for number in range(code.m, code.n)}
    out = {number: fragments[number] for number in range(code.m)}
    plain = zfec.Encoder(code.k, code.n).encode
    cases: dict[tuple[str, str], Callable[[], object]] = {
        ("memcpy", ""): partial(memory.copy, code.k),
        ("zfec itself", "encode"): partial(plain, data, list(range(code.k, code.n))),
    }
    for name in ENGINES:
        tried = codec(code, name)
        cases[name, "encode"] = partial(tried.encode, data, parities)
        cases[name, "reconstruct"] = partial(tried.reconstruct, have, out)
    timed = {"/".join(case): partial(_core_seconds, work) for case, work in cases.items()}
    taken = interleaved(timed, rounds=rounds)
    return {case: taken["/".join(case)] for case in cases}


def _core_seconds(work: Callable[[], object]) -> float:
    work()
    start = time.thread_time()
    work()
    return time.thread_time() - start
