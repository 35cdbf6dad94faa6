"""`mnemo export`: what files it writes of which states, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import mnemo
from safetensors.torch import load_file, load_model, safe_open
from torch import nn

from mnemo.errors import ConfigError, SnapshotError
from mnemo.session.export import Generation, write_lightning, write_safetensors, write_session


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(4, 4, bias=False)
        self.decode = nn.Linear(4, 4, bias=False)
        self.decode.weight = self.encode.weight
        self.register_buffer("turned", torch.arange(6.0).reshape(2, 3).t())
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("void", torch.zeros(0))


EMPTY: dict[str, Any] = {"parameters": {}, "rest": {}}


def module_state_of(model: nn.Module) -> dict[str, Any]:
    """As a snapshot gives it back."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state = model.state_dict()
    return {
        "parameters": {k: v for k, v in state.items() if k in parameters},
        "rest": {k: v for k, v in state.items() if k not in parameters},
    }


def generation(state: dict[str, Any]) -> Generation:
    return Generation(tick=8, step=4, origin="memory", state={"state": state, "rng": {"torch": 1}})


def test_safetensors_holds_tied_weights_once(tmp_path: Path) -> None:
    model, out = Tied(), tmp_path / "model.safetensors"
    assert write_safetensors(generation({"model": module_state_of(model)}), out) == []
    assert load_file(out).keys() == {"encode.weight", "turned", "empty", "void"}
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "4", "decode.weight": "encode.weight"}
    fresh = Tied()
    load_model(fresh, out)
    assert fresh.decode.weight is fresh.encode.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


def test_safetensors_names_what_it_cannot_hold(tmp_path: Path) -> None:
    state = {"checkpoint": {"state_dict": {"w": torch.ones(2), "_extra_state": {"a": 1}}}}
    assert write_safetensors(generation(state), tmp_path / "m") == ["_extra_state"]
    assert load_file(tmp_path / "m").keys() == {"w"}


def test_the_whole_state_for_torch(tmp_path: Path) -> None:
    state = {"model": {"parameters": {"w": torch.ones(2)}, "rest": {}}, "position": {"step": 4}}
    write_session(generation(state), tmp_path / "all.pt")
    read = torch.load(tmp_path / "all.pt", weights_only=True)
    assert read.keys() == {"model", "position", "rng"}
    assert torch.equal(read["model"]["w"], torch.ones(2))


def test_each_format_is_for_its_own_kind_of_run(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match=r"no Lightning run.*--format pt"):
        write_lightning(generation({"model": {}}), tmp_path / "x.ckpt")
    with pytest.raises(SnapshotError, match=r"a Lightning run.*--format ckpt"):
        write_session(generation({"checkpoint": {}}), tmp_path / "x.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_completed_replaces_nothing(tmp_path: Path) -> None:
    out = tmp_path / "all.pt"
    out.write_text("before")
    tmp_path.joinpath("dir.pt").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        write_session(generation({"model": EMPTY}), tmp_path / "dir.pt")
    with pytest.raises(TypeError):  # a generator cannot be pickled
        write_session(generation({"model": EMPTY, "more": (n for n in range(3))}), out)
    assert out.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.pt", "dir.pt"]


def test_words_that_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "there.pt").write_text("before")
    for out, words, said in (
        ("there.pt", (), "exists: name another file, or replace it with --force"),
        ("absent/x.pt", (), "absent is not a directory: make it first"),
        ("model.bin", (), "end its name in .ckpt, .safetensors or .pt"),
        (".", ("--format", "pt"), "is a directory"),
        ("x.pt", ("--format", "onnx"), "onnx"),
        ("x.pt", ("--from", "disk"), "disk"),
        ("x.pt", ("--step", "-3"), "--step"),
    ):
        answer = mnemo("export", "gpt", tmp_path / out, *words)
        assert answer.code == 2, answer
        assert said in answer.err.replace("\n", " ")
    assert (tmp_path / "there.pt").read_text() == "before"


def test_nothing_to_export(tmp_path: Path) -> None:
    answer = mnemo("export", "gpt", tmp_path / "x.pt", "--dir", tmp_path)
    assert answer.code == 1
    assert "no run gpt" in answer.err
    answer = mnemo("export", "gpt", tmp_path / "x.pt", "--persist-to", tmp_path, "--step", 7)
    assert answer.code == 1
    assert f"no step 7 of run gpt is kept in {tmp_path}" in answer.err
    assert list(tmp_path.iterdir()) == []
