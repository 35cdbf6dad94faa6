"""Loggers, checkpoint files and progress bars of a killed run are those of an undisturbed one."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_client import Lab, assert_same, kill_at

from lightning_mnemo.event_files import _entries

KILLS = ("forward:3", "validation:8", "saving:10", "between:13", "epoch_end:16", "epoch_end:24")


def events(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of every entry by tag, as they came."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.util.tensor_util import make_ndarray

    found: dict[str, list[tuple[float, int, float]]] = defaultdict(list)
    for path in sorted(directory.glob("events.out.tfevents.*")):
        for entry in _entries(path.read_bytes()):
            event = Event.FromString(entry)
            for value in event.summary.value:
                if value.HasField("tensor"):
                    number = float(make_ndarray(value.tensor))
                elif value.HasField("simple_value"):
                    number = value.simple_value
                else:
                    continue
                found[value.tag].append((event.wall_time, event.step, number))
    assert found
    return {tag: [(s, v) for _, s, v in sorted(rows)] for tag, rows in found.items()}


def table(file: Path) -> list[dict[str, Any]]:
    with file.open(newline="") as handle:
        return list(csv.DictReader(handle))


def versions(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_every_entry_and_file_is_there_once(lab: Lab, tmp_path: Path) -> None:
    """Killed in mid-epoch, in validation, while a checkpoint is saved, at an epoch's end."""
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    lab.life("outputs", alone, mnemo=False)
    lab.lives("outputs", killed, kill_at(*KILLS))
    assert_same(alone, killed)  # with best_model_path, top k, and the names of all files
    for place in ("logs/lightning_logs", "csv/lightning_logs", "logs/lightning_logs/version_0"):
        then, now = versions(alone / place), versions(killed / place)
        assert [n for n in now if "tfevents" not in n] == [n for n in then if "tfevents" not in n]
    place = "logs/lightning_logs/version_0"
    then, now = events(alone / place), events(killed / place)
    assert now == then
    assert [step for step, _ in now["loss_step"]] == list(range(24))
    file = "csv/lightning_logs/version_0/metrics.csv"
    assert table(killed / file) == table(alone / file)
    assert not list(killed.rglob("*-v1*"))
    assert not list(killed.rglob(".*mnemo*"))
    for path in killed.rglob("*.ckpt"):
        assert torch.load(path, weights_only=False)["global_step"] > 0


def test_a_version_that_the_user_names_goes_on(lab: Lab, tmp_path: Path) -> None:
    """The CSV writer deletes what is there before any callback is asked."""
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    lab.life("fixed_version", alone, mnemo=False)
    lab.lives("fixed_version", killed, kill_at("forward:3", "between:10"))
    assert events(killed / "tb" / "version_3") == events(alone / "tb" / "version_3")
    file = "csv/version_3/metrics.csv"
    assert table(killed / file) == table(alone / file)


@pytest.mark.campaign
def test_logs_of_two_ranks(lab: Lab, tmp_path: Path) -> None:
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    lab.life("outputs", alone, mnemo=False, ranks=2)
    lab.lives("outputs", killed, kill_at("forward:3", "validation:6", rank=1), ranks=2)
    assert_same(alone, killed, ranks=2)
    place = "logs/lightning_logs/version_0"
    assert events(killed / place) == events(alone / place)
    assert not list(killed.rglob("*-v1*"))


@pytest.mark.parametrize("case", ["tqdm_bar", pytest.param("rich_bar", marks=pytest.mark.campaign)])
def test_bars_show_where_the_run_is(lab: Lab, tmp_path: Path, case: str) -> None:
    lives = lab.lives(case, tmp_path / "a", kill_at("forward:11"))
    assert len(lives) == 2
    shown = (tmp_path / "a" / "rank-0.out").read_text(errors="replace")
    second = shown.rpartition("Epoch 0")[2] if case == "rich_bar" else shown
    counts = re.findall(r"Epoch (\d)[^\r\n]*?(\d+)/(\d+)", shown if case == "tqdm_bar" else second)
    assert counts
    assert {total for _, _, total in counts} == {"8"}
    after = counts[-5:]
    assert {epoch for epoch, _, _ in after} == {"1"}
    assert after[-1][1] == "8"


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_weights_and_biases_goes_on_under_the_same_id(lab: Lab, tmp_path: Path) -> None:
    out = tmp_path / "a"
    environ = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TMPDIR": str(tmp_path)}
    lab.lives("wandb_offline", out, kill_at("forward:5"), **environ)
    runs = {path.name.rpartition("-")[2] for path in (out / "wandb").glob("offline-run-*")}
    assert len(runs) == 1, runs
