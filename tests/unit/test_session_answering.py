from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from mnemo.recovery.control import Ask, Doing
from mnemo.session.answering import answer

if TYPE_CHECKING:
    from pathlib import Path

WAIT = "def wait(thread):\n    thread.start(); thread.join()\n"


def ask_during(wait: Any, ask: Ask) -> Doing:
    """What another thread answers while this one waits for it."""
    said: list[Doing] = []
    wait(threading.Thread(target=lambda: said.append(answer(ask))))
    return said[0]


def waits_in(module: str) -> Any:
    names: dict[str, Any] = {"__name__": module}
    exec(compile(WAIT, "/program/train.py", "exec"), names)
    return names["wait"]


def test_the_place_is_the_programs_own() -> None:
    """Not that in threading, where it waits."""
    said = ask_during(waits_in("train"), Ask(7))
    assert (said.number, said.place, said.debugged) == (7, "wait (train.py:2)", False)
    assert (said.groups, said.messages) == ({}, 0)


def test_a_debugger_is_noticed() -> None:
    assert ask_during(waits_in("pdb"), Ask(1)).debugged


def test_stacks_of_all_threads_are_written(tmp_path: Path) -> None:
    stop = threading.Event()
    other = threading.Thread(target=stop.wait, name="the other one")
    other.start()
    try:
        ask_during(waits_in("train"), Ask(1, str(tmp_path / "stacks.txt")))
    finally:
        stop.set()
        other.join()
    text = (tmp_path / "stacks.txt").read_text()
    assert f"Thread 0x{other.ident:016x} is the other one\n" in text
    assert f"Thread 0x{other.ident:016x} (most" in text or f"Thread 0x{other.ident:016x} [" in text
    assert 'File "/program/train.py", line 2 in wait' in text


def test_stacks_that_cannot_be_written_are_no_reason_not_to_answer(tmp_path: Path) -> None:
    assert answer(Ask(3, str(tmp_path / "nowhere" / "x"))).number == 3
