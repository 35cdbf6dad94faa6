"""What a start does with what is there: resumes, refuses, or begins anew, and says which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_client import KILLED, Lab, Life, assert_same, kill_at, records, rows

from mnemo.faults import Declaration, Fault

NEVER = {"run": {"resume": "never"}}
REQUIRED = {"run": {"resume": "required"}}


def killed(lab: Lab, out: Path, case: str = "plain", *places: str, **options: Any) -> Life:
    """A life that ends by SIGKILL, after six steps where nothing else is said."""
    faults: tuple[Fault, ...] = kill_at(*(places or ("settled:6",)))
    declared = Declaration(faults, str(out.with_suffix(".fired")))
    life = lab.life(case, out, run_id="run", faults=declared, **options)
    assert life.codes == [KILLED], life.said
    return life


def steps(out: Path) -> list[int]:
    """Steps after each batch, as they came, repeated ones too."""
    lines = [json.loads(line) for line in (out / "rows-0.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["key"][1] == "batch"]


def test_another_model_is_refused_and_nothing_is_overwritten(lab: Lab, tmp_path: Path) -> None:
    killed(lab, tmp_path / "a")
    life = lab.life("wider", tmp_path / "b", run_id="run")
    assert life.codes == [1]
    assert "ModelChangedError: the snapshot of step 6 of run run was taken of another" in life.said
    assert "net.4.bias: float32[1] in the snapshot, absent in the model" in life.said
    life = lab.life("plain", tmp_path / "a", run_id="run")
    assert "resumed from memory at step 6" in life.said
    lab.life("plain", tmp_path / "alone", mnemo=False)
    assert_same(tmp_path / "alone", tmp_path / "a")


def test_a_buffer_that_cannot_be_loaded_is_refused(lab: Lab, tmp_path: Path) -> None:
    killed(lab, tmp_path / "a", "shapeless")
    life = lab.life("shapeless_fixed", tmp_path / "b", run_id="run")
    assert life.codes == [1]
    assert "ModelChangedError: the snapshot of step 6 of run run cannot be loaded into" in life.said
    assert "size mismatch for net.5.kept" in life.said
    life = lab.life("shapeless", tmp_path / "a", run_id="run")
    assert "resumed from memory at step 6" in life.said


def test_optimizers_that_do_not_fit_are_refused(lab: Lab, tmp_path: Path) -> None:
    killed(lab, tmp_path / "a")
    life = lab.life("regrouped", tmp_path / "b", run_id="run")
    assert life.codes == [1]
    assert "ModelChangedError: the optimizer state in the snapshot of step 6 of run" in life.said
    life = lab.life("plain", tmp_path / "a", run_id="run")
    assert "resumed from memory at step 6" in life.said


def test_what_has_changed_is_listed(lab: Lab, tmp_path: Path) -> None:
    killed(lab, tmp_path / "a")
    life = lab.life("changed", tmp_path / "b", run_id="run")
    assert "changed since the snapshot: data, hyperparameters, optimizer, scheduler" in life.said
    [record] = [r for r in records("run") if r["event"] == "changed"]
    assert record["what"] == ["data", "hyperparameters", "optimizer", "scheduler"]


def test_what_no_tensor_shows_is_listed_too(lab: Lab, tmp_path: Path) -> None:
    killed(lab, tmp_path / "a")
    life = lab.life("subtly_changed", tmp_path / "b", run_id="run")
    assert (
        "changed since the snapshot: accumulate_grad_batches, gradient_clip_val, "
        "limit_train_batches, model, precision, scheduler\n"
    ) in life.said


def test_another_learning_rate_is_a_change_of_the_optimizer(lab: Lab, tmp_path: Path) -> None:
    killed(lab, tmp_path / "a")
    life = lab.life("faster", tmp_path / "a", run_id="run")
    assert "changed since the snapshot: optimizer\n" in life.said
    assert "not exact (changed: optimizer)" in life.said


def test_another_setting_of_a_parameter_group_is_said(lab: Lab, tmp_path: Path) -> None:
    killed(lab, tmp_path / "a", "groups")
    life = lab.life("groups_changed", tmp_path / "a", run_id="run")
    assert "changed since the snapshot: parameter group 1\n" in life.said
    assert "not exact (changed: parameter group 1)" in life.said


def test_what_a_program_sets_at_its_start_is_its_own(lab: Lab, tmp_path: Path) -> None:
    killed(lab, tmp_path / "a", "set_at_start")
    life = lab.life("set_at_start_changed", tmp_path / "a", run_id="run")
    assert "resumed from memory at step 6" in life.said
    assert "dropped 0.9\n" in life.said


def test_a_start_with_nothing_to_do_says_so_and_keeps_the_state(lab: Lab, tmp_path: Path) -> None:
    killed(lab, tmp_path / "a", "plain", "settled:10")
    for case in ("shorter", "without_batches"):
        life = lab.life(case, tmp_path / case, run_id="run")
        assert life.codes == [0], life.said
        assert "run run · nothing to do: the snapshot of step 10 in memory is behind all" in (
            life.said
        )
    life = lab.life("plain", tmp_path / "a", run_id="run")
    assert "resumed from memory at step 10" in life.said
    life = lab.life("without_batches", tmp_path / "b", run_id="other")
    assert "run other · nothing to do: this fit was asked for no step\n" in life.said


def test_never_begins_anew_and_says_so(lab: Lab, tmp_path: Path) -> None:
    killed(lab, tmp_path / "a")
    life = lab.life("plain", tmp_path / "b", run_id="run", settings=NEVER)
    assert life.codes == [0]
    assert "fresh (run.resume is never)" in life.said
    assert steps(tmp_path / "b") == list(range(1, 17))


def test_required_fails_where_nothing_is(lab: Lab, tmp_path: Path) -> None:
    life = lab.life("plain", tmp_path / "a", run_id="run", settings=REQUIRED)
    assert life.codes == [1]
    assert "NothingToResumeError: run.resume is 'required'" in life.said
    assert not (tmp_path / "a" / "rows-0.jsonl").read_text()


def test_without_a_stable_id_nothing_is_resumed(lab: Lab, tmp_path: Path) -> None:
    first = lab.life("fails", tmp_path / "a", settings={"snapshot": {"keep_alive": "1s"}})
    assert first.codes == [1]
    second = lab.life("fails", tmp_path / "a")
    assert second.codes == [0]
    assert "fresh (a new id at each launch)" in second.said


def test_named_checkpoint_wins_over_memory(lab: Lab, tmp_path: Path) -> None:
    out = tmp_path / "a"
    killed(lab, out, "outputs", "settled:7")
    logs = {p: p.read_bytes() for p in (out / "logs").rglob("events*")}
    (out / "start.ckpt").write_bytes((out / "steps" / "step=3.ckpt").read_bytes())
    (out / "rows-0.jsonl").unlink()
    life = lab.life("named_checkpoint", out, run_id="run")
    assert life.codes == [0], life.said
    assert "was asked for: the snapshot of step 7 in memory is given up" in life.said
    assert f"run run · Lightning goes on from {out / 'start.ckpt'} at step 3 · " in life.said
    assert "fresh" not in life.said
    assert steps(out)[0] == 4
    assert {p: p.read_bytes() for p in logs} == logs  # an earlier life's logs stay as they are


def test_memory_wins_after_an_agents_restart(lab: Lab, tmp_path: Path) -> None:
    out = tmp_path / "a"
    killed(lab, out, "outputs", "settled:7")
    (out / "start.ckpt").write_bytes((out / "steps" / "step=3.ckpt").read_bytes())
    (out / "rows-0.jsonl").unlink()
    again = {"TORCHELASTIC_RESTART_COUNT": "1"}
    life = lab.life("named_checkpoint", out, run_id="run", **again)
    assert life.codes == [0], life.said
    assert "resumed from memory at step 7" in life.said
    assert steps(out)[0] == 8


def test_the_users_own_error_keeps_the_state(lab: Lab, tmp_path: Path) -> None:
    lab.life("plain", tmp_path / "alone", mnemo=False)
    life = lab.life("fails", tmp_path / "a", run_id="run")
    assert life.codes == [1]
    assert "ValueError: the user's own mistake" in life.said
    life = lab.life("fails", tmp_path / "a", run_id="run")
    assert life.codes == [0]
    assert "resumed from memory at step 5, 0 steps lost" in life.said
    assert_same(tmp_path / "alone", tmp_path / "a")


def test_ctrl_c_gives_the_memory_back(lab: Lab, tmp_path: Path) -> None:
    life = lab.life("interrupted", tmp_path / "a", run_id="run")
    assert life.codes == [1]
    life = lab.life("plain", tmp_path / "b", run_id="run")
    assert "fresh (no earlier snapshot)" in life.said


def test_changing_attributes_are_named_once(lab: Lab, tmp_path: Path) -> None:
    killed, resumed = lab.lives("changing", tmp_path / "a", kill_at("forward:3"))
    assert killed.said.count("mnemo: _history, counted of Counts change during training") == 1
    lost = "not exact (module attributes _history, counted are not kept: make them buffers, or "
    assert lost + "use on_save_checkpoint)" in resumed.said
    assert resumed.codes == [0]


def test_rows_prove_something(lab: Lab, tmp_path: Path) -> None:
    """The comparison itself notices one changed bit."""
    lab.life("plain", tmp_path / "a", mnemo=False)
    lab.life("plain", tmp_path / "b", mnemo=False)
    assert_same(tmp_path / "a", tmp_path / "b")
    assert len(rows(tmp_path / "a")) == 16 + 4 + 2 + 1
    file = tmp_path / "b" / "rows-0.jsonl"
    lines = file.read_text().splitlines()
    row = json.loads(lines[5])
    row["loss"] = row["loss"][::-1]
    file.write_text("\n".join([*lines[:5], json.dumps(row), *lines[6:]]))
    with pytest.raises(AssertionError, match="loss"):
        assert_same(tmp_path / "a", tmp_path / "b")


def test_checkpoints_of_a_resumed_run_are_lightnings_own(lab: Lab, tmp_path: Path) -> None:
    lab.lives("outputs", tmp_path / "a", kill_at("forward:7"))
    found = torch.load(tmp_path / "a" / "steps" / "step=12.ckpt", weights_only=False)
    assert found["global_step"] == 12
    assert not any("mnemo" in key.lower() for key in found["callbacks"])


def test_a_second_fit_of_the_same_trainer_has_a_state_of_its_own(lab: Lab, tmp_path: Path) -> None:
    lab.life("untouched", tmp_path / "alone", mnemo=False)
    lives = lab.lives("untouched", tmp_path / "a", kill_at("settled:20"))
    assert "resumed from memory at step 20" in lives[1].said
    assert_same(tmp_path / "alone", tmp_path / "a")
    assert max(steps(tmp_path / "a")) == 32


@pytest.mark.parametrize("case", ["barebones", "fast_dev_run"])
def test_bare_trainers(lab: Lab, tmp_path: Path, case: str) -> None:
    life = lab.life(case, tmp_path / "a", run_id="run")
    assert life.codes == [0], life.said
    assert ("a snapshot every step" in life.said) is (case == "barebones")


def test_two_callbacks_are_one_too_many(lab: Lab, tmp_path: Path) -> None:
    life = lab.life("twice", tmp_path / "a")
    assert life.codes == [1]
    assert "ConfigError: the Trainer has 2 MnemoCallbacks: give it one" in life.said


def test_a_strategy_that_is_not_supported_is_named(lab: Lab, tmp_path: Path) -> None:
    life = lab.life("sharded", tmp_path / "a")
    assert life.codes == [1]
    assert "MnemoCallback does not support ModelParallelStrategy: this version" in life.said
