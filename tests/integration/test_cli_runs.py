"""status, clean, rollback and export on real runs: training, killed, of several fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import torch
from commands import holding, mnemo, status_of
from safetensors.torch import load_file
from smp_lab import damage, wait_for_exit

from mnemo.cli import runs
from mnemo.recovery import journal
from mnemo.smp.paths import RunPaths

if TYPE_CHECKING:
    from warm import Zygote


def journal_of(run_id: str) -> list[dict]:
    return journal.read(Path(os.environ["MNEMO_RUN__JOURNAL"]) / f"{run_id}.jsonl")


def persisting(to: Path, keep: int = 50) -> dict[str, str]:
    return {
        "MNEMO_PERSIST__TO": str(to),
        "MNEMO_PERSIST__EVERY": "1ms",
        "MNEMO_PERSIST__KEEP": str(keep),
    }


def stored_steps(place: Path) -> list[int]:
    return sorted(int(path.parent.name[5:]) for path in place.glob("step-*/COMMITTED.json"))


def test_a_run_that_is_training(zygote: Zygote, tmp_path: Path) -> None:
    with holding(zygote, "gpt", 6) as process:
        run = status_of("gpt")
        (fit,) = run["fits"]
        (rank,) = fit["ranks"]
        assert (run["state"], run["kept_for_s"], fit["steps_at_risk"]) == ("training", None, 0)
        assert (rank["pid"], rank["step"], rank["batch"]) == (process.pid, 6, 6)
        assert [s["step"] for s in rank["snapshots"]] == [5, 6]
        assert fit["newest"]["step"] == 6
        assert fit["memory_bytes"] > 2 * 3 * 4 * 512 * 512  # two of weights and two moments
        assert f"{process.pid}" in mnemo("status").out

        for words in (("clean", "gpt"), ("clean", "--all"), ("rollback", "gpt", "--to", 5, "-y")):
            answer = mnemo(*words)
            assert answer.code == 1
            assert f"mnemo: run gpt is training (process {process.pid})" in answer.err
        assert status_of("gpt")["fits"][0]["newest"]["step"] == 6

        whole, weights = tmp_path / "all.pt", tmp_path / "model.safetensors"
        assert mnemo("export", "gpt", whole).out == (
            f"step 6 of gpt, from memory, written to {whole}\n"
        )
        state = torch.load(whole, weights_only=True)
        assert state["position"]["step"] == 6
        assert state["model"]["encode.weight"] is not None
        assert whole.stat().st_size < 1.05 * fit["memory_bytes"] / 2  # tied weights once
        assert mnemo("export", "gpt", weights).code == 0
        tensors = load_file(weights)
        assert tensors.keys() == {"wide.weight", "encode.weight"}
        assert all(torch.equal(tensors[name], state["model"][name]) for name in tensors)

        assert mnemo("export", "gpt", whole).code == 2
        assert mnemo("export", "gpt", whole, "--force", "--step", 5).code == 0
        assert torch.load(whole, weights_only=True)["position"]["step"] == 5
        assert "no step 3 of run gpt" in mnemo("export", "gpt", tmp_path / "x.pt", "--step", 3).err
        assert "no Lightning run" in mnemo("export", "gpt", tmp_path / "x.ckpt").err
        assert sorted(path.name for path in tmp_path.iterdir()) == [whole.name, weights.name]

        smp = psutil.Process(run["smp"]["pid"])
        answer = mnemo("clean", "gpt", "--force")
        assert answer.code == 0
        assert "gave up the snapshot of step 6; its ranks go on" in answer.out
        wait_for_exit(smp.pid, timeout_s=0)
        assert process.running()
        # the rank notices, starts another and hands it the memory
        deadline = time.monotonic() + 20
        while mnemo("status", "gpt").code:
            assert time.monotonic() < deadline, "nobody noticed"
    assert mnemo("clean", "gpt").code == 0


def test_a_run_that_was_killed(zygote: Zygote, tmp_path: Path) -> None:
    """Rolled back to a checkpoint, it goes on there, and what comes then is stored again."""
    settings, place = persisting(tmp_path), tmp_path / "gpt"
    with holding(zygote, "gpt", 9, **settings):
        pass
    nothing = mnemo("rollback", "gpt", "--to", 9)  # and waits for a checkpoint on its way
    assert nothing.out.startswith("nothing is newer than that\n"), nothing
    before = stored_steps(place)
    assert before[0] == 1

    run = status_of("gpt")
    assert run["state"] == "waiting"
    assert 3500 < run["kept_for_s"] <= 3600
    assert run["fits"][0]["ranks"][0]["pid"] is None
    assert run["fits"][0]["persist"]["to"] == str(tmp_path)

    refused = mnemo("rollback", "gpt", "--to", 0, "--yes")
    assert refused.code == 1
    assert "nothing of run gpt is as old as step 0: the oldest is step 1" in refused.err
    hesitant = mnemo("rollback", "gpt", "--to", 1, stdin="n\n")
    assert hesitant.code == 1
    assert "forgets in memory: step 8 and 9\n" in hesitant.out
    assert stored_steps(place) == before
    assert status_of("gpt")["fits"][0]["newest"]["step"] == 9

    assert mnemo("rollback", "gpt", "--to", 8, stdin="y\n").out.endswith(
        "the next start of gpt resumes at step 8, from memory\n"
    )
    assert status_of("gpt")["fits"][0]["newest"]["step"] == 8
    done = mnemo("rollback", "gpt", "--to", 1, "--yes")
    assert done.out.endswith("the next start of gpt resumes at step 1, from storage\n")
    assert stored_steps(place) == [1]
    assert "nothing is newer than that" in mnemo("rollback", "gpt", "--to", 1).out
    records = [r for r in journal_of("gpt") if r["event"] == "rollback"]
    assert [r["to"] for r in records] == [9, 8, 1, 1]
    assert records[2]["fits"] == [
        {"fit": 0, "step": 1, "forgotten": [8], "deleted": [s for s in before[::-1] if 1 < s <= 8]}
    ]

    with holding(zygote, "gpt", 7, **settings):
        pass
    start = [r for r in journal_of("gpt") if r["event"] == "start"][-1]
    assert (start["resumed"], start["origin"], start["step"]) == (True, "storage", 1)
    assert 2 <= max(stored_steps(place)) <= 7
    assert status_of("gpt")["fits"][0]["newest"]["step"] == 7

    old = mnemo("export", "gpt", tmp_path / "old.pt", "--from", "storage", "--step", 1)
    assert old.out.startswith("step 1 of gpt, from storage")
    answer = mnemo("clean", "gpt")
    assert answer.out.startswith("gpt: freed ")
    assert answer.out.endswith(" MiB, gave up the snapshot of step 7\n")
    assert mnemo("status", "gpt").code == 1

    newest = stored_steps(place)[-1]
    again = mnemo("export", "gpt", tmp_path / "again.pt", "--persist-to", tmp_path)
    assert again.out.startswith(f"step {newest} of gpt, from storage")
    left = mnemo("rollback", "gpt", "--to", newest - 1, "--persist-to", tmp_path, "--yes")
    assert left.code == 0, left.err
    assert max(stored_steps(place)) < newest


def test_damaged_snapshots_are_not_called_missing(zygote: Zygote, tmp_path: Path) -> None:
    settings = persisting(tmp_path / "store")
    out = tmp_path / "gpt.pt"
    with holding(zygote, "gpt", 6, **settings):
        pass
    assert mnemo("rollback", "gpt", "--to", 6).code == 0  # waits for a checkpoint on its way
    assert "checksum" not in mnemo("status", "gpt", "--check").out
    assert damage(status_of("gpt")["smp"]["pid"]) >= 2
    assert status_of("gpt")["fits"][0]["checked"] is None
    said = mnemo("status", "gpt", "--check")
    assert said.code == 0, said.err
    for step in (5, 6):
        assert (
            f"damaged            chunk 0 of rank 0's snapshot of step {step} fails its" in said.out
        )
    assert "no snapshot in memory can be used" in said.out
    (fit,) = json.loads(mnemo("status", "gpt", "--check", "--json").out)["runs"][0]["fits"]
    assert [found["step"] for found in fit["checked"]][:2] == [6, 5]

    refused = mnemo("export", "gpt", out, "--from", "memory")
    assert (refused.code, refused.out) == (1, "")
    assert "mnemo: what is kept of run gpt in memory is damaged: chunk 0 of rank 0's " in (
        refused.err
    )
    for step in (5, 6):
        assert f"chunk 0 of rank 0's snapshot of step {step} fails its checksum" in refused.err
    assert "--persist-to says where else checkpoints are" in refused.err
    refused = mnemo("export", "gpt", out, "--from", "memory", "--step", 5)
    assert "what is kept of step 5 of run gpt in memory is damaged: chunk 0 of" in refused.err

    newest = stored_steps(tmp_path / "store" / "gpt")[-1]
    stored = mnemo("export", "gpt", out)
    assert stored.out == f"step {newest} of gpt, from storage, written to {out}\n"
    assert "snapshot of step 6 fails its checksum: it is passed over\n" in stored.err

    for part in (tmp_path / "store").rglob("step-*/*"):
        if part.name != "COMMITTED.json":
            part.write_bytes(bytes(part.stat().st_size))
    refused = mnemo("export", "gpt", out, "--force")
    assert f"kept of run gpt in memory or {tmp_path / 'store'} is damaged: " in refused.err
    assert torch.load(out, weights_only=True)["position"]["step"] == newest  # what was there stays
    assert mnemo("clean", "gpt").code == 0


def test_a_run_of_two_fits(zygote: Zygote, tmp_path: Path) -> None:
    """The first fit is finished and on storage, the second is in memory."""
    with holding(zygote, "gpt", 0, 3, **persisting(tmp_path, keep=1)):
        fits = status_of("gpt")["fits"]
        assert [(fit["fit"], fit["finished"]) for fit in fits] == [(0, True), (1, False)]
    assert stored_steps(tmp_path / "gpt") == [40]
    last = mnemo("export", "gpt", tmp_path / "last.pt")
    assert last.out.startswith("step 3 of gpt, from memory")
    first = mnemo("export", "gpt", tmp_path / "first.pt", "--fit", 0)
    assert first.out.startswith("step 40 of gpt, from storage")
    refused = mnemo("rollback", "gpt", "--to", 2, "--yes")
    assert refused.code == 1
    assert "nothing of run gpt, fit 0, is as old as step 2" in refused.err
    assert status_of("gpt")["fits"][1]["newest"]["step"] == 3
    assert mnemo("clean", "gpt").code == 0


def test_a_snapshot_process_that_does_not_answer(
    zygote: Zygote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "_PATIENCE_S", 0.5)
    with holding(zygote, "gpt", 2):
        pass
    pid = status_of("gpt")["smp"]["pid"]
    psutil.Process(pid).suspend()
    try:
        run = status_of("gpt")
        assert run["state"] == "not answering"
        assert "did not answer" in run["problem"]
        answer = mnemo("clean", "gpt")
        assert answer.code == 1
        assert "run gpt is left alone" in answer.err
    finally:
        psutil.Process(pid).resume()
    psutil.Process(pid).kill()
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10)
    assert status_of("gpt")["state"] == "left over"
    assert mnemo("clean", "gpt").code == 0
    assert not RunPaths.of("gpt", os.environ["MNEMO_RUN__DIR"]).directory.exists()


def test_looking_on_does_not_prolong_a_dead_runs_life(zygote: Zygote) -> None:
    with holding(zygote, "gpt", 2, MNEMO_SNAPSHOT__KEEP_ALIVE="2s"):
        pass
    smp = psutil.Process(status_of("gpt")["smp"]["pid"])
    first = status_of("gpt")["kept_for_s"]
    assert status_of("gpt")["kept_for_s"] < first <= 2
    wait_for_exit(smp.pid)
    assert mnemo("status", "gpt").code == 1


def test_the_command_itself() -> None:
    """As installed, and without loading torch."""
    code = "import atexit, sys; from mnemo.cli import main; atexit.register(lambda: 'torch' in "
    code += "sys.modules and print('torch was loaded', file=sys.stderr)); main()"
    for words in (("status",), ("--help",), ("export", "--help"), ("rollback", "--help")):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), words
        assert done.stdout
