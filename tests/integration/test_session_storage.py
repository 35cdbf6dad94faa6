"""The start line claims what the storage can keep, and an unusable one is named once."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import mnemo
from mnemo.session import afterwards


def start(url: object) -> None:
    """A whole run of two steps."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = mnemo.Session(
        model=model,
        optimizer=optimizer,
        run={"id": "lab"},
        snapshot={"every": 1},
        persist={"to": str(url)},
    )
    for (x,) in session.batches(DataLoader(TensorDataset(torch.ones(2, 2)))):
        model(x).sum().backward()
        session.step()
    afterwards.give_back()  # what the end of a process, or its next training, does


def unusable(tmp_path: Path, kind: str) -> str:
    if kind == "a file":
        (tmp_path / "file").touch()
        return str(tmp_path / "file")
    if kind == "read-only":  # for root, too: nothing can be made below
        return "/proc/self/mnemo"
    return {"protocol": "xx://bucket/ckpt", "package": "hdfs://host/ckpt"}[kind]


@pytest.mark.parametrize("kind", ["protocol", "package", "a file", "read-only"])
def test_a_storage_that_cannot_be_used_is_said_once(
    tmp_path: Path,
    kind: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = unusable(tmp_path, kind)
    with caplog.at_level(logging.WARNING, "mnemo"):
        start(url)
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("no checkpoint")]
    assert len(said) == 1, said
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "survives" in x]
    assert line.endswith(f"not the loss of the node, for {url} cannot be used")


def test_one_that_can_is_claimed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(tmp_path / "ckpt")
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "survives" in x]
    assert line.endswith(f"not the loss of the node: {tmp_path / 'ckpt'} does")
    (run,) = (tmp_path / "ckpt").iterdir()
    assert [path.name for path in run.iterdir()] == ["step-000000000002"]
