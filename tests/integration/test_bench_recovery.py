"""The benchmark of killed ranks says why where a peer cannot be installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks import recovery_peers

if TYPE_CHECKING:
    from pathlib import Path


def test_without_an_index_a_peer_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(recovery_peers.CannotInstallError, match="No matching distribution"):
        recovery_peers.environment(tmp_path / "peer", recovery_peers.NVRX)
