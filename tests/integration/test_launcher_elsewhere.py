"""``mnemo run`` and a program that are not told the same places, or spell them differently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import mnemo, status_of
from launching import Result, launch

from mnemo.recovery import journal

SCRIPT = Path(__file__).parents[1] / "scripts" / "session_elsewhere.py"


def run(runs: list[dict[str, str]], *words: str, cwd: Path, **environ: str) -> Result:
    """One launch of run ``gpt``, a rank for each of ``runs``."""
    command = [f"--nproc-per-node={len(runs)}", *words, str(SCRIPT), json.dumps(runs)]
    return launch(*command, cwd=cwd, MNEMO_RUN_ID="gpt", **environ)


@pytest.mark.campaign
def test_what_the_agent_saw_is_known_where_the_program_writes_elsewhere(tmp_path: Path) -> None:
    places = {"journal": str(tmp_path / "records"), "dir": str(tmp_path / "runs")}
    ended = run([places], cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert (
        "mnemo: run gpt · rank 0 killed by SIGKILL → resumed from memory at step 6, 0 steps lost"
    ) in ended.err
    assert f"the program keeps its state in {tmp_path}/runs/gpt, and mnemo run looks" in ended.err
    own = journal.read(tmp_path / "records" / "gpt.jsonl")
    [recovery] = [record for record in own if record["event"] == "recovery"]
    assert recovery["cause"] == "rank 0 killed by SIGKILL"
    assert not (tmp_path / "runs").exists()


@pytest.mark.campaign
def test_ranks_that_spell_the_run_directory_differently_share_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    spelled = [{"dir": "link/"}, {"dir": f"{tmp_path}/link/../real"}]
    real = {"MNEMO_RUN__DIR": str(tmp_path / "real")}
    ended = run(spelled, "--max-restarts=0", cwd=tmp_path, **real)
    assert ended.code == 128 + 9, ended.err
    assert "the snapshot of step 6 stays in memory" in ended.err
    assert "the program keeps its state in" not in ended.err
    monkeypatch.setenv("MNEMO_RUN__DIR", str(tmp_path / "link"))
    assert status_of("gpt")["fits"][0]["newest"]["step"] == 6
    ended = run([{"dir": "real"}, {"dir": "link"}], cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert "rank 1 killed by SIGKILL → resumed from memory at step 6" in ended.err
    assert mnemo("status", "gpt", "--json").code != 0
