"""What of a module is in no state dict: noticed, compared between lives, put back."""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mnemo.session.attributes import AttributeWatch, _digest
from mnemo.session.modules import ModuleTree
from mnemo.session.surgery import Surgery
from mnemo.session.unsaved import Unsaved


class Thing(nn.Module):
    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.register_buffer("mean", torch.zeros(2), persistent=False)
        self.register_buffer("table", torch.arange(5), persistent=False)
        self.random = torch.Generator().manual_seed(1)
        self.others = [np.random.default_rng(2)]
        self.own = random.Random(3)
        self.count = 0
        self.phase = "warm-up"
        self.seen: list[Any] = []
        self.cache: torch.Tensor | None = None
        self.started = os.urandom(4).hex()


def modules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(module.named_modules())


def lost(before: Thing, after: Thing, change: Any, looks: int = 1) -> str:
    """What a life with ``after`` says that goes on from one in which ``change`` was done."""
    watch = AttributeWatch("do so")
    assert watch.begin(modules(before)) == ""
    saved: dict[str, Any] = {}
    for _ in range(looks):
        change(before)
        saved = watch.look(modules(before), warn=False)
    return AttributeWatch("do so").begin(modules(after), saved)


def counts(thing: Thing) -> None:
    thing.count += 1


def test_a_buffer_that_was_filled_later_comes_back() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cache", None, persistent=False)

    before, after = Late(), Late()
    unsaved = Unsaved(before)
    before.cache = torch.arange(3.0)
    Unsaved(after).restore(unsaved.state(modules(before)))
    assert isinstance(after.cache, torch.Tensor)
    assert after.cache.tolist() == [0, 1, 2]


def test_nothing_is_lost_where_nothing_changed() -> None:
    """Not even what each life sets otherwise, such as the time of its start."""
    assert lost(Thing(), Thing(), lambda thing: None, 5) == ""


@pytest.mark.parametrize("looks", [1, 2, 5, 100])
def test_a_counter_is_lost(looks: int) -> None:
    assert lost(Thing(), Thing(), counts, looks) == (
        "module attribute count is not kept: make it a buffer, or do so"
    )


def test_a_counter_that_somebody_restored_is_not() -> None:
    after = Thing()
    after.count = 5
    assert lost(Thing(), after, counts, 5) == ""


@pytest.mark.parametrize("at", [1, 3, 7, 50, 64])
def test_a_number_that_changes_once_is_lost_whenever_it_does(at: int) -> None:
    calls = iter(range(1, 65))

    def change(thing: Thing) -> None:
        if next(calls) == at:
            thing.phase = "training"

    assert "module attribute phase is not kept" in lost(Thing(), Thing(), change, 64)


def test_what_is_made_when_it_is_needed_first_is_not_lost() -> None:
    def change(thing: Thing) -> None:
        thing.cache = torch.ones(3)
        thing.late = 4  # type: ignore[assignment]

    assert lost(Thing(), Thing(), change, 5) == ""


def test_several_are_named_together() -> None:
    def change(thing: Thing) -> None:
        counts(thing)
        thing.seen.append(thing.count)
        thing.cache = torch.full((2,), float(thing.count))

    words = lost(Thing(), Thing(), change, 3)
    assert words == (
        "module attributes cache, count, seen are not kept: make them buffers, or do so"
    )


def test_what_was_lost_once_is_lost_for_all_later_lives() -> None:
    first, second = AttributeWatch(""), AttributeWatch("")
    thing = Thing()
    first.begin(modules(thing))
    thing.phase = "training"
    saved = first.look(modules(thing), warn=False)
    assert second.begin(modules(Thing()), saved)
    assert AttributeWatch("").begin(modules(Thing()), second.look(modules(Thing()), warn=False))


def test_changing_attributes_are_warned_of_once() -> None:
    watch, thing = AttributeWatch("do so"), Thing()
    watch.begin(modules(thing))
    counts(thing)
    watch.look(modules(thing))
    counts(thing)
    with pytest.warns(UserWarning, match="mnemo: count of Thing change .* or do so"):
        watch.look(modules(thing))
    counts(thing)
    watch.look(modules(thing))  # any warning is an error


def test_names_and_classes_of_others_are_left_alone() -> None:
    watch, thing = AttributeWatch("", skip=["count"]), Thing()
    others = AttributeWatch("", kinds=(Thing,))
    watch.begin(modules(thing))
    others.begin(modules(thing))
    counts(thing)
    assert watch.look(modules(thing))["then"] == {}
    thing.phase = "training"
    assert others.look(modules(thing))["then"] == {}


VALUES = (
    "{'b', 'a', 'c', 1}",
    "{'x': [1, 2.5, None, (True,)], 3: float('nan')}",
    "torch.arange(6).view(2, 3).t()",
    "torch.ones(2, 2, requires_grad=True) * 2",
    "deque([np.float32(2), np.arange(3), b'ignored'])",
)


@pytest.mark.parametrize("text", VALUES)
def test_equal_values_have_one_digest_in_any_process(text: str) -> None:
    program = (
        "import torch, numpy as np\nfrom collections import deque\n"
        f"from mnemo.session.attributes import _digest\nprint(_digest({text}))"
    )
    environ = os.environ | {"PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1"}
    other = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environ, check=True
    )
    here = eval(text, {"torch": torch, "np": np, "deque": deque})
    assert _digest(here) == int(other.stdout)


def test_different_values_have_different_digests() -> None:
    values = [1, 1.0, True, "1", None, [1], (1,), {1}, {1: 1}, [[1]], [1, 1], torch.ones(1)]
    values += [torch.ones(1, 1), torch.ones(1, dtype=torch.int32), np.ones(1), torch.zeros(1)]
    assert len({_digest(value) for value in values}) == len(values)


def test_what_cannot_be_compared_is_not() -> None:
    circle: list[Any] = []
    circle.append(circle)
    for value in (circle, "x" * 200_000, torch.zeros(30_000), torch.eye(2).to_sparse()):
        assert _digest(value) is None


def test_state_outside_the_state_dict_comes_back() -> None:
    torch.manual_seed(1)
    then, now = Thing(), Thing()
    unsaved = Unsaved(then)
    then.mean += 3
    then.inner.weight.requires_grad_(False)
    then.inner.eval()
    for thing in (then, now):
        assert torch.rand(1, generator=thing.random) == torch.rand(
            1, generator=torch.Generator().manual_seed(1)
        )
    torch.rand(5, generator=then.random)
    then.own.random()
    state = unsaved.state(modules(then))
    assert list(state["buffers"]) == ["mean"]  # what nobody wrote is no part of it
    held = now.mean
    Unsaved(now).restore(state)
    assert now.mean is held
    assert held.tolist() == [3, 3]
    assert [p.requires_grad for p in now.inner.parameters()] == [False, True]
    assert (now.training, now.inner.training) == (True, False)
    assert torch.equal(now.random.get_state(), then.random.get_state())
    assert now.own.random() == then.own.random()


def test_modules_are_listed_as_torch_lists_them_whatever_is_done_to_them() -> None:
    shared = nn.ReLU()
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(shared, nn.Dropout()), shared)
    tree = ModuleTree(model)
    changes: list[Any] = [
        lambda: None,
        lambda: model[0].register_module("late", nn.ReLU()),  # below what had none
        lambda: setattr(model[1], "0", nn.GELU()),
        lambda: model[1].pop(1),
        lambda: model.insert(0, nn.Tanh()),
        lambda: model._modules.update({"0": model._modules.pop("0")}),
        lambda: delattr(model[0], "late"),
        lambda: setattr(model[1], "_modules", {"other": nn.Tanh()}),
    ]
    seen = []
    for change in changes:
        change()
        assert list(tree.modules()) == modules(model)
        assert tree.modules() is tree.modules()
        seen.append([path for path, _ in tree.modules()])
    assert len({tuple(paths) for paths in seen}) >= 6


def test_what_torchscript_has_compiled_has_flags_too() -> None:
    then, now = (nn.Sequential(torch.jit.script(nn.Dropout())) for _ in range(2))
    then.eval()
    state = Unsaved(then).state(ModuleTree(then).modules())
    Unsaved(now).restore(state)
    assert [m.training for m in now.modules()] == [False, False]


def test_a_generator_is_found_wherever_it_is_put() -> None:
    thing = Thing()
    unsaved = Unsaved(thing)
    assert list(unsaved.state(modules(thing))["generators"]) == ["random", "own"]
    thing.phase = torch.Generator()  # type: ignore[assignment]
    assert list(unsaved.state(modules(thing))["generators"]) == ["random", "own", "phase"]


def test_a_buffer_of_another_shape_is_taken_over() -> None:
    then, now = Thing(), Thing()
    unsaved = Unsaved(then)
    then.mean = torch.ones(4)
    Unsaved(now).restore(unsaved.state(modules(then)))
    assert now.mean.tolist() == [1, 1, 1, 1]


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(2)
        self.act: nn.Module = nn.ReLU()


def test_settings_of_layers_come_back_where_they_were_changed() -> None:
    before, after = Layers(), Layers()
    kept, tree = Unsaved(before), ModuleTree(before)
    assert kept.state(tree.modules())["settings"] == {}
    before.drop.p = 0.25
    before.norm.momentum = None
    state = kept.state(tree.modules())
    assert state["settings"] == {"drop.p": 0.25, "norm.momentum": None}
    after.drop.inplace = True  # what a new start does otherwise stays
    later = Unsaved(after)
    later.restore(state)
    assert (after.drop.p, after.norm.momentum, after.drop.inplace) == (0.25, None, True)
    assert later.state(modules(after))["settings"] == state["settings"]


def test_settings_of_an_exchanged_layer_come_back() -> None:
    before, after = Layers(), Layers()
    kept, tree = Unsaved(before), ModuleTree(before)
    kept.state(tree.modules())
    before.drop = nn.Dropout(0.1)
    state = kept.state(tree.modules())
    Unsaved(after).restore(state)
    assert after.drop.p == 0.1


class Half(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


class Own(nn.Dropout):
    def __init__(self, p: float) -> None:
        super().__init__(p)
        self.calls = 0


class Uncommon(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=2)
        self.norm = nn.utils.parametrize.register_parametrization(
            nn.BatchNorm1d(2), "weight", Half()
        )
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2))
        self.own = Own(0.5)
        self.pool = nn.AdaptiveAvgPool2d([4, 4])


CHANGES: dict[str, tuple[str, Any]] = {
    "a tuple": ("conv.dilation", (2,)),
    "a list": ("pool.output_size", [2, 2]),
    "of a parametrized layer": ("norm.momentum", 0.5),
    "of a parametrization": ("spectral.parametrizations.weight.0.n_power_iterations", 5),
    "of a class derived from torch's": ("own.p", 0.25),
    "a tensor of one number": ("norm.eps", torch.tensor(0.5)),
}


@pytest.mark.parametrize(("where", "value"), CHANGES.values(), ids=CHANGES)
def test_settings_come_back_wherever_torch_has_them(where: str, value: Any) -> None:
    path, _, name = where.rpartition(".")
    before, after = Uncommon(), Uncommon()
    kept, tree = Unsaved(before), ModuleTree(before)
    assert kept.state(tree.modules())["settings"] == {}
    setattr(before.get_submodule(path), name, value)
    state = kept.state(tree.modules())
    assert state["settings"] == {where: value}
    watch = AttributeWatch("")
    watch.begin(modules(after))
    Unsaved(after).restore(state)
    assert getattr(after.get_submodule(path), name) == value
    assert watch.look(modules(after))["then"] == {}  # it is none of the user's attributes


def test_a_setting_that_is_written_in_place_comes_back() -> None:
    before = Uncommon()
    kept = Unsaved(before)
    before.pool.output_size[0] = 2  # type: ignore[index]
    assert kept.state(modules(before))["settings"] == {"pool.output_size": [2, 4]}


def test_what_a_class_derived_from_a_layer_counts_is_the_users() -> None:
    watch, model = AttributeWatch(""), Uncommon()
    kept = Unsaved(model)
    watch.begin(modules(model))
    model.own.calls += 1
    assert list(watch.look(modules(model))["then"]) == ["own.calls"]
    assert kept.state(modules(model))["settings"] == {}


def test_a_setting_that_cannot_be_compared_any_more_fails_nothing() -> None:
    model = Uncommon()
    kept = Unsaved(model)
    model.conv.dilation = torch.tensor([1, 2])  # type: ignore[assignment]
    del model.own.p
    model.pool.output_size = [1, 1]
    assert kept.state(modules(model))["settings"] == {"pool.output_size": [1, 1]}


def operated(change: Any, *, again: Any = lambda layers: None) -> str:
    """What a life says that goes on from one in which ``change`` was done."""
    before, after = Layers(), Layers()
    surgery, tree = Surgery(), ModuleTree(before)
    surgery.look(tree.modules())
    change(before)
    saved = surgery.look(tree.modules())
    again(after)
    return Surgery().begin(modules(after), saved)


def exchanges(layers: Layers) -> None:
    layers.act = nn.GELU()


def hooks(layers: Layers) -> None:
    layers.drop.register_forward_pre_hook(lambda *_: None)


def test_exchanged_layers_and_hooks_are_missed() -> None:
    assert operated(lambda layers: None) == ""
    assert "act was a GELU by then" in operated(exchanges)
    assert "drop had a hook" in operated(hooks)
    assert operated(exchanges, again=exchanges) == ""
    assert operated(hooks, again=hooks) == ""


def scales(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
    return output * 2


def halves(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
    return output / 2


class Hooked(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.handle = self.act.register_forward_hook(functools.partial(scales))


def swaps(layers: Hooked) -> None:
    layers.handle.remove()
    layers.handle = layers.act.register_forward_hook(halves)


def test_a_hook_that_was_removed_or_exchanged_is_missed() -> None:
    for change, said in (
        (lambda layers: layers.handle.remove(), "act had lost a hook"),
        (swaps, "act had a hook"),
    ):
        before = Hooked()
        surgery, tree = Surgery(), ModuleTree(before)
        surgery.look(tree.modules())
        change(before)  # type: ignore[no-untyped-call]
        saved = surgery.look(tree.modules())
        after = Hooked()
        second = Surgery()
        assert said in second.begin(modules(after), saved)
        assert said in Surgery().begin(modules(Hooked()), second.look(modules(after)))
        change(after)  # type: ignore[no-untyped-call]
        assert Surgery().begin(modules(after), saved) == ""


def test_a_layer_that_was_taken_out_is_missed() -> None:
    def takes_out(layers: Layers) -> None:
        del layers.drop

    assert "drop had been taken out: changed while training" in operated(takes_out)
    assert operated(takes_out, again=takes_out) == ""


def test_what_was_there_before_the_first_snapshot_is_none_of_surgery() -> None:
    before = Layers()
    hooks(before)
    surgery = Surgery()
    saved = surgery.look(modules(before))
    assert Surgery().begin(modules(Layers()), saved) == ""


def test_a_layer_that_is_not_yet_made_is_not_missed() -> None:
    before, after = nn.Sequential(nn.LazyLinear(2)), nn.Sequential(nn.LazyLinear(2))
    surgery = Surgery()
    surgery.look(modules(before))
    before(torch.zeros(1, 3))
    assert Surgery().begin(modules(after), surgery.look(modules(before))) == ""
