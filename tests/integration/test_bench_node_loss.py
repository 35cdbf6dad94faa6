"""The benchmark of lost nodes says why where it cannot measure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import node_loss
from benchmarks.harness import Report

if TYPE_CHECKING:
    import pytest


def test_without_namespaces_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_loss.netns, "missing", lambda: "ip (iproute2) is missing")
    report = Report("node_loss")
    node_loss.run(quick=True, report=report)
    assert report.rows == [{"case": "not measured", "why": "ip (iproute2) is missing"}]
    assert report.bars == []
