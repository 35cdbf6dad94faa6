"""What runs beside the trainer never loads torch, and importing mnemo costs nothing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

WITHOUT_TORCH = ["mnemo", "mnemo.clock", "mnemo.errors", "mnemo.types"] + [
    f"mnemo.{name}"
    for name in (
        "cli",
        "config",
        "erasure",
        "faults",
        "launcher",
        "membership",
        "protect",
        "recovery",
        "smp",
        "storage",
        "transport",
    )
]
FRAMEWORKS = {"torch", "lightning", "pytorch_lightning", "accelerate", "transformers"}

IMPORT_ALL = """
import importlib, json, pkgutil, sys

package = importlib.import_module(sys.argv[1])
if sys.argv[1] != "mnemo":
    for module in pkgutil.walk_packages(getattr(package, "__path__", []), sys.argv[1] + "."):
        importlib.import_module(module.name)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""

TIME_IMPORT = """
import json, os, sys, time

before = set(sys.modules)
start = time.process_time()
import mnemo
seconds = time.process_time() - start
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps([seconds, sorted(new - set(sys.stdlib_module_names))]))
"""


def _python(code: str, *arguments: str) -> object:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_package_and_all_its_modules_leave_torch_out(package: str) -> None:
    loaded = _python(IMPORT_ALL, package)
    assert isinstance(loaded, list)
    assert "mnemo" in loaded
    assert FRAMEWORKS.isdisjoint(loaded)


def test_importing_mnemo_costs_nothing() -> None:
    runs = [_python(TIME_IMPORT) for _ in range(5)]
    assert {str(third_party) for _, third_party in runs} == {"['mnemo']"}
    fastest = min(seconds for seconds, _ in runs)
    assert fastest < 0.015, f"import mnemo takes {fastest * 1000:.1f} ms"
