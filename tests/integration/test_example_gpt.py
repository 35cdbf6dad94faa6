"""The example trains without mnemo and leaves what the demo compares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from warm import Zygote

EXAMPLE = Path(__file__).parents[2] / "examples" / "lightning_gpt"


def test_training_leaves_every_loss_and_a_hash(zygote: Zygote, tmp_path: Path) -> None:
    options = ["--no-mnemo", "--ranks=1", "--steps=3", "--layers=1", "--batch-size=2"]
    done = zygote.run(EXAMPLE / "train.py", *options, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    log = tmp_path / "out" / "steps.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert result["losses"] == [line["loss"] for line in lines]
    assert 4 < result["losses"][-1] < result["losses"][0] < 7
    assert len(bytes.fromhex(result["sha256"])) == 32


def test_script_explains_itself(zygote: Zygote) -> None:
    done = zygote.run(EXAMPLE / "train.py", "--help")
    assert done.returncode == 0, done.stderr
    assert "--no-mnemo" in done.stdout
