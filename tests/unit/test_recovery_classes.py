from __future__ import annotations

import pytest

from mnemo.recovery import Rung
from mnemo.recovery.classes import RUNGS, Kind, classify, in_words

TRACE = "Traceback (most recent call last):\n  File 'train.py', line 9, in <module>\n"
OOM = "CUDA out of memory. Tried to allocate 2.00 GiB."
ASSERT = "CUDA error: device-side assert triggered"
SIDE = f"{ASSERT}\nCUDA kernel errors might be asynchronously reported at some other API call.\n"
ILLEGAL = "CUDA error: an illegal memory access was encountered"
HOST = "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"
PEER = "process group '0' lost rank 1"
GLOO = "[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4711"


@pytest.mark.parametrize(
    ("code", "out_of_memory", "text", "kind", "words"),
    [
        (-9, False, "", Kind.PEER_LOST, "killed by SIGKILL"),
        (-9, True, "", Kind.HOST_MEMORY, "killed (out of host memory)"),
        (-11, True, "", Kind.PEER_LOST, "killed by SIGSEGV"),
        (-63, False, "", Kind.PEER_LOST, "killed by signal 63"),
        (-9, False, "ValueError: long ago", Kind.PEER_LOST, "killed by SIGKILL"),
        (3, False, "epoch 1 loss 2.5", Kind.PEER_LOST, "exited with code 3"),
        (3, False, f"{TRACE}ValueError: caught\nthe end", Kind.PEER_LOST, "exited with code 3"),
        (0, False, "", Kind.LEFT, "exited with code 0"),
        (75, False, "", Kind.PREEMPTION, "exited with code 75"),
        (76, False, "", Kind.PREEMPTION, "exited with code 76"),
    ],
)
def test_the_end_of_a_process(
    code: int, out_of_memory: bool, text: str, kind: Kind, words: str
) -> None:
    failure = classify(code, text.splitlines(), out_of_memory=out_of_memory)
    assert (failure.kind, failure.words, failure.error) == (kind, words, "")


@pytest.mark.parametrize(
    ("text", "kind", "error"),
    [
        ("ValueError: bad batch", Kind.EXCEPTION, "ValueError: bad batch"),
        ("[rank3]: ValueError: bad batch\n\n", Kind.EXCEPTION, "ValueError: bad batch"),
        (f"{TRACE}ValueError: of\ntwo lines\nanother's", Kind.EXCEPTION, "ValueError: of"),
        (
            f"[rank1]: {TRACE}[rank1]: ValueError: of\n[rank1]: two",
            Kind.EXCEPTION,
            "ValueError: of",
        ),
        (f"{TRACE}KeyError: 1\n\n{TRACE}OSError: 2\n.", Kind.EXCEPTION, "OSError: 2"),
        ("KeyboardInterrupt", Kind.EXCEPTION, "KeyboardInterrupt"),
        (f"torch.OutOfMemoryError: {OOM}", Kind.DEVICE_MEMORY, f"torch.OutOfMemoryError: {OOM}"),
        (f"{TRACE}RuntimeError: {SIDE}", Kind.DEVICE_ERROR, f"RuntimeError: {ASSERT}"),
        (f"{TRACE}torch.AcceleratorError: {SIDE}", Kind.DEVICE_ERROR,
         f"torch.AcceleratorError: {ASSERT}"),
        (f"RuntimeError: {ILLEGAL}", Kind.DEVICE_ERROR, f"RuntimeError: {ILLEGAL}"),
        ("MemoryError", Kind.HOST_MEMORY, "MemoryError"),
        (f"RuntimeError: {HOST}", Kind.HOST_MEMORY, f"RuntimeError: {HOST}"),
        (f"mnemo.errors.GroupBrokenError: {PEER}", Kind.LINK_LOST,
         f"mnemo.errors.GroupBrokenError: {PEER}"),
        (f"RuntimeError: {GLOO}", Kind.LINK_LOST, f"RuntimeError: {GLOO}"),
    ],
)  # fmt: skip
def test_an_exception(text: str, kind: Kind, error: str) -> None:
    failure = classify(1, text.splitlines(), out_of_memory=True)
    assert (failure.kind, failure.error) == (kind, error)
    assert failure.words == f"exited with code 1 ({error})"


def test_what_the_agent_or_the_process_itself_says_comes_first() -> None:
    hung = classify(-9, ["ValueError: x"], out_of_memory=True, hang="hangs in step")
    assert (hung.kind, hung.words) == (Kind.HANG, "hangs in step")
    refused = classify(1, ["ValueError: x"], refusal="no such setting")
    assert (refused.kind, refused.words) == (
        Kind.REFUSAL,
        "found a wrong setting (no such setting)",
    )


@pytest.mark.parametrize(
    ("code", "line", "refuses"),
    [
        (1, "mnemo.errors.IdentityError: of 3 ranks", True),
        (1, "[rank11]: mnemo.errors.IdentityError: of 3 ranks", True),
        (-9, "mnemo.errors.IdentityError: of 3 ranks", False),
        (1, "mnemo.errors.StorageError: it is full", False),
        (1, "says mnemo.errors.IdentityError: of 3 ranks", False),
        (2, "train.py: error: no such flag", True),
        (1, "train.py: error: no such flag", False),
    ],
)
def test_what_a_restart_would_not_mend(code: int, line: str, refuses: bool) -> None:
    failure = classify(code, ["", line, ""])
    assert (failure.kind is Kind.REFUSAL) is refuses
    assert (failure.rung is Rung.STOP) is refuses


def test_every_kind_has_a_rung() -> None:
    assert set(RUNGS) == set(Kind)


def test_a_long_message_is_cut_in_words_alone() -> None:
    failure = classify(1, ["ValueError: " + "x" * 5000])
    assert len(failure.words) < 250
    assert len(failure.error) > 5000


def test_the_last_words_are_the_whole_traceback_or_some_lines() -> None:
    trace = ["Traceback (most recent call last):", *["  File"] * 50, "ValueError: x"]
    assert classify(1, [*map(str, range(40)), *trace]).last_words == tuple(trace)
    assert classify(1, [*map(str, range(40))]).last_words == tuple(map(str, range(20, 40)))


def test_codes_in_words() -> None:
    assert [in_words(code) for code in (0, 3, -15)] == [
        "exited with code 0",
        "exited with code 3",
        "killed by SIGTERM",
    ]
