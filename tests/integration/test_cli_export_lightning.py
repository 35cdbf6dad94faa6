"""A killed Lightning run, exported: Lightning itself loads it, and goes on from it."""

from __future__ import annotations

import hashlib
import json
import runpy
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from commands import mnemo, status_of
from lightning_client import KILLED, Lab
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

from mnemo.faults import Declaration, Fault, Hook

SCRIPT = Path(__file__).parents[1] / "scripts" / "lightning_small.py"
WIDTH = 4096
"""Makes the state several chunks, of which each rank keeps its own."""


def digest(state: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in state.values())).hexdigest()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Lightning, on a fit as small as this
def test_export_of_two_ranks_is_lightnings_own_checkpoint(lab: Lab, tmp_path: Path) -> None:
    """Each of the replicas keeps a part; a kill in step 8 leaves step 7 whole."""
    declared = Declaration((Fault("sigkill", 1, Hook("forward", 7)),), str(tmp_path / "fired"))
    train = [SCRIPT, "--out=.", "--ranks=2", f"--width={WIDTH}"]
    killed = lab.script(tmp_path / "killed", *train, ranks=2, run_id="gpt", faults=declared)
    assert killed.codes[1] == KILLED, killed.said
    (fit,) = status_of("gpt")["fits"]
    whole = 3 * 4 * 64 * WIDTH  # bytes of the weights and their two moments
    assert fit["memory_bytes"] < 3 * whole  # two buffers, each shared out
    step = fit["newest"]["step"]
    out, weights = tmp_path / "run.ckpt", tmp_path / "model.safetensors"
    for path in (out, weights):
        answer = mnemo("export", "gpt", path)
        assert answer.out == f"step {step} of gpt, from memory, written to {path}\n", answer.err
    assert "a Lightning run" in mnemo("export", "gpt", tmp_path / "run.pt").err
    assert mnemo("clean", "gpt").code == 0

    undisturbed = lab.script(tmp_path / "whole", *train, f"--max-steps={step}", ranks=2)
    assert undisturbed.codes == [0, 0], undisturbed.said
    expected = json.loads((tmp_path / "whole" / "final-0.json").read_text())
    net = runpy.run_path(str(SCRIPT))["Net"]
    model = net.load_from_checkpoint(out, out=tmp_path, width=WIDTH)
    assert digest(model.state_dict()) == expected["sha256"]
    tensors = load_file(weights)
    assert digest({name: tensors[name] for name in model.state_dict()}) == expected["sha256"]

    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=step + 2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    began: list[int] = []
    model = net(tmp_path, WIDTH)
    model.on_train_start = lambda: began.append(trainer.global_step)
    x = torch.randn(64, 64)
    trainer.fit(model, DataLoader(TensorDataset(x, x[:, :1]), batch_size=8), ckpt_path=out)
    assert (began, trainer.global_step) == ([step], step + 2)
