"""A standby that has become a rank is in nothing different from one that was started as a rank."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from launching import logs
from replacing_lab import Job, job, write

if TYPE_CHECKING:
    from pathlib import Path

FACTS = """
    import json, subprocess, threading, multiprocessing
    say("facts", rank, json.dumps({
        "name": __name__, "file": __file__, "argv": sys.argv, "orig_argv": sys.orig_argv,
        "path": sys.path, "package": __package__, "spec": __spec__ and __spec__.name,
        "loader": type(__loader__).__name__, "cached": __cached__, "doc": __doc__,
        "globals": sorted(globals()), "main": sys.modules["__main__"].__dict__ is globals(),
        "flags": list(sys.flags), "environ": dict(os.environ), "cwd": os.getcwd(),
        "streams": [os.readlink(f"/proc/self/fd/{fd}").partition(":")[0] for fd in range(3)],
        "threads": len(os.listdir("/proc/self/task")), "sid": os.getsid(0) == os.getpid(),
        "schedulers": [os.sched_getscheduler(int(t)) for t in os.listdir("/proc/self/task")],
        "signals": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGHUP)],
    }))
"""


def facts(run: Job, rank: int) -> dict[str, Any]:
    begin = f"facts {rank} "
    found: dict[str, Any] = json.loads(run.until(begin)[0].partition(begin)[2])
    return found


def differences(run: Job) -> dict[str, tuple[object, object]]:
    """What differs in rank 1 between its first process and the standby that takes its place."""
    run.ready(0, 1)
    run.warm()
    before = facts(run, 1)
    run.kill(1)
    assert " → standby, " in run.until("steps lost")[0]
    after = facts(run, 1)
    environ, changed = before.pop("environ"), after.pop("environ")
    flat = {f"${k}": environ.get(k) for k in {*environ, *changed}}
    before |= flat
    after |= {f"${k}": changed.get(k) for k in {*environ, *changed}}
    return {k: (before[k], after[k]) for k in before if before[k] != after[k]}


def check(found: dict[str, tuple[object, object]]) -> None:
    """Only what has to be different is."""
    assert found.pop("$MNEMO_JOIN") == (None, "1")
    assert found.pop("$MNEMO_REFUSAL_FILE")[1] is None
    before, after = found.pop("$MNEMO_CONTROL_FD", ("1", "1"))
    assert f"{before}{after}".isdecimal()
    assert found == {}


@pytest.mark.parametrize("name", ["./train.py", "sub/link.py"])
def test_a_script(tmp_path: Path, name: str) -> None:
    """Also by a relative path, or by a link from elsewhere."""
    write(tmp_path, before=FACTS, top='"""What it says of itself."""\n')
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "link.py").symlink_to(tmp_path / "train.py")
    with job(name, "--lr", "0.1", "a b", cwd=tmp_path, ranks=2) as run:
        check(differences(run))
        assert run.stop() == 75


def test_a_module(tmp_path: Path) -> None:
    package = tmp_path / "pack"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "near.py").write_text("import os\nimported_by = os.getpid()\n")
    write(package, before=FACTS, top="from . import near\n")
    with job("-m", "pack.train", "--lr", "0.1", cwd=tmp_path, ranks=2) as run:
        check(differences(run))
        assert run.stop() == 75


def test_a_package(tmp_path: Path) -> None:
    package = tmp_path / "pack"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / write(package, before=FACTS)).rename(package / "__main__.py")
    with job("-m", "pack", cwd=tmp_path, ranks=2) as run:
        check(differences(run))
        assert run.stop() == 75


def test_what_stands_before_the_imports_counts(tmp_path: Path) -> None:
    """The environment that a module is imported in, and where it is found."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "helper.py").write_text("""
import os
print("imported by", os.getpid(), flush=True)
seen, by = os.environ.get("SPEED"), os.getpid()
os.environ["LEFT"] = "by the import"
""")
    # also a module of the script's own, with the name of one of the standard library
    (tmp_path / "queue.py").write_text("mine = True\n")
    top = """
import os, sys
os.environ["SPEED"] = "fast"
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "lib"))
import helper
try:
    import not_there
except ImportError:
    not_there = None
import queue
"""
    before = """
    say("helper", rank, helper.seen, helper.by, os.environ["LEFT"], queue.mine, sys.path[0])
"""
    with job(write(tmp_path, top=top, before=before), cwd=tmp_path, ranks=2) as run:
        run.ready(0, 1)
        assert "left to the script" not in run.warm()
        first = run.until("helper 1")[0].split()[4:]
        (standby,) = (
            p.pid
            for p in psutil.Process(run.pid).children()
            if p.environ().get("MNEMO_ROLE") == "standby"
        )
        run.kill(1)
        then = run.until("helper 1")[0].split()[4:]
        assert int(then[1]) == standby == run.pids[1]
        assert [first[0], *first[2:]] == [then[0], *then[2:]]
        assert run.stop() == 75
    # what it wrote while it imported went elsewhere
    assert not any(f"imported by {standby}" in line for line in run.seen)
    assert f"imported by {standby}" in logs(0)["standby.log"]


def test_a_module_that_asks_for_the_rank_is_left_to_the_script(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text("import os\nby = os.getpid()\n")
    (tmp_path / "curious.py").write_text(
        "import os\nrank, by = int(os.environ.get('RANK', -1)), os.getpid()\n"
    )
    top = "import plain\nimport curious\nimport os\n"
    before = 'say("imported", rank, plain.by == os.getpid(), curious.rank)'
    with job(write(tmp_path, top=top, before=before), cwd=tmp_path, ranks=2) as run:
        run.ready(0, 1)
        said, ready = run.until("curious reads RANK", "is replaced in the running job")
        assert "it leaves train.py from line 2 on to the rank" in said
        assert "imports from line 2 on left to the script" in ready
        run.until("imported 1")
        run.kill(1)
        assert run.until("imported 1")[0].endswith("True 1")
        assert " → standby, " in run.until("steps lost")[0]
        assert run.stop() == 75


def test_a_script_that_cannot_be_kept_warm(tmp_path: Path) -> None:
    """A package that asks for the rank before anything in it can be imported."""
    package = tmp_path / "pack"
    package.mkdir()
    (package / "__init__.py").write_text("import os\nrank = os.environ.get('LOCAL_RANK')\n")
    write(package)
    with job("-m", "pack.train", cwd=tmp_path, ranks=2) as run:
        run.ready(0, 1)
        run.until("pack reads LOCAL_RANK while it is imported: no other is kept")
        run.kill(1)
        assert " → new process, " in run.until("steps lost")[0]
        assert run.stop() == 75


LOADER = """
import torch
from torch.utils.data import DataLoader, Dataset


class Numbers(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.tensor(index * 10)


def collate(batch):
    return sum(batch)
"""


def test_loader_workers_find_what_the_script_defines(tmp_path: Path) -> None:
    """They are spawned: each imports the script, and unpickles what is defined in it."""
    before = """
    loader = DataLoader(Numbers(), batch_size=2, num_workers=1, collate_fn=collate,
                        multiprocessing_context="spawn")
    say("loaded", rank, [int(batch) for batch in loader] if joins else "nothing")
"""
    with job(write(tmp_path, top=LOADER, before=before), cwd=tmp_path, ranks=2) as run:
        run.ready(0, 1)
        run.warm()
        run.kill(1)
        run.until("loaded 1 nothing")
        assert run.until("loaded 1 [")[0].endswith("[10, 50]")
        assert " → standby, " in run.until("steps lost")[0]
        assert run.stop() == 75


def test_the_ranks_store_outlives_rank_0(tmp_path: Path) -> None:
    top = "import os\nimport torch.distributed as dist\n"
    before = """
    store, *_ = next(dist.rendezvous("env://"))
    say("store", life, store.add("ranks", 1))
"""
    with job(write(tmp_path, top=top, before=before), cwd=tmp_path, ranks=2) as run:
        run.ready(0, 1)
        run.warm()
        run.kill(0)
        run.until("store 0 1", "store 0 2", "store 0 3", "steps lost")
        run.kill(0, 1)
        run.until("all 2 ranks restart", "store 1 1", "store 1 2")
        run.ready(0, 1)
        assert run.stop() == 75
