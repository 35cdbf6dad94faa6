"""A rank's own portion of a state, and what its replicas share, make the whole again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from mnemo.errors import IntegrityError
from mnemo.snapshot import tree
from mnemo.snapshot.listing import module_state, optimizer_state
from mnemo.snapshot.portion import Form, Portions, join, open_page, room_for
from mnemo.snapshot.rng import capture_rng

if TYPE_CHECKING:
    from collections.abc import Iterator


class Training:
    """A model with buffers and an optimizer, and its state as a session has it."""

    def __init__(self, *, stable: bool = True) -> None:
        self.model = torch.nn.Sequential(
            torch.nn.Linear(300, 50), torch.nn.BatchNorm1d(50), torch.nn.Linear(50, 1)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self._known: dict[str, tree.Part] = {}
        self._stable = stable
        self.steps = 0

    def step(self) -> None:
        self.model(torch.randn(8, 300)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def replicated(self) -> Iterator[torch.Tensor]:
        yield from self.model.parameters()
        for state in self.optimizer.state.values():
            yield from state.values()

    def taken(self) -> tree.TakenApart:
        state: dict[str, Any] = {
            "rng": capture_rng(),
            "model": module_state(self.model) if self._stable else self.model.state_dict(),
            "optimizer": optimizer_state(self.optimizer)
            if self._stable
            else self.optimizer.state_dict(),
            "metric": torch.full((5000,), self.steps),
            "steps": self.steps,
        }
        return tree.take_apart(state, self._known)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(v, other[k]) for k, v in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _whole(taken: tree.TakenApart) -> Any:
    tensors = [tensor.detach().clone() for _, tensor in taken.all_tensors()]
    return tree.unpack(taken.pack(), lambda i: tensors[i], trusted=True)


@pytest.mark.parametrize("stable", [True, False])
def test_both_together_are_the_state_of_that_step(stable: bool) -> None:
    training = Training(stable=stable)
    portions = Portions({"model": "m"}, training.replicated)
    for _ in range(3):
        training.step()
        taken = training.taken()
        whole = _whole(taken)
        raw, shared = portions.take(training.steps, None, taken)
        given = room_for(open_page(raw).form)
        for target, source in zip(given, shared, strict=True):
            target.copy_(source.detach())
        training.step()  # what was taken stays as it was
        page = open_page(raw)
        assert page.step == training.steps - 1
        assert page.form.identity == {"model": "m"}
        assert _same(join(page, given), whole)


@pytest.mark.parametrize("stable", [True, False])
def test_what_replicas_hold_is_not_in_the_portion(stable: bool) -> None:
    training = Training(stable=stable)
    training.step()
    portions = Portions({}, training.replicated)
    raw, shared = portions.take(1, None, training.taken())
    large = {t.data_ptr() for t in training.replicated() if t.nbytes > 16384}
    assert large <= {t.data_ptr() for t in shared}
    assert not {b.data_ptr() for b in training.model.buffers()} & {t.data_ptr() for t in shared}
    assert portions.own_size > 5000 * 8
    assert len(raw) < portions.own_size + 40_000


def test_replicas_share_the_same_tensors_in_the_same_order() -> None:
    one, other = Training(), Training()
    digests = []
    for training in (one, other):
        training.step()
        portions = Portions({}, training.replicated)
        raw, shared = portions.take(1, None, training.taken())
        digests.append(portions.digest)
        form = open_page(raw).form
        assert form.digest() == portions.digest
        assert [t.shape for t in shared] == [tuple(e.shape) for e in form.shared_entries()]
    assert digests[0] == digests[1]
    one.model.append(torch.nn.Linear(1, 1))
    portions = Portions({}, one.replicated)
    portions.take(1, None, one.taken())
    assert portions.digest != digests[1]


def test_what_is_the_same_at_each_step_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be a thousand tensors, and nothing of them has changed."""
    asked = []
    monkeypatch.setattr(Form, "digest", lambda form: asked.append(form) or 7)
    training = Training()
    training.step()
    portions = Portions({}, training.replicated)
    for step in range(3):
        portions.take(step, None, training.taken())
    assert len(asked) == 1


def test_a_parameter_that_moves_is_still_shared() -> None:
    training = Training()
    training.step()
    portions = Portions({}, training.replicated)
    portions.take(1, None, training.taken())
    weight = training.model[0].weight
    weight.data = weight.data.clone()
    taken = training.taken()
    raw, shared = portions.take(1, None, taken)
    assert weight.data_ptr() in {t.data_ptr() for t in shared}
    assert _same(join(open_page(raw), [t.detach() for t in shared]), _whole(taken))


def test_other_bytes_are_refused() -> None:
    with pytest.raises(IntegrityError, match="cannot be read"):
        open_page(b"\xc1other")
