"""Lightning runs that are killed end bit-identical to runs that nobody disturbed, mnemo or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning_client import Lab, assert_same, kill_at, records, rows

SEEDED = {"run": {"seed_samples": True}}
EARLY = ("forward:3", "forward:11", "mid_copy:17")

# What is fast or of most use runs always, the rest with the campaigns.
OPTIMIZATION: dict[str, tuple[str, ...]] = {
    "plain": ("forward:2", "mid_copy:5", "validation:8", "update:9", "epoch_end:16"),
    "accumulation": ("forward:2", "validation:2", "mid_copy:4", "update:6"),
    "gan": ("backward:5", "mid_copy:8", "validation:16", "update:19"),
    "manual_pending": ("backward:5", "between:7"),
    "groups": ("forward:3", "mid_copy:9"),
    "lora": ("forward:3", "mid_copy:9"),
    "shapeless": ("forward:3", "mid_copy:9"),
    "layer_schedule": ("forward:3", "mid_copy:9", "validation:16"),
    "unsaved": ("forward:3", "validation:8", "mid_copy:13"),
    "metrics": ("forward:3", "between:7", "validation:12", "mid_copy:17"),
    "max_steps": ("validation:8", "between:10", "forward:10"),
    "early_stopping": ("validation:12", "forward:10", "epoch_end:12"),
}
OPTIMIZATION_MORE: dict[str, tuple[str, ...]] = {
    "finetuning": ("forward:5", "between:11", "forward:17"),
    "scaler": ("backward:3", "between:17"),
    "plateau": ("validation:8", "between:15", "forward:18"),
    "epoch_scheduler": ("validation:8", "backward:9"),
    "lbfgs": ("update:2", "between:4", "mid_copy:5"),
    "bf16": ("backward:3", "mid_copy:6"),
    "manual_raw": ("validation:0",),
    "none_loss": ("between:2", "forward:5"),
    "skip_epoch": ("forward:10", "between:14"),
    "every_second_epoch": ("forward:3", "validation:10", "mid_copy:12"),
    "validation_across_epochs": ("validation:10", "forward:12"),
    "overfit": ("forward:2", "update:5"),
    "reload_loaders": ("forward:18", "forward:25", "backward:30"),
    "timer": ("forward:3", "epoch_end:8", "backward:12"),
    "no_validation": ("forward:3", "epoch_end:8", "mid_copy:17"),
}
DATA = dict.fromkeys(
    (
        "generator",
        "batch_sampler",
        "augmented",
        "max_size_cycle",
        "stateful_map",
        "stateful_stream",
    ),
    EARLY[:2],
) | dict.fromkeys(("same_loader", "shared_generator"), ("forward:4", "validation:9", "mid_copy:14"))
DATA_MORE = {
    **dict.fromkeys(("weighted", "replacement", "unbatched", "max_size", "loader_iter"), EARLY),
    **dict.fromkeys(("batch_sampler", "stateful_map"), EARLY),
    "min_size": ("forward:2", "forward:4", "mid_copy:6"),
}
WRITERS = {
    "ema": ("forward:3", "validation:12", "mid_copy:13"),
    "swa": ("forward:11", "validation:20", "mid_copy:30"),
    "sam": ("backward:3", "mid_copy:7", "forward:9"),
    "early_writer": ("forward:3", "backward:9"),
}
WRITERS_MORE = {
    "averaging": ("forward:3", "validation:12", "mid_copy:13", "forward:17"),
    "clipping": ("forward:3", "mid_copy:9", "forward:17"),
}

SEARCHES = {
    "lr_search": ("search:4", "forward:11", "mid_copy:15"),
    "lr_search_later": ("forward:8", "forward:13"),
    "lr_tuned": ("search:4", "forward:11"),
    "batch_search": ("search:1", "forward:11", "mid_copy:15"),
}


def cases(*tables: dict[str, tuple[str, ...]], campaign: bool = False) -> list[Any]:
    marks = [pytest.mark.campaign] if campaign else []
    return [
        pytest.param(name, kills, id=name, marks=marks)
        for table in tables
        for name, kills in table.items()
    ]


@pytest.mark.parametrize(
    ("case", "kills"),
    [
        *cases(OPTIMIZATION, DATA, WRITERS),
        *cases(OPTIMIZATION_MORE, DATA_MORE, WRITERS_MORE, campaign=True),
    ],
)
def test_killed_run_is_identical(
    lab: Lab, tmp_path: Path, case: str, kills: tuple[str, ...]
) -> None:
    assert lab.life(case, tmp_path / "alone", mnemo=False).codes == [0]
    lives = lab.lives(case, tmp_path / "killed", kill_at(*kills))
    assert len(lives) == len(kills) + 1
    assert_same(tmp_path / "alone", tmp_path / "killed")
    starts = [r for r in records("killed") if r["event"] == "start"]
    assert [s["resumed"] for s in starts] == [False] + [True] * len(kills)
    assert all(s["exact"] for s in starts[1:])
    assert all(s["steps_lost"] <= 2 for s in starts[1:])  # two optimizers count two a batch


@pytest.mark.parametrize(("case", "kills"), cases(SEARCHES))
def test_a_search_that_is_killed_is_begun_anew(
    lab: Lab, tmp_path: Path, case: str, kills: tuple[str, ...]
) -> None:
    """What it had found is what a later life goes on with."""
    assert lab.life(case, tmp_path / "alone", mnemo=False).codes == [0]
    lives = lab.lives(case, tmp_path / "killed", kill_at(*kills))
    assert len(lives) == len(kills) + 1
    assert_same(tmp_path / "alone", tmp_path / "killed")
    first, *others = starts = [r for r in records("killed") if r["event"] == "start"]
    assert {start["fit"] for start in starts} == {0}  # a Tuner's search is none
    assert not first["resumed"]
    assert others
    assert all(s["resumed"] and s["exact"] and s["steps_lost"] <= 1 for s in others)


@pytest.mark.parametrize(
    "case",
    [
        "workers",
        "stream",
        pytest.param("mixed", marks=pytest.mark.campaign),
        pytest.param("stream_workers", marks=pytest.mark.campaign),
        pytest.param("stateful_workers", marks=pytest.mark.campaign),
    ],
)
def test_identical_but_not_provably(lab: Lab, tmp_path: Path, case: str) -> None:
    """What loaders do behind mnemo's back may differ; here it does not, and the line says may."""
    lab.life(case, tmp_path / "alone", mnemo=False)
    lives = lab.lives(case, tmp_path / "killed", kill_at(*EARLY[:2]))
    assert_same(tmp_path / "alone", tmp_path / "killed")
    assert "not exact (" in lives[-1].said
    resumed = [r for r in records("killed") if r["event"] == "start" and r["resumed"]]
    assert resumed
    assert not any(r["exact"] for r in resumed)
    if "stream" in case or case == "mixed":
        assert "batches of this epoch are loaded again and thrown away" in lives[1].said


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("layer_exchanged", "net.2 was a GELU by then"),
        ("hook_added", "net.0 had a hook"),
        ("pruning", "net.0 had a hook"),
    ],
)
def test_what_was_made_of_the_model_is_missed(
    lab: Lab, tmp_path: Path, case: str, said: str
) -> None:
    lives = lab.lives(case, tmp_path / "killed", kill_at("forward:3", "forward:11", "forward:13"))
    assert [said in life.said for life in lives] == [False, False, True, True]
    starts = [r for r in records("killed") if r["event"] == "start"]
    assert [s["exact"] for s in starts[1:]] == [True, False, False]


def test_augmentation_in_workers_is_exact_when_samples_are_seeded(lab: Lab, tmp_path: Path) -> None:
    case = "augmented_workers"
    options: dict[str, Any] = {"settings": SEEDED}
    assert lab.life(case, tmp_path / "alone", run_id="alone", **options).codes == [0]
    lives = lab.lives(case, tmp_path / "killed", kill_at(*EARLY[:2]), **options)
    assert_same(tmp_path / "alone", tmp_path / "killed")
    assert ", exact" in lives[-1].said


@pytest.mark.campaign
def test_augmentation_in_workers_is_said_to_differ_otherwise(lab: Lab, tmp_path: Path) -> None:
    lives = lab.lives("augmented_workers", tmp_path / "killed", kill_at("forward:3"))
    assert "random numbers drawn in loader workers are not: set run.seed_samples" in lives[-1].said


def test_order_that_cannot_be_repeated_is_reported(lab: Lab, tmp_path: Path) -> None:
    lives = lab.lives("erratic", tmp_path / "killed", kill_at("forward:3"))
    assert "not exact: the order of batches is not the one" in lives[-1].said
    found = [r for r in records("killed") if r["event"] == "degraded"]
    assert [r["kind"] for r in found] == ["order"]


def test_a_snapshot_now_and_then_repeats_the_same_steps(lab: Lab, tmp_path: Path) -> None:
    lab.life("plain", tmp_path / "alone", mnemo=False)
    settings = {"snapshot": {"every": 3}}
    lives = lab.lives("plain", tmp_path / "killed", kill_at("settled:5"), settings=settings)
    assert "at step 3, 2 steps lost" in lives[-1].said
    assert_same(tmp_path / "alone", tmp_path / "killed")


@pytest.mark.parametrize("case", ["plain", pytest.param("metrics", marks=pytest.mark.campaign)])
def test_two_ranks(lab: Lab, tmp_path: Path, case: str) -> None:
    """A distributed sampler, buckets, and metrics that are reduced."""
    assert lab.life(case, tmp_path / "alone", mnemo=False, ranks=2).codes == [0, 0]
    kills = (*kill_at("backward:2", "validation:4", rank=1), *kill_at("forward:5", rank=0))
    lab.lives(case, tmp_path / "killed", kills, ranks=2)
    assert_same(tmp_path / "alone", tmp_path / "killed", ranks=2)


def test_several_trainings_in_one_process(lab: Lab, tmp_path: Path) -> None:
    """Each finds its own state; those that had ended are repeated, from their beginning."""
    lab.life("several", tmp_path / "alone", mnemo=False)
    third = {key for key in rows(tmp_path / "alone") if key[0] == 2}
    assert third
    lives = lab.lives("several", tmp_path / "killed", kill_at("forward:3", "forward:12"))
    assert_same(tmp_path / "alone", tmp_path / "killed")
    assert len(lives) == 3
