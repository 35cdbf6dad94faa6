"""A state taken apart and put together is the state that it was."""

from __future__ import annotations

import pickle
from collections import OrderedDict, defaultdict, namedtuple
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mnemo.snapshot import tree
from mnemo.snapshot.listing import join_module_state, module_state
from mnemo.snapshot.tree import Stable

if TYPE_CHECKING:
    from collections.abc import Callable

Pair = namedtuple("Pair", ["left", "right"])  # noqa: PYI024 - what users have


class Mine:
    """A class outside torch's safe list."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mine)

    __hash__ = None  # type: ignore[assignment]


def round_trip(state: object, known: dict[str, tree.Part] | None = None, **how: Any) -> Any:
    taken = tree.take_apart(state, known)
    named = taken.all_tensors()
    return tree.unpack(taken.pack(), lambda i: named[i][1], **({"trusted": True} | how))


def test_containers_keep_type_order_and_keys() -> None:
    tensor = torch.ones(3)
    state = {
        "list": [1, tensor, [tensor]],
        "tuple": (2.5, "x", (tensor,)),
        "ordered": OrderedDict(b=1, a=tensor),
        "default": defaultdict(list, {"k": [tensor]}),
        "named": Pair(tensor, {"n": None}),
        7: {True: b"bytes"},
        "size": torch.Size([1, 2]),
        "dtype": torch.bfloat16,
        "empty": [{}, [], ()],
    }
    found = round_trip(state)
    assert list(found) == list(state)
    assert found["list"][1] is tensor
    assert type(found["ordered"]) is OrderedDict
    assert list(found["ordered"]) == ["b", "a"]
    assert type(found["default"]) is defaultdict
    assert found["default"].default_factory is list
    assert type(found["named"]) is Pair
    assert found["named"].left is tensor
    assert found[7] == {True: b"bytes"}
    assert found["size"] == torch.Size([1, 2])
    assert found["dtype"] is torch.bfloat16
    assert found["empty"] == [{}, [], ()]


def test_paths_name_the_tensors() -> None:
    taken = tree.take_apart({"model": {"w": torch.ones(1)}, "o": [{0: torch.zeros(2)}]})
    assert [name for name, _ in taken.tensors] == ["model.w", "o.0.0"]


def test_one_tensor_under_two_names_is_one_and_stays_one() -> None:
    weight = torch.ones(3)
    state = {
        "a": weight,
        "b": weight,
        "view": weight[:2],
        "as parameter": torch.nn.Parameter(weight),
    }
    taken = tree.take_apart(state)
    assert len(taken.tensors) == 2
    found = tree.unpack(taken.pack(), lambda i: torch.full((i + 1,), 5.0), trusted=True)
    assert found["a"] is found["b"] is found["as parameter"]
    assert found["view"] is not found["a"]


def test_empty_tensors_are_told_apart() -> None:
    assert len(tree.take_apart([torch.empty(0), torch.empty(0), torch.empty(0, 3)]).tensors) == 3


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(3).to_sparse(),
        lambda: torch.tensor([1 + 1j]).conj(),
        lambda: torch._neg_view(torch.ones(2)),
        lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "conj", "neg", "quantized"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_whose_bytes_are_not_their_content_go_with_the_rest(
    make: Callable[[], torch.Tensor],
) -> None:
    special = make()
    taken = tree.take_apart({"x": special})
    assert taken.tensors == []
    found = round_trip({"x": special})["x"]
    dense, expected = (t.dequantize() if t.is_quantized else t.to_dense() for t in (found, special))
    assert torch.equal(dense.resolve_conj().resolve_neg(), expected.resolve_conj().resolve_neg())


def test_users_own_classes_need_trust() -> None:
    assert round_trip({"x": Mine()}) == {"x": Mine()}
    with pytest.raises(pickle.UnpicklingError):
        round_trip({"x": Mine()}, trusted=False)
    assert round_trip({"x": [1, "y"]}, trusted=False) == {"x": [1, "y"]}


def test_stable_parts_are_built_once() -> None:
    built: list[int] = []
    weights = {"w": torch.ones(2), "n": 3}

    def build() -> object:
        built.append(1)
        return weights

    known: dict[str, tree.Part] = {}
    for number in range(3):
        state = {
            "model": Stable([weights["w"]], build),
            "step": number,
            "x": torch.full((1,), number),
        }
        found = round_trip(state, known)
        assert found == {"model": weights, "step": number, "x": state["x"]}
        assert found["model"]["w"] is weights["w"]
    assert built == [1]
    weights["new"] = torch.zeros(1)
    state = {"model": Stable([weights["w"], weights["new"]], build)}
    assert round_trip(state, known)["model"].keys() == weights.keys()
    weights["n"] = 4
    state = {"model": Stable([weights["w"], weights["new"]], build, key=4)}
    assert round_trip(state, known)["model"]["n"] == 4
    assert len(built) == 3


def test_the_numbers_of_parts_do_not_mix() -> None:
    state = {
        "a": Stable([], lambda: [torch.tensor(1.0), torch.tensor(2.0)]),
        "b": torch.tensor(3.0),
        "c": {"d": Stable([], lambda: {"e": torch.tensor(4.0)})},
    }
    assert round_trip(state) == {
        "a": [torch.tensor(1.0), torch.tensor(2.0)],
        "b": torch.tensor(3.0),
        "c": {"d": {"e": torch.tensor(4.0)}},
    }


def test_a_part_with_a_tensor_that_is_not_plain_is_built_each_time() -> None:
    sparse = torch.eye(2).to_sparse()
    known: dict[str, tree.Part] = {}
    for _ in range(2):
        sparse = sparse * 2
        state = {"part": Stable([], lambda kept=sparse: {"s": kept})}
        assert torch.equal(round_trip(state, known)["part"]["s"].to_dense(), sparse.to_dense())


def test_a_parameter_whose_memory_was_exchanged_is_found() -> None:
    model = torch.nn.Linear(2, 2)
    known: dict[str, tree.Part] = {}
    round_trip(module_state(model), known)
    model.weight.data = torch.full((2, 2), 7.0)
    found = join_module_state(round_trip(module_state(model), known))
    assert torch.equal(found["weight"], torch.full((2, 2), 7.0))


class Counting(torch.nn.Module):
    """Has a state beyond its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.register_buffer("total", torch.zeros(1))

    def get_extra_state(self) -> int:
        return self.seen

    def set_extra_state(self, state: int) -> None:
        self.seen = state


def test_a_child_with_a_state_of_its_own_is_asked_each_time() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), Counting())
    known: dict[str, tree.Part] = {}
    for number in range(3):
        model[1].seen, model[1].total[0] = number, number
        found = join_module_state(round_trip(module_state(model), known))
        assert set(found) == set(model.state_dict())
        assert (found["1._extra_state"], found["1.total"].item()) == (number, number)
        assert torch.equal(found["0.weight"], model[0].weight)
