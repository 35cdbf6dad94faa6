"""The leak fixture catches every kind of thing that it promises to catch, and nothing else."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ET
from pathlib import Path

import psutil
import pytest

TESTS = Path(__file__).parents[1]

CONFTEST = """
import contextlib
import os
import sys
from pathlib import Path

sys.path.insert(0, {tests!r})
import leaks


@contextlib.contextmanager
def watch(watch=leaks.watch):
    with watch() as left:
        yield left
    for place in "/dev/shm", "/tmp":  # as soon as may be: other tests run beside these
        for lost in Path(place).glob("mnemo-lost-%d" % os.getpid()):
            lost.rmdir() if lost.is_dir() else lost.unlink()


leaks.patience_s = 0.2
leaks.watch = watch
exec(open({tests!r} + "/conftest.py").read())
"""

PRELUDE = """
import mmap
import multiprocessing.shared_memory
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from subprocess import PIPE

import pytest

KEPT = []
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
FORKS = '''
import os, sys, time
for line in sys.stdin:
    if os.fork() == 0:
        if os.fork() == 0:
            os.closerange(0, 3)
            time.sleep(601)
        os._exit(0)
    os.wait()
    print(flush=True)
'''


@pytest.fixture(scope="session", autouse=True)
def older():
    with subprocess.Popen([sys.executable, "-c", FORKS], stdin=PIPE, stdout=PIPE) as process:
        KEPT.append(process)
        yield


def daemonize(in_child):
    first = os.fork()
    if first == 0:
        os.setsid()
        if os.fork() == 0:
            for fd in range(3):
                os.dup2(os.open(os.devnull, os.O_RDWR), fd)
            in_child()
        os._exit(0)
    os.waitpid(first, 0)
"""

# name of the leak -> (what leaks it, what the failure has to say)
LEAKS = {
    "child": ("KEPT.append(subprocess.Popen(SLEEP))", "process: "),
    "zombie": ("KEPT.append(os.posix_spawn('/bin/true', ['true'], {}))", "zombie"),
    "daemon_exec": ("daemonize(lambda: os.execv(SLEEP[0], SLEEP))", "time.sleep(600)"),
    "daemon_fork": ("daemonize(lambda: time.sleep(600))", "process: "),
    "orphan_of_an_older_one": (
        "KEPT[0].stdin.write(b'\\n'); KEPT[0].stdin.flush(); KEPT[0].stdout.readline()",
        "time.sleep(601)",
    ),
    "thread": (
        "threading.Thread(target=time.sleep, args=(600,), name='lost', daemon=True).start()",
        "thread: lost",
    ),
    "descriptor": ("KEPT.append(os.open('/dev/null', os.O_RDONLY))", "-> /dev/null"),
    "socket": ("KEPT.append(socket.socket())", "-> socket:["),
    "memfd": ("KEPT.append(os.memfd_create('lost'))", "memfd: "),
    "mapping": (
        """
        fd = os.memfd_create("mapped")
        os.ftruncate(fd, 9)
        KEPT.append(mmap.mmap(fd, 9))
        os.close(fd)
        """,
        "/memfd:mapped",
    ),
    "unix_socket": (
        """
        KEPT.append(socket.socket(socket.AF_UNIX))
        KEPT[-1].bind(os.environ["MNEMO_RUN__DIR"] + "/smp.sock")
        """,
        "unix socket: ",
    ),
    "dev_shm": ("open('/dev/shm/mnemo-lost-%d' % os.getpid(), 'w').close()", "/dev/shm entry"),
    "tmp_entry": ("os.mkdir('/tmp/mnemo-lost-%d' % os.getpid())", "/tmp entry: /tmp/mnemo-lost-"),
    "temporary_file": ("tempfile.mkdtemp()", "temporary file: "),
    "run_directory": ("os.mkdir(os.environ['MNEMO_RUN__DIR'] + '/a-run')", "a-run"),
    "variable_set": ("os.environ['MNEMO_LOST'] = '1'", "MNEMO_LOST: None became '1'"),
    "variable_unset": ("del os.environ['HOME']", "HOME: "),
}

# What is left to the collector, or to a failed test's exception: (what leaks it, the warning).
DROPPED = {
    "cycle_dropped": ("a = [socket.socket()]; a.append(a)", "unclosed <socket.socket"),
    "failed": ("held = socket.socket(); assert held is None", "unclosed <socket.socket"),
}

CLEAN = {
    "nothing": "pass",
    "late_exit": """
        KEPT.append(subprocess.Popen(["sleep", "0.1"]))
        threading.Thread(target=KEPT[-1].wait).start()
        """,
    "cycle": "a = [socket.socket()]; a.append(a); a[0].close()",
    "journal": "open(os.environ['MNEMO_RUN__JOURNAL'] + '/x.jsonl', 'w').close()",
    "shared_memory": (
        "m = multiprocessing.shared_memory.SharedMemory(create=True, size=9); m.close(); m.unlink()"
    ),
    "tmp_path": "tmp_path.joinpath('x').touch()",
    "monkeypatch": "monkeypatch.setenv('MNEMO_X', '1')",
}


def _indent(body: str) -> str:
    return textwrap.indent(textwrap.dedent(body).strip(), "    ")


@pytest.fixture(scope="module")
def inner(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Run all leaks in a pytest of their own; maps test name to what it was blamed for."""
    where = tmp_path_factory.mktemp("inner")
    (where / "conftest.py").write_text(CONFTEST.format(tests=str(TESTS)))
    bodies = {name: body for name, (body, _) in (DROPPED | LEAKS).items()} | CLEAN
    (where / "test_inner.py").write_text(
        PRELUDE
        + "\n".join(
            f"def test_{name}(tmp_path, monkeypatch):\n{_indent(body)}\n"
            for name, body in bodies.items()
        )
        + "def test_seed(seed):\n    assert seed < 0\n"
    )
    options = [
        "-q",
        "-Werror",
        "-p",
        "no:cacheprovider",
        "--junitxml=out.xml",
        "-o",
        "junit_logging=all",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=where,
        env={k: v for k, v in os.environ.items() if k != "MNEMO_TEST_SEED"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    try:
        cases = ET.parse(where / "out.xml").iter("testcase")
    except FileNotFoundError:
        pytest.fail(done.stdout + done.stderr)
    return {
        case.attrib["name"].removeprefix("test_"): "".join(
            (part.text or "") + part.attrib.get("message", "") for part in case
        )
        if {part.tag for part in case} & {"failure", "error"}
        else ""
        for case in cases
    }


@pytest.mark.parametrize("name", LEAKS)
def test_leak_is_caught_and_named(inner: dict[str, str], name: str) -> None:
    assert "left behind" in inner[name]
    assert LEAKS[name][1] in inner[name]


@pytest.mark.parametrize("name", DROPPED)
def test_what_is_dropped_warns_in_its_own_test(inner: dict[str, str], name: str) -> None:
    says = DROPPED[name][1]
    assert says in inner[name]
    assert [test for test, text in inner.items() if says in text] == list(DROPPED)


@pytest.mark.parametrize("name", CLEAN)
def test_clean_test_is_not_blamed(inner: dict[str, str], name: str) -> None:
    assert inner[name] == ""


def test_one_leak_is_blamed_on_one_test(inner: dict[str, str]) -> None:
    for name, (_, says) in LEAKS.items():
        if says != "process: ":
            blamed = [test for test, text in inner.items() if says in text]
            assert name in blamed
            assert len(blamed) <= 2, blamed  # a memfd is a descriptor and a mapping too


def test_left_processes_are_ended(inner: dict[str, str]) -> None:
    for text in inner.values():
        for line in text.splitlines():
            if line.strip().startswith("process: "):
                with contextlib.suppress(psutil.NoSuchProcess):
                    assert psutil.Process(int(line.split()[1])).status() == psutil.STATUS_ZOMBIE


def test_seed_is_shown_on_failure(inner: dict[str, str]) -> None:
    assert "MNEMO_TEST_SEED=" in inner["seed"]


def test_private_places(tmp_path: Path) -> None:
    run = Path(os.environ["MNEMO_RUN__DIR"])
    assert run.is_dir()
    assert run.stat().st_mode & 0o777 == 0o700
    assert len(str(run)) < 40
    assert run not in tmp_path.parents
