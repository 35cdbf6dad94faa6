"""A warm standby: a process that has executed a script's imports, and waits to become a rank.

It is started with what a rank has in its environment but for what tells ranks apart, so that only
that is set when it becomes one. While it warms up it notes who reads those variables: what a
module made of their absence would be wrong in every rank.

Its control channel is the rank's later on; before, `Warm` or `Reads` go to the agent, and `Become`
comes back with the descriptors of standard output and error.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import os
import runpy
import socket
import sys
import threading
import traceback
from importlib.machinery import SourceFileLoader
from typing import TYPE_CHECKING, Any, Final

import msgspec
import psutil

from mnemo import faults
from mnemo.launcher.imports import preamble
from mnemo.recovery.control import CONTROL_VARIABLE, JOIN_VARIABLE

if TYPE_CHECKING:
    from types import CodeType

RANKS_OWN: Final = frozenset({"RANK", "LOCAL_RANK", "ROLE_RANK", JOIN_VARIABLE})
"""Variables that tell ranks apart."""
_HARMLESS: Final = frozenset({"lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics"})
"""What they read becomes ``rank_zero_only.rank``, which is put right."""
_LATER: Final = (
    ("torch", ("mnemo.session", "mnemo.session.replacing", "mnemo.comm", "omegaconf")),
    ("lightning", ("lightning_mnemo",)),
)
"""What a rank that can be replaced imports later than its script does, once that has imported
something: it takes half a second."""
_MOST_BYTES: Final = 1 << 16


class Warm(msgspec.Struct, frozen=True, tag="warm"):
    """It has imported what it can.

    Attributes:
        memory_bytes: Memory that nobody else uses.
        rest: Line of the first import that is left to the script; None if there is none.
    """

    memory_bytes: int
    rest: int | None


class Reads(msgspec.Struct, frozen=True, tag="reads"):
    """A module reads what tells ranks apart while it is imported; this process ends.

    Attributes:
        line: Of the statement in the script that imported it; 0 if that cannot be left out.
        module: Its name.
        variable: What it reads.
    """

    line: int
    module: str
    variable: str


class Become(msgspec.Struct, frozen=True, tag="become"):
    """Be a rank.

    Attributes:
        environ: Variables to set.
        without: Variables to remove.
    """

    environ: dict[str, str]
    without: list[str]


decoder: Final = msgspec.json.Decoder[Warm | Reads](Warm | Reads)


class _Environ(os._Environ):  # type: ignore[type-arg]
    """Notes reads of what tells ranks apart; `os.environ` is of this class while warming up."""

    reads: Final[list[tuple[str, str]]] = []
    """Module and variable."""

    def __getitem__(self, key: Any) -> Any:
        if key in RANKS_OWN and (module := _importing()):
            self.reads.append((module, key))
        return super().__getitem__(key)


def _importing() -> str:
    """The module whose import, in this thread, comes here; empty where that is known to be fine."""
    frame = sys._getframe(2)
    while frame and frame.f_code.co_name != "<module>":
        frame = frame.f_back  # type: ignore[assignment]
    name = str(frame.f_globals.get("__name__", "")) if frame else ""
    return "" if name == "__main__" or name.partition(".")[0] in _HARMLESS else name


class Script:
    """What the rank will run.

    Args:
        words: ``SCRIPT [ARG]...``, or ``-m MODULE [ARG]...``.
    """

    def __init__(self, words: list[str]) -> None:
        self._is_module = words[0] == "-m"
        name, *args = words[1:] if self._is_module else words
        self._name = name
        if self._is_module:
            spec = importlib.util.find_spec(name)
            if spec and spec.submodule_search_locations is not None:
                spec = importlib.util.find_spec(f"{name}.__main__")
            if spec is None or spec.origin is None:
                msg = f"there is no module {name}"
                raise ImportError(msg)
            self.path, self._package = spec.origin, spec.parent
        else:
            # As the interpreter has it, which does not resolve anything.
            self.path, self._package = os.path.join(os.getcwd(), name), None  # noqa: PTH109, PTH118
        sys.argv = [self.path if self._is_module else name, *args]
        sys.orig_argv[2:] = words

    def warm_up(self, until: int | None) -> int | None:
        """Execute its imports, up to the line ``until``; see `Preamble.rest`."""
        beginning = preamble(self._read(), until)
        names = {"__name__": "__main__", "__package__": self._package, "__file__": self.path}
        for statement in beginning.statements:
            code = compile(ast.Module([statement], []), self.path, "exec", dont_inherit=True)
            try:
                exec(code, names)  # noqa: S102
            except (Exception, SystemExit):  # noqa: BLE001 - it is for the rank to fail
                traceback.print_exc()
            if _Environ.reads:
                raise _ReadsError(statement.lineno)
        for first, others in _LATER:
            for name in others if first in sys.modules else ():
                with contextlib.suppress(ImportError):
                    importlib.import_module(name)
        return beginning.rest

    def run(self) -> None:
        """Run it as the interpreter would, in its ``__main__``."""
        names = vars(sys.modules["__main__"])
        for name in [name for name in names if not name.startswith("__")]:
            del names[name]
        if self._is_module:
            # What ``python -m`` itself calls.
            runpy._run_module_as_main(self._name)  # type: ignore[attr-defined]
            return
        loader = SourceFileLoader("__main__", self.path)
        names |= {"__file__": self.path, "__loader__": loader, "__cached__": None}
        exec(self._compile(), names)  # noqa: S102

    def _compile(self) -> CodeType:
        code: CodeType = compile(self._read(), self.path, "exec", dont_inherit=True)
        return code

    def _read(self) -> bytes:
        with io.open_code(self.path) as file:
            return file.read()


class _ReadsError(Exception):
    def __init__(self, line: int) -> None:
        super().__init__(line)
        self.line = line


def full_speed(pid: int) -> None:
    """Put all threads of a process back to the normal priority."""
    for task in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208 - names only
        with contextlib.suppress(ProcessLookupError):
            os.sched_setscheduler(int(task), os.SCHED_OTHER, os.sched_param(0))


def _step_back() -> bool:
    """Take the lowest priority, if it can be left again, which takes a right that many lack."""
    may: list[bool] = []

    def try_it() -> None:  # in a thread: each has its own
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
            may.append(True)

    thread = threading.Thread(target=try_it)
    thread.start()
    thread.join()
    if may:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    return bool(may)


def main() -> None:
    """Warm up, wait, become a rank. The arguments: line to stop at (0: none), `Script`'s."""
    until, *words = sys.argv[1:]
    agent = socket.socket(fileno=int(os.environ[CONTROL_VARIABLE]))
    os.environ.__class__ = _Environ
    stepped_back = _step_back()
    try:
        script = Script(words)
        if _Environ.reads:  # the packages that a module is in
            raise _ReadsError(0)
        rest = script.warm_up(int(until) or None)
    except _ReadsError as error:
        agent.send(msgspec.json.encode(Reads(error.line, *_Environ.reads[0])))
        return
    if stepped_back:
        full_speed(os.getpid())
    memory = psutil.Process().memory_full_info().uss
    agent.send(msgspec.json.encode(Warm(memory, rest)))
    faults.reach("standby")
    data, fds, _, _ = socket.recv_fds(agent, _MOST_BYTES, 2)
    agent.detach()  # the rank's from here on
    if data:
        _become(msgspec.json.decode(data, type=Become), fds)
        script.run()


def _become(rank: Become, fds: list[int]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    for number, fd in enumerate(fds, start=1):
        os.dup2(fd, number)
        os.close(fd)
    os.environ.__class__ = os._Environ
    for name in rank.without:
        os.environ.pop(name, None)
    os.environ.update(rank.environ)
    faults.arm(os.environ)
    for module in list(sys.modules.values()):
        only = getattr(module, "__dict__", {}).get("rank_zero_only")
        if only is not None and hasattr(only, "rank"):
            only.rank = int(rank.environ["RANK"])
