"""What a core encodes and reconstructs with each engine, over a copy of the same data.

Blocks of 16 MiB lie at page boundaries, as in snapshots. Reconstruction brings back the first m
data blocks from the rest. All is done in turns with a copy of the k data blocks within memory, and
a ratio is that of rates, so more is better. The bars are about the worst shape, with the default
engine and the code that `Code.of` takes; Reed-Solomon with one parity is measured beside it.

``zfec itself`` is what its own ``Encoder.encode`` does with whole blocks; the engine of that name
gives it pieces that stay in the cache. It has no XOR, so one parity is compared with its
Reed-Solomon.
"""

from __future__ import annotations

import mmap
from functools import partial

import numpy as np
import zfec

from benchmarks.harness import Report, Samples, interleaved, seconds
from mnemo.erasure import Code, CodeKind, codec
from mnemo.erasure.engines import ENGINES

BLOCK = 16 << 20
USED = [Code.of(k, m) for k, m in ((3, 1), (4, 2), (8, 2), (6, 2))]
CODES = [*USED, Code(CodeKind.REED_SOLOMON, 3, 1)]


def run(quick: bool, report: Report) -> None:
    """Fill ``report``."""
    default = codec(CODES[0]).engine
    memory = Blocks()
    encode, reconstruct, over_zfec = [], [], []
    for code in CODES:
        fast = _measure(memory, code, [default], rounds=7 if quick else 31)
        slow = _measure(
            memory, code, [name for name in ENGINES if name != default], rounds=1 if quick else 5
        )
        for case, (over, rate) in (fast | slow).items():
            low, high = over.quartiles
            report.row(
                code=str(code), engine=case[0], what=case[1], gb_per_s=rate.median / 1e9,
                over_memcpy=over.median, q1=low, q3=high,
            )  # fmt: skip
        if code in USED:
            encode.append(fast[default, "encode"][0].median)
            reconstruct.append(fast[default, "reconstruct"][0].median)
            over_zfec.append(encode[-1] / slow["zfec itself", "encode"][0].median)
    report.bar("encode_over_memcpy", min(encode), 1.3, "higher")
    report.bar("reconstruct_over_memcpy", min(reconstruct), 1.3, "higher")
    report.bar("encode_over_zfec", min(over_zfec), 10, "higher")


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


def _measure(
    memory: Blocks, code: Code, engines: list[str], *, rounds: int
) -> dict[tuple[str, str], tuple[Samples, Samples]]:
    """Return by engine and work the ratio of rates, and the rate in bytes of data a second."""
    fragments = dict(enumerate(memory.fragments[: code.n]))
    data = list(memory.fragments[: code.k])
    parities = list(memory.fragments[code.k : code.n])
    have = {number: fragments[number] for number in range(code.m, code.n)}
    out = {number: fragments[number] for number in range(code.m)}
    cases = {}
    for name in engines:
        tried = codec(code, name)
        cases[name, "encode"] = partial(seconds, partial(tried.encode, data, parities))
        cases[name, "reconstruct"] = partial(seconds, partial(tried.reconstruct, have, out))
    if "zfec" in engines:
        plain = partial(zfec.Encoder(code.k, code.n).encode, data, list(range(code.k, code.n)))
        cases["zfec itself", "encode"] = partial(seconds, plain)
    memcpy = partial(seconds, partial(memory.copy, code.k))
    named = {"/".join(case): action for case, action in cases.items()}
    taken = interleaved({"memcpy": memcpy, **named}, rounds=rounds)
    nbytes = Samples([code.k * BLOCK] * rounds)
    return {
        case: (taken["memcpy"].over(taken["/".join(case)]), nbytes.over(taken["/".join(case)]))
        for case in cases
    }
