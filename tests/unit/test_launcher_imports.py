from __future__ import annotations

import ast

import pytest

from mnemo.launcher.imports import preamble, unguarded

SCRIPT = """
'''What it is.'''
from __future__ import annotations

import os, sys
from pathlib import Path
import warnings
os.environ["OMP_NUM_THREADS"] = "2"
os.environ.setdefault("A", "b")
warnings.filterwarnings("ignore", category=UserWarning)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "lib"))
sys.path.append(os.path.join(os.path.dirname(__file__), ".."))
STEPS: int = 3 * 10
if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = None
try:
    import wandb
except ImportError:
    wandb = None
import torch
"""


def test_all_of_a_usual_beginning_may_be_executed() -> None:
    found = preamble(SCRIPT + "def main(): import late\nif __name__ == '__main__':\n    main()\n")
    assert len(found.statements) == len(ast.parse(SCRIPT).body)
    assert found.rest is None


@pytest.mark.parametrize(
    "statement",
    [
        "torch.manual_seed(0)",
        "x = compute()",
        "x.y = 1",
        "os.environ[name()] = '1'",
        "os.environ['A'] = os.environ['RANK']",
        "sys.path.insert(0, download())",
        "sys.path.insert(0, Path(download()).parent)",
        "sys.path.clear()",
        "@decorated\nclass A: pass",
        "def f(): pass",
        "with suppress(ImportError):\n    import apex",
        "if os.environ.get('DEBUG'):\n    import pdb",
        "for name in ('a', 'b'): pass",
        "x = [each for each in range(3)]",
        "del os",
        "assert torch.cuda.is_available()",
    ],
)
def test_what_may_do_anything_else_ends_it(statement: str) -> None:
    found = preamble(f"import os\n{statement}\nx = 1\nimport torch\n")
    assert [ast.unparse(each) for each in found.statements] == ["import os"]
    assert found.rest is not None


def test_the_first_import_behind_its_end_is_named() -> None:
    text = "import os\nstart()\n\nx = 1\ntry:\n    import a\nexcept ImportError: pass\nimport b"
    assert preamble(text).rest == 5


def test_it_can_be_ended_before() -> None:
    found = preamble("import a\nimport b\nimport c\n", until=2)
    assert [ast.unparse(each) for each in found.statements] == ["import a"]
    assert found.rest == 2


def test_what_is_no_python_is_said_to_be_none() -> None:
    with pytest.raises(SyntaxError):
        preamble("import")


@pytest.mark.parametrize(
    ("rest", "line"),
    [
        ("def main(): fit()\nif __name__ == '__main__':\n    main()", None),
        ("print()\nif __name__ == '__main__':\n    main()", None),  # it has been thought of
        ("def main(): fit()\nSTEPS = count()", None),
        ("def main(): fit()\nmain()", 2),
        ("data = load()\nfor batch in data: fit(batch)", 2),
        ("if torch.cuda.is_available():\n    fit()", 1),
        ("try:\n    fit()\nexcept Exception: pass", 1),
    ],
)
def test_what_a_script_does_for_whoever_imports_it(rest: str, line: int | None) -> None:
    before = SCRIPT.count("\n")
    assert unguarded(SCRIPT + rest) == (None if line is None else line + before)
