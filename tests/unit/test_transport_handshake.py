"""The handshake and what it leads to, without a socket: who gets through, and what passes."""

from __future__ import annotations

import hmac
from itertools import permutations

import msgspec
import pytest

from mnemo.errors import AuthenticationError, FrameError
from mnemo.transport import frames, handshake
from mnemo.transport.frames import Body, Head, Kind, Limits
from mnemo.transport.handshake import (
    CallerSide,
    Challenge,
    Hello,
    Identity,
    ListenerSide,
    Session,
    Welcome,
)

SECRET = bytes(range(32))
A = Identity(node="a", run="r", secret=SECRET)
B = Identity(node="b", run="r", secret=SECRET)


def meet(caller: Identity = A, listener: Identity = B) -> tuple[Session, Session]:
    """Run the handshake; the sessions of caller and listener."""
    here, there = CallerSide(caller, "there", None), ListenerSide(listener, "here")
    welcome, theirs = there.welcome(here.answer(there.challenge()))
    mine = here.finish(welcome)
    assert (theirs.node, mine.node) == (caller.node, listener.node)
    assert (theirs.name, mine.name) == (f"{caller.node} at here", f"{listener.node} at there")
    return mine, theirs


def signed(session: Session, text: bytes = b"m") -> Head:
    head = frames.encode(Kind.MESSAGE, text, 0, Limits())
    return Head(Kind.MESSAGE, head, text, session.sign(head), 0)


def test_both_sides_have_the_same_keys_and_each_exchange_has_its_own() -> None:
    mine, theirs = meet()
    for _ in range(3):
        theirs.check(signed(mine))
        mine.check(signed(theirs))
    other, _ = meet()
    with pytest.raises(FrameError, match="a at here: sent a message whose MAC is wrong"):
        meet()[1].check(signed(other))


# --- who does not get through ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        Identity(node="a", run="r", secret=bytes(32)),
        Identity(node="a", run="another", secret=SECRET),
    ],
    ids=["secret", "run"],
)
def test_neither_side_takes_one_with_another_secret_or_of_another_run(wrong: Identity) -> None:
    there, here = ListenerSide(B, "10.0.0.1:4000"), CallerSide(wrong, "10.0.0.2:5000", None)
    with pytest.raises(AuthenticationError) as caught:
        there.welcome(here.answer(there.challenge()))
    assert str(caught.value) == (
        "10.0.0.1:4000: not authenticated: a has not the secret of run r (the same "
        "MNEMO_SECRET_FILE and run id are needed on all nodes)"
    )
    with pytest.raises(AuthenticationError, match=r"10.0.0.2:5000: not authenticated: .*says b"):
        here.finish(handshake.REFUSAL)

    # A listener that cannot tell, or pretends, is found out by its own proof.
    here = CallerSide(A, "10.0.0.2:5000", None)
    here.answer(there.challenge())
    for proof in (bytes(32), hmac.digest(bytes(32), b"anything", "sha256")):
        with pytest.raises(AuthenticationError, match="not authenticated: b has not the secret"):
            here.finish(msgspec.msgpack.encode(Welcome(proof)))


def test_a_recorded_answer_is_good_for_one_challenge() -> None:
    first, here = ListenerSide(B, "x"), CallerSide(A, "y", None)
    recorded = here.answer(first.challenge())
    first.welcome(recorded)
    with pytest.raises(AuthenticationError):
        ListenerSide(B, "x").welcome(recorded)


def test_a_recorded_welcome_is_good_for_one_caller() -> None:
    there, first = ListenerSide(B, "x"), CallerSide(A, "y", None)
    challenge = there.challenge()
    recorded = there.welcome(first.answer(challenge))[0]
    second = CallerSide(A, "y", None)
    second.answer(challenge)
    with pytest.raises(AuthenticationError):
        second.finish(recorded)


def test_an_answer_is_not_good_at_another_node() -> None:
    """A listener cannot hand on a caller's proof to a third node that it claims to be."""
    third = ListenerSide(Identity(node="c", run="r", secret=SECRET), "x")
    theirs = msgspec.msgpack.decode(third.challenge(), type=Challenge)
    relayed = CallerSide(A, "y", None).answer(msgspec.msgpack.encode(Challenge("b", theirs.nonce)))
    with pytest.raises(AuthenticationError):
        third.welcome(relayed)


def test_a_challenge_reflected_proves_nothing() -> None:
    """Whoever has no secret asks b itself for the proof that b wants."""
    there = ListenerSide(B, "x")
    theirs = msgspec.msgpack.decode(there.challenge(), type=Challenge)

    # As b calls somebody else: b signs as a caller of that name.
    hello = msgspec.msgpack.decode(
        CallerSide(B, "y", None).answer(msgspec.msgpack.encode(Challenge("a", theirs.nonce))),
        type=Hello,
    )
    for node in ("a", "b"):
        with pytest.raises(AuthenticationError):
            there.welcome(msgspec.msgpack.encode(Hello(node, hello.nonce, hello.proof)))

    # As b under its own name: b knows better.
    with pytest.raises(AuthenticationError, match="calls itself b, which is this node"):
        CallerSide(B, "y", None).answer(there.challenge())

    # The listener's own proof back at it.
    here = CallerSide(A, "y", None)
    mine = msgspec.msgpack.decode(here.answer(there.challenge()), type=Hello)
    with pytest.raises(AuthenticationError):
        here.finish(msgspec.msgpack.encode(Welcome(mine.proof)))


def test_a_proof_covers_the_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    there, here = ListenerSide(B, "x"), CallerSide(A, "y", None)
    answer = here.answer(there.challenge())
    monkeypatch.setattr(handshake, "PROTOCOL", frames.PROTOCOL + 1)
    with pytest.raises(AuthenticationError):
        there.welcome(answer)


def test_a_proof_covers_names_and_nonce() -> None:
    there, here = ListenerSide(B, "x"), CallerSide(A, "y", None)
    hello = msgspec.msgpack.decode(here.answer(there.challenge()), type=Hello)
    for changed in (
        Hello("c", hello.nonce, hello.proof),
        Hello("a", bytes(16), hello.proof),
        Hello("a", hello.nonce, hello.proof[:-1] + bytes((hello.proof[-1] ^ 1,))),
    ):
        with pytest.raises(AuthenticationError):
            there.welcome(msgspec.msgpack.encode(changed))


def test_another_node_than_expected() -> None:
    with pytest.raises(AuthenticationError, match=r"c at 10.0.0.2:5000: b answers there, not c"):
        CallerSide(A, "10.0.0.2:5000", "c").answer(ListenerSide(B, "x").challenge())


def test_two_nodes_of_one_name() -> None:
    with pytest.raises(AuthenticationError, match="x: calls itself b, which is this node"):
        ListenerSide(B, "x").welcome(msgspec.msgpack.encode(Hello("b", bytes(16), bytes(32))))


@pytest.mark.parametrize(
    "word",
    [
        b"",
        b"\xc0",
        msgspec.msgpack.encode(Challenge("a", bytes(16))),
        msgspec.msgpack.encode(Hello("a", bytes(15), bytes(32))),
        msgspec.msgpack.encode(Hello("a", bytes(16), bytes(33))),
        msgspec.msgpack.encode(Hello("", bytes(16), bytes(32))),
        msgspec.msgpack.encode(Hello("a\n", bytes(16), bytes(32))),
        msgspec.msgpack.encode(Hello("\x1b[2J", bytes(16), bytes(32))),
        msgspec.msgpack.encode(Hello("a" * 65, bytes(16), bytes(32))),
        handshake.REFUSAL,
    ],
)
def test_no_answer(word: bytes) -> None:
    with pytest.raises(FrameError, match="x: sent what is no message here"):
        ListenerSide(B, "x").welcome(word)


def test_no_challenge_and_no_reply() -> None:
    here = CallerSide(A, "y", None)
    with pytest.raises(FrameError, match="y: sent what is no message here"):
        here.answer(handshake.REFUSAL)
    challenge = ListenerSide(B, "x").challenge()
    here.answer(challenge)
    with pytest.raises(FrameError, match="y: sent what is no message here"):
        here.finish(challenge)


# --- what a session lets pass ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "order", [order for order in permutations(range(3)) if order != (0, 1, 2)], ids=str
)
def test_frames_pass_in_their_order_only(order: tuple[int, ...]) -> None:
    mine, theirs = meet()
    sent = [signed(mine, b"%d" % number) for number in range(3)]
    with pytest.raises(FrameError):
        _ = [theirs.check(sent[number]) for number in order]


def test_a_frame_repeated_left_out_or_sent_back_does_not_pass() -> None:
    mine, theirs = meet()
    first = signed(mine)
    theirs.check(first)
    with pytest.raises(FrameError):
        theirs.check(first)
    mine, theirs = meet()
    signed(mine)
    with pytest.raises(FrameError):
        theirs.check(signed(mine))
    mine, theirs = meet()
    with pytest.raises(FrameError):
        mine.check(signed(mine))


def test_a_payload_passes_beside_its_own_message_only() -> None:
    mine, theirs = meet()
    first = signed(mine)
    tag = mine.sign_payload(7)
    theirs.check(first)
    theirs.check_payload(Body(7, tag))
    with pytest.raises(
        FrameError, match="a at here: sent a payload that did not arrive as it was sent"
    ):
        theirs.check_payload(Body(8, tag))
    theirs.check(signed(mine))
    with pytest.raises(FrameError):
        theirs.check_payload(Body(7, tag))


def test_a_payloads_tag_is_no_messages() -> None:
    mine, theirs = meet()
    head = signed(mine)
    eight = (7).to_bytes(8, "little")
    with pytest.raises(FrameError):
        theirs.check(Head(Kind.MESSAGE, eight, eight, mine.sign_payload(7), 0))
    del head


# --- who one is -----------------------------------------------------------------------------------


def test_nothing_shows_the_secret_or_a_key() -> None:
    here, there = CallerSide(A, "y", None), ListenerSide(B, "x")
    here.answer(there.challenge())
    for thing in (A, here, there, here._exchange, *meet()):
        assert repr(SECRET) not in repr(thing)
        assert SECRET.hex() not in repr(thing)
    assert "secret" not in repr(A)


@pytest.mark.parametrize("node", ["", "a b", "a\n", "-a", "a" * 65, "ä", "a/b"])
def test_a_node_needs_a_name(node: str) -> None:
    with pytest.raises(ValueError, match="is no name of a node: up to 64 letters"):
        Identity(node=node, run="r", secret=SECRET)


def test_a_node_needs_a_secret() -> None:
    with pytest.raises(ValueError, match="a secret of 15 bytes is too short"):
        Identity(node="a", run="r", secret=bytes(15))
