"""What every engine must do, the same tests for each; and how one is chosen."""

from __future__ import annotations

import ctypes
import itertools
import logging
import mmap
import random
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zfec

from mnemo.erasure import Code, Codec, CodeKind, codec, engines
from mnemo.erasure.engines import isal
from mnemo.erasure.engines.numpy import NumpyEngine
from mnemo.erasure.engines.selftest import check
from mnemo.errors import EngineError, FragmentError, TooFewFragmentsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from mnemo.erasure.engines.base import Engine, Fragment

RS, XOR = CodeKind.REED_SOLOMON, CodeKind.XOR
NAMES = list(engines.ENGINES)
every_engine = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def _encoded(code: Code, length: int, generator: np.random.Generator) -> list[Fragment]:
    """Random data and its parities, as zfec or the definition of XOR has them."""
    data = list(generator.integers(0, 256, (code.k, length), np.uint8))
    if code.kind is XOR:
        return [*data, np.bitwise_xor.reduce(data)]
    blocks = zfec.Encoder(code.k, code.n).encode(data, list(range(code.k, code.n)))
    return [*data, *(np.frombuffer(block, np.uint8) for block in blocks)]


class Places:
    """Room for fragments at any addresses, in memory whose other bytes are watched."""

    def __init__(self, number: int, length: int) -> None:
        stride = length + 320 - length % 64
        memory = np.full(number * stride + 64, 0xA5, np.uint8)
        start = -memory.ctypes.data % 64
        self._memory = memory[start : start + number * stride].reshape(number, stride)
        aligned = random.random() < 0.5
        self._offsets = [64 if aligned else random.randint(0, 255) for _ in range(number)]
        self._length = length

    def __getitem__(self, index: int) -> Fragment:
        offset = self._offsets[index]
        return self._memory[index, offset : offset + self._length]

    def all(self) -> list[Fragment]:
        return [self[index] for index in range(len(self._offsets))]

    def check_margins(self) -> None:
        for row, offset in zip(self._memory, self._offsets, strict=True):
            assert (row[:offset] == 0xA5).all()
            assert (row[offset + self._length :] == 0xA5).all()


# What is computed


@every_engine
@pytest.mark.parametrize("length", [*range(1, 70), 127, 128, 129, 255, 4095, 4097, 65_537])
def test_parities_are_zfecs_at_any_length_and_address(
    name: str, length: int, generator: np.random.Generator
) -> None:
    for code in (Code(RS, 1, 1), Code(RS, 4, 2), Code(RS, 5, 7), Code(XOR, 3, 1), Code(XOR, 1, 1)):
        right = _encoded(code, length, generator)
        places = Places(code.n, length)
        for place, fragment in zip(places.all(), right[: code.k], strict=False):
            place[:] = fragment
        codec(code, name).encode(places.all()[: code.k], places.all()[code.k :])
        assert np.array_equal(places.all(), right)
        places.check_margins()


@every_engine
def test_random_shapes(name: str, generator: np.random.Generator) -> None:
    for _ in range(60):
        k = random.choice([random.randint(1, 20), random.randint(1, 255)])
        m = random.randint(1, min(256 - k, random.choice([3, 12, 255])))
        code = Code(RS, k, m)
        right = _encoded(code, random.randint(1, 300), generator)
        have = random.sample(range(code.n), k)
        missing = [number for number in range(code.n) if number not in have]
        want = random.sample(missing, random.randint(1, len(missing)))
        places = Places(len(want), right[0].size)
        codec(code, name).reconstruct(
            {number: right[number] for number in have}, dict(zip(want, places.all(), strict=True))
        )
        for number, place in zip(want, places.all(), strict=True):
            assert np.array_equal(place, right[number]), (code, sorted(have), number)
        places.check_margins()


@every_engine
@pytest.mark.parametrize(("k", "m"), [(255, 1), (1, 255), (128, 128), (200, 56)])
def test_the_largest_codes(name: str, k: int, m: int, generator: np.random.Generator) -> None:
    code = Code(RS, k, m)
    right = _encoded(code, 33, generator)
    lost = random.sample(range(code.n), m)
    have = {number: right[number] for number in range(code.n) if number not in lost}
    out = {number: np.zeros(33, np.uint8) for number in lost}
    codec(code, name).reconstruct(have, out)
    assert all(np.array_equal(out[number], right[number]) for number in lost)


@every_engine
@pytest.mark.parametrize(
    "code",
    [Code(RS, k, m) for k in range(1, 6) for m in range(1, 4)]
    + [Code(XOR, k, 1) for k in range(1, 6)],
    ids=str,
)
def test_every_pattern_of_erasures(name: str, code: Code, generator: np.random.Generator) -> None:
    right = _encoded(code, 21, generator)
    tried = codec(code, name)
    for have in itertools.combinations(range(code.n), code.k):
        missing = [number for number in range(code.n) if number not in have]
        for count in range(1, len(missing) + 1):
            for want in itertools.combinations(missing, count):
                out = {number: np.zeros(21, np.uint8) for number in want}
                tried.reconstruct({number: right[number] for number in have}, out)
                for number, fragment in out.items():
                    assert np.array_equal(fragment, right[number]), (have, want, number)


@pytest.mark.parametrize(("encoder", "decoder"), itertools.product(NAMES, NAMES))
@pytest.mark.parametrize("code", [Code(RS, 6, 2), Code(RS, 3, 6), Code(XOR, 3, 1)], ids=str)
def test_fragments_of_any_engine_decode_with_any_other(
    encoder: str, decoder: str, code: Code, generator: np.random.Generator
) -> None:
    length = (1 << 20) + 3  # more than every engine's chunk
    data = generator.integers(0, 256, (code.k, length), np.uint8)
    fragments = np.concatenate([data, np.zeros((code.m, length), np.uint8)])
    codec(code, encoder).encode(list(data), list(fragments[code.k :]))
    lost = random.sample(range(code.n), code.m)
    out = {number: np.zeros(length, np.uint8) for number in lost}
    have = {number: fragments[number] for number in range(code.n) if number not in lost}
    codec(code, decoder).reconstruct(have, out)
    assert all(np.array_equal(out[number], fragments[number]) for number in lost)


@every_engine
def test_of_too_many_fragments_the_lowest_numbers_are_read(
    name: str, generator: np.random.Generator
) -> None:
    right = _encoded(Code(RS, 3, 3), 50, generator)
    wrong = generator.integers(0, 256, 50, np.uint8)
    out = np.zeros(50, np.uint8)
    have = {5: wrong, 3: right[3], 2: right[2], 0: right[0]}
    codec(Code(RS, 3, 3), name).reconstruct(have, {1: out})
    assert np.array_equal(out, right[1])
    assert list(have) == [5, 3, 2, 0]


@every_engine
def test_a_call_changes_nothing_but_its_outputs(name: str, generator: np.random.Generator) -> None:
    """zfec's own decode permutes the lists given, and the second call is wrong."""
    code = Code(RS, 4, 2)
    right = _encoded(code, 99, generator)
    have = {number: right[number].copy() for number in (5, 3, 0, 4)}
    order = list(have)
    for _ in range(3):
        out = {2: np.zeros(99, np.uint8), 1: np.zeros(99, np.uint8)}
        codec(code, name).reconstruct(have, out)
        assert np.array_equal(out[1], right[1])
        assert np.array_equal(out[2], right[2])
        assert list(have) == order
        assert all(np.array_equal(have[number], right[number]) for number in have)


@every_engine
def test_any_kind_of_buffer_will_do(name: str, generator: np.random.Generator) -> None:
    code = Code(RS, 3, 3)
    right = _encoded(code, 80, generator)
    with mmap.mmap(-1, 80) as mapped, mmap.mmap(-1, 4096) as page:
        array = bytearray(80)
        floats = np.zeros((2, 10), np.float32)
        data = [right[0].tobytes(), memoryview(right[1]).cast("B", (8, 10)), right[2].view("<u8")]
        view = memoryview(page)[7:87]
        codec(code, name).encode(data, [view, array, floats])
        assert (bytes(view), bytes(array), floats.tobytes()) == tuple(
            fragment.tobytes() for fragment in right[3:]
        )
        codec(code, name).reconstruct({3: view, 4: array, 5: floats}, {0: mapped})
        assert mapped[:] == right[0].tobytes()
        view.release()  # nothing keeps it: closing would raise


@every_engine
def test_sources_may_be_the_same_memory(name: str) -> None:
    zeros, out = np.zeros(40, np.uint8), [np.ones(40, np.uint8), np.ones(40, np.uint8)]
    codec(Code(RS, 4, 2), name).encode([zeros] * 4, out)
    assert not np.any(out)


@every_engine
def test_no_bytes_and_no_wishes_are_no_work(name: str) -> None:
    tried = codec(Code(RS, 2, 1), name)
    tried.encode([b"", b""], [bytearray()])
    tried.reconstruct({0: b"ab", 1: b"cd"}, {})


@every_engine
def test_threads_share_a_codec(name: str, generator: np.random.Generator) -> None:
    code = Code(RS, 4, 3)
    right = _encoded(code, 70_000, generator)
    shared = codec(code, name)

    def rebuild(have: tuple[int, ...]) -> bool:
        out = {number: np.zeros(70_000, np.uint8) for number in range(code.n) if number not in have}
        shared.reconstruct({number: right[number] for number in have}, out)
        return all(np.array_equal(out[number], right[number]) for number in out)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(rebuild, itertools.combinations(range(code.n), code.k)))


def _others_ran_during(work: Callable[[], object]) -> bool:
    """Whether this thread got the GIL while ``work`` had it to give away; never asks for it."""
    started, done = threading.Event(), []

    def run() -> None:
        started.set()
        work()
        done.append(True)

    thread = threading.Thread(target=run)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        thread.start()
        started.wait()
        return not done
    finally:
        sys.setswitchinterval(interval)
        thread.join()


@every_engine
def test_the_gil_is_released(name: str) -> None:
    code = Code(RS, 8, 2)
    blocks = list(np.ones((code.n, 4 << 20), np.uint8))
    tried = codec(code, name)
    assert any(
        _others_ran_during(lambda: tried.encode(blocks[: code.k], blocks[code.k :]))
        for _ in range(20)
    )


def test_the_gil_test_would_notice() -> None:
    text = bytes(32 << 20)
    table = bytes(range(256))
    assert not any(_others_ran_during(lambda: text.translate(table)) for _ in range(5))


# What is refused


def _rows(number: int, length: int = 10) -> list[Any]:
    return list(np.zeros((number, length), np.uint8))


STRIPED = np.zeros((10, 2), np.uint8)[:, 0]
JOINED = np.zeros(40, np.uint8)


@every_engine
@pytest.mark.parametrize(
    ("data", "parity", "says"),
    [
        (_rows(3), _rows(2), r"3 data buffers given, REED_SOLOMON \(4\+2\) has 4"),
        (_rows(5), _rows(2), "5 data buffers given"),
        ([], _rows(2), "0 data buffers given"),
        (_rows(4), _rows(1), "1 parity buffers given, .* has 2"),
        (_rows(4), _rows(3), "3 parity buffers given"),
        ([*_rows(3), *_rows(1, 11)], _rows(2), "by number: 0: 10, .*3: 11, 4: 10, 5: 10"),
        (_rows(4), [*_rows(1), *_rows(1, 9)], "differ in length.*4: 10, 5: 9"),
        (_rows(4), [*_rows(1), np.zeros(10, np.uint16)], "4: 10, 5: 20"),
        ([*_rows(3), b""], _rows(2), "3: 0"),
        ([*_rows(3), "text"], _rows(2), "fragment 3 is a str, not a buffer of bytes"),
        ([*_rows(3), None], _rows(2), "fragment 3 is a NoneType, not a buffer"),
        ([*_rows(3), np.zeros(10, "M8[s]")], _rows(2), "fragment 3 is a ndarray, not a buffer"),
        ([*_rows(3), STRIPED], _rows(2), r"fragment 3 is not contiguous: strides \(2,\)"),
        (_rows(4), [*_rows(1), STRIPED], "fragment 5 is not contiguous"),
        (_rows(4), [*_rows(1), bytes(10)], "5 is to be written, but its bytes is read-only"),
        (_rows(4), [JOINED[:10], JOINED[:10]], "5 is to be written and overlaps .* 4 by 10 bytes"),
        (_rows(4), [JOINED[:10], JOINED[9:19]], "5 is to be written and overlaps .* 4 by 1 bytes"),
        ([*_rows(3), JOINED[5:15]], [JOINED[:10], JOINED[20:30]], "3 is read and overlaps .* 4"),
        ([*_rows(3), JOINED[:10]], [JOINED[5:15], JOINED[20:30]], "4 is to be written and overl"),
        ([*_rows(3), JOINED[:10]], [JOINED[:10], JOINED[20:30]], "overlaps fragment"),
    ],
)  # fmt: skip
def test_buffers_that_do_not_fit_are_named(name: str, data: Any, parity: Any, says: str) -> None:
    with pytest.raises(FragmentError, match=says):
        codec(Code(RS, 4, 2), name).encode(data, parity)


def test_overlap_is_found_past_what_was_looked_at_last() -> None:
    """A long buffer that reaches over others is met again behind them."""
    memory = np.zeros(100, np.uint8)
    tried = codec(Code(RS, 2, 2))
    shifted = [memory[0:20], memory[10:30]]  # sources may
    tried.encode(shifted, [memory[30:50], memory[50:70]])
    with pytest.raises(FragmentError, match="fragment 3 is to be written and overlaps fragment 1"):
        tried.encode(shifted, [memory[30:50], memory[29:49]])
    with pytest.raises(FragmentError, match="fragment 1 is read and overlaps fragment 2 by 1"):
        tried.encode([memory[60:80], memory[49:69]], [memory[30:50], memory[80:100]])


@every_engine
@pytest.mark.parametrize(
    ("have", "want", "says"),
    [
        ((0, 1, 6), (2,), r"fragment 6: REED_SOLOMON \(4\+2\) has the numbers 0 to 5"),
        ((0, 1, 2, -1), (3,), "fragment -1"),
        ((0, 1, 2, 3), (6,), "fragment 6"),
        ((0, 1, 2, 3), (-1,), "fragment -1"),
        ((0, 1, 2, 3), (1 << 40,), "fragment 1099511627776"),
        ((0, 1, 2, 3.0), (4,), r"fragment 3\.0"),
        ((0, 1, 2, "3"), (4,), "fragment '3'"),
        ((0, 1, 2, 3), (3, 4, 2), r"fragments \[2, 3\] are given both as present and as wanted"),
    ],
)
def test_numbers_that_do_not_fit_are_named(name: str, have: Any, want: Any, says: str) -> None:
    out = {number: np.full(10, 7, np.uint8) for number in want}
    with pytest.raises(FragmentError, match=says):
        codec(Code(RS, 4, 2), name).reconstruct(dict(zip(have, _rows(9), strict=False)), out)
    assert all((fragment == 7).all() for fragment in out.values())


@every_engine
def test_too_few_are_counted(name: str) -> None:
    out = np.full(10, 7, np.uint8)
    with pytest.raises(
        TooFewFragmentsError,
        match=re.escape("3 fragments are left, [0, 2, 5]; REED_SOLOMON (4+2) needs 4"),
    ):
        codec(Code(RS, 4, 2), name).reconstruct(
            dict(zip((5, 0, 2), _rows(3), strict=True)), {1: out}
        )
    with pytest.raises(TooFewFragmentsError, match=re.escape("0 fragments are left, []")):
        codec(Code(XOR, 1, 1), name).reconstruct({}, {1: out})
    assert (out == 7).all()


def test_lengths_of_fragments_that_are_not_read_count_too() -> None:
    have = dict(enumerate([*_rows(4), *_rows(1, 12)]))
    with pytest.raises(FragmentError, match="4: 12, 5: 10"):
        codec(Code(RS, 4, 2)).reconstruct(have, {5: np.zeros(10, np.uint8)})


# How an engine is chosen


@pytest.fixture
def fresh() -> Iterator[None]:
    """Engines are chosen anew, in this test and after it."""
    for forget in (engines._checked, engines._default):
        forget.cache_clear()
    yield
    for forget in (engines._checked, engines._default):
        forget.cache_clear()


class Broken:
    """numpy, spoilt."""

    name = "broken"

    def __init__(self, spoil: Callable[[Code, list[int], list[Fragment]], None]) -> None:
        self._right = NumpyEngine()
        self._spoil = spoil

    def compute(
        self, code: Code, sources: Mapping[int, Fragment], outputs: Mapping[int, Fragment]
    ) -> None:
        self._right.compute(code, sources, outputs)
        self._spoil(code, list(sources), list(outputs.values()))


def _flip(at: int) -> Callable[[Code, list[int], list[Fragment]], None]:
    def spoil(code: Code, have: list[int], out: list[Fragment]) -> None:
        out[-1][at] ^= 1

    return spoil


def _forget(code: Code, have: list[int], out: list[Fragment]) -> None:
    for fragment in out:
        fragment.fill(0xA5)


def _exchange(code: Code, have: list[int], out: list[Fragment]) -> None:
    out[0][:], out[-1][:] = out[-1].copy(), out[0].copy()


def _write_past(distance: int) -> Callable[[Code, list[int], list[Fragment]], None]:
    def spoil(code: Code, have: list[int], out: list[Fragment]) -> None:
        ctypes.memset(out[0].ctypes.data + (distance if distance < 0 else out[0].size), 0, 1)

    return spoil


def _only(condition: Callable[[Code, list[int], list[Fragment]], bool]) -> Any:
    def spoil(code: Code, have: list[int], out: list[Fragment]) -> None:
        if condition(code, have, out):
            out[0][out[0].size // 2] ^= 0x80

    return spoil


FAULTS = {
    "first byte": _flip(0),
    "last byte": _flip(-1),
    "nothing written": _forget,
    "outputs exchanged": _exchange,
    "byte after the end": _write_past(0),
    "byte before the start": _write_past(-1),
    "decoding only": _only(lambda code, have, out: have != list(range(code.k))),
    "encoding only": _only(lambda code, have, out: have == list(range(code.k))),
    "many rows only": _only(lambda code, have, out: len(out) > 6),
    "long only": _only(lambda code, have, out: out[0].size > 4096),
    "short only": _only(lambda code, have, out: out[0].size < 16),
    "odd length only": _only(lambda code, have, out: out[0].size % 16 != 0),
    "aligned only": _only(lambda code, have, out: out[0].ctypes.data % 64 == 0),
    "odd address only": _only(lambda code, have, out: out[0].ctypes.data % 16 != 0),
    "XOR only": _only(lambda code, have, out: code.kind is XOR),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_engine_that_computes_wrongly_is_rejected(fault: str) -> None:
    with pytest.raises(EngineError, match=r"engine broken fails its self-test: .* it is not used"):
        check(Broken(FAULTS[fault]))


@every_engine
def test_engines_that_are_here_pass(name: str) -> None:
    check(engines.ENGINES[name]())


@pytest.mark.usefixtures("fresh")
def test_isal_is_the_default_and_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    made = codec(Code(RS, 4, 2))
    assert made.engine == "isal"
    assert made.code == Code(RS, 4, 2)
    assert not caplog.records


def _warning(caplog: pytest.LogCaptureFixture) -> str:
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    return record.getMessage()


@pytest.mark.usefixtures("fresh")
def test_without_isal_numpy_does_it_and_one_warning_says_what_is_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, generator: Any
) -> None:
    monkeypatch.setattr(isal, "_bundled", list)
    monkeypatch.setattr(isal, "_SYSTEM_LIBRARY", "libnot-here.so.2")
    made = [codec(Code(RS, 4, 2)), codec(Code(XOR, 3, 1))]
    assert [one.engine for one in made] == ["numpy", "numpy"]
    said = _warning(caplog)
    found = re.match(
        r"erasure coding runs on numpy, at ([\d.]+) GB/s a core where memory is copied at "
        r"([\d.]+) GB/s, which ISA-L would keep up with: ISA-L cannot be loaded \(libnot-here",
        said,
    )
    assert found, said
    assert 0 < float(found[1]) < float(found[2])
    assert "pip install pyeclib, or install libisal2" in said
    right = _encoded(Code(RS, 4, 2), 30, generator)
    out = _rows(2, 30)
    made[0].encode(right[:4], out)
    assert np.array_equal(out, right[4:])


@pytest.mark.usefixtures("fresh")
def test_a_wrong_isal_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(engines.ENGINES, "isal", lambda: Broken(FAULTS["first byte"]))
    assert codec(Code(RS, 4, 2)).engine == "numpy"
    assert "fails its self-test" in _warning(caplog)
    with pytest.raises(EngineError, match="fails its self-test"):
        codec(Code(RS, 4, 2), "isal")


@pytest.mark.usefixtures("fresh")
def test_if_nothing_computes_rightly_all_reasons_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setitem(engines.ENGINES, name, lambda: Broken(FAULTS["last byte"]))
    with pytest.raises(EngineError, match=r"fails its self-test.*;.*fails its self-test.*;"):
        codec(Code(RS, 4, 2))


@pytest.mark.usefixtures("fresh")
def test_a_library_that_is_not_isal_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isal, "_bundled", list)
    monkeypatch.setattr(isal, "_SYSTEM_LIBRARY", "libc.so.6")
    with pytest.raises(EngineError, match="undefined symbol: ec_init_tables"):
        codec(Code(RS, 4, 2), "isal")


def test_without_pyeclib_there_is_no_bundled_library(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(isal._bundled()) == 1

    def missing(name: str) -> None:
        raise isal.PackageNotFoundError(name)

    monkeypatch.setattr(isal, "distribution", missing)
    assert isal._bundled() == []


@pytest.mark.usefixtures("fresh")
def test_zfec_asked_for_and_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zfec", None)
    with pytest.raises(EngineError, match=r"zfec cannot be imported .*; pip install zfec"):
        codec(Code(RS, 4, 2), "zfec")


def test_an_engine_that_does_not_exist() -> None:
    with pytest.raises(EngineError, match="no erasure coding engine 'isa-l', only isal, numpy, zf"):
        codec(Code(RS, 4, 2), "isa-l")


def test_a_codec_takes_any_engine() -> None:
    """The protocol is all that a codec needs."""
    engine: Engine = Broken(_flip(0))
    out = _rows(1)
    Codec(Code(XOR, 2, 1), engine).encode(_rows(2), out)
    assert out[0].tolist() == [1] + 9 * [0]
