from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading

import pytest

from mnemo.config.uncaught import AGENT_VARIABLE
from mnemo.errors import ProtocolError
from mnemo.recovery import control
from mnemo.recovery.control import Alive, Back, Cannot, Channel, Lost, Message, Replaceable

MESSAGES: list[Message] = [
    Replaceable(True),
    Replaceable(False, "a hook"),
    Lost(2, (1, 3), "rank 1 killed by SIGKILL", (0, 1, 0, 2)),
    Back(2, 14, {"state": 12.5}, 0),
    Cannot(2, "ü" * 10_000),
]


def test_messages_stay_whole_and_in_order() -> None:
    ours, theirs = Channel.pair()
    rank = Channel(theirs)
    for message in MESSAGES:
        assert rank.tell(message)
    assert [ours.receive() for _ in MESSAGES] == MESSAGES
    with pytest.raises(BlockingIOError):
        ours.receive()
    rank.close()
    assert ours.receive() is None
    assert not ours.tell(MESSAGES[2])
    ours.close()


def test_strangers_words_are_no_message() -> None:
    ours, theirs = Channel.pair()
    with theirs:
        theirs.send(b'{"type": "lost", "epoch": "x"}')
        with pytest.raises(ProtocolError, match="epoch"):
            ours.receive()
    ours.close()


def test_who_reads_nothing_is_not_waited_for() -> None:
    ours, theirs = Channel.pair()
    with theirs:
        while ours.tell(MESSAGES[2]):
            pass
    ours.close()


def test_hanging_up_ends_a_wait() -> None:
    ours, theirs = Channel.pair()
    rank = Channel(theirs)
    heard: list[Message | None] = [MESSAGES[0]]
    thread = threading.Thread(target=lambda: heard.append(rank.receive()))
    thread.start()
    rank.close()
    thread.join()
    assert heard[1] is None
    ours.close()


CONNECT = """
from mnemo.recovery import control
channel = control.connect()
print(channel is not None and channel.tell(control.Replaceable(True)), control.joins())
"""


def connects(environ: dict[str, str], *fds: int) -> str:
    done = subprocess.run(
        [sys.executable, "-c", CONNECT],
        env={**os.environ, **environ}, pass_fds=fds, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def test_only_the_agents_own_rank_is_connected() -> None:
    ours, theirs = Channel.pair()
    with theirs, socket.socket() as other:
        fd, me = theirs.fileno(), f"{os.getpid()}-1"
        own = {AGENT_VARIABLE: me, control.CONTROL_VARIABLE: str(fd), control.JOIN_VARIABLE: "3"}
        assert connects(own, fd) == "True 3"
        assert isinstance(ours.receive(), Alive)
        assert ours.receive() == Replaceable(True)
        # what a rank starts inherits the variables alone, or is not the agent's child
        assert connects(own) == "False 3"
        assert connects({**own, AGENT_VARIABLE: "1-1"}, fd) == "False 3"
        inherited = {**own, control.CONTROL_VARIABLE: str(other.fileno())}
        assert connects(inherited, other.fileno()) == "False 3"
        assert connects({AGENT_VARIABLE: me}) == "False None"
    ours.close()
