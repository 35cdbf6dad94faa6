"""The benchmarks' harness: the file's form, the bars' arithmetic, the times' bookkeeping."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks.harness import Bar, Memcpy, Report, Samples, interleaved, machine, seconds

SAMPLE = '''"""Measures nothing.

More about it.
"""
def run(quick, report):
    report.row(case="one", stall_ms=1.5, failed=float("nan"), quick=quick)
    report.row(case="two", bytes=7)
    report.bar("stall_ratio", 0.01, 0.02, "lower")
    report.bar("speedup", 1.9, 2, "higher")
'''


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Put one benchmark and one helper where benchmarks are looked for."""
    import benchmarks

    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "sample_bench.py").write_text(SAMPLE)
    (folder / "helper.py").write_text('"""Helps."""\nclass Run:\n    def run(self): ...\n')
    monkeypatch.setattr(command, "__file__", str(folder / "__main__.py"))
    monkeypatch.setattr(benchmarks, "__path__", [str(folder)])
    monkeypatch.delitem(sys.modules, "benchmarks.sample_bench", raising=False)


@pytest.mark.parametrize(
    ("value", "bar", "better", "holds"),
    [
        (0.01, 0.02, "lower", True),
        (0.02, 0.02, "lower", True),
        (0.021, 0.02, "lower", False),
        (2.1, 2.0, "higher", True),
        (2.0, 2.0, "higher", True),
        (1.9, 2.0, "higher", False),
        (math.nan, 1.0, "lower", False),
        (math.nan, 1.0, "higher", False),
        (math.inf, 1.0, "lower", False),
        (-math.inf, 1.0, "higher", False),
    ],
)
def test_bar(value: float, bar: float, better: str, holds: bool) -> None:
    assert Bar("x", value, bar, better).holds is holds  # type: ignore[arg-type]


def test_file_is_one_object_of_the_agreed_form(sample: None, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    assert command.main(["sample_bench", "--quick", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert list(written) == ["benchmark", "commit", "machine", "rows", "bars"]
    assert written["benchmark"] == "sample_bench"
    assert written["rows"] == [
        {"case": "one", "stall_ms": 1.5, "failed": None, "quick": True},
        {"case": "two", "bytes": 7},
    ]
    assert written["bars"] == [
        {"name": "stall_ratio", "value": 0.01, "bar": 0.02, "better": "lower", "holds": True},
        {"name": "speedup", "value": 1.9, "bar": 2.0, "better": "higher", "holds": False},
    ]


def test_value_that_is_not_a_number_is_null_and_fails() -> None:
    report = Report("x")
    report.bar("broken", math.nan, 1, "lower")
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["bars"] == [
        {"name": "broken", "value": None, "bar": 1.0, "better": "lower", "holds": False}
    ]


def test_bar_reported_twice_is_refused() -> None:
    report = Report("x")
    report.bar("same", 1, 1, "lower")
    with pytest.raises(ValueError, match="'same' is reported twice in x"):
        report.bar("same", 2, 1, "lower")


def test_commit_and_machine_name_no_host(sample: None) -> None:
    found = Report("x").as_dict()
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", str(found["commit"]))
    assert machine().keys() == {"cpu", "cores", "memory_gib", "python", "torch", "kernel"}
    import socket

    assert socket.gethostname() not in json.dumps(machine())


def test_tables_show_every_row_and_whether_bars_hold(sample: None) -> None:
    report = Report("sample_bench")
    report.row(case="one", stall_ms=1.23456)
    report.row(case="two")
    report.bar("kept", 1, 2, "lower")
    report.bar("broken", 1, 2, "higher")
    console = Console(record=True, width=100, quiet=False, file=Path("/dev/null").open("w"))  # noqa: SIM115
    report.show(console)
    console.file.close()
    text = console.export_text()
    assert "1.235" in text
    assert re.search(r"kept .*≤ 2 .*✓", text)
    assert re.search(r"broken .*≥ 2 .*✗", text)


def test_no_figure_is_cut_off_on_a_narrow_screen(sample: None) -> None:
    report = Report("sample_bench")
    for case in range(8):
        report.row(what=f"a way of doing it, number {case}", figure=0.012345 + case)
    with Path("/dev/null").open("w") as nowhere:
        console = Console(record=True, width=60, file=nowhere)
        report.show(console)
    text = console.export_text()
    assert "…" not in text
    assert all(f"{0.012345 + case:.4g}" in text for case in range(8))


def test_list_names_benchmarks_and_leaves_helpers_out(
    sample: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.discover() == {"sample_bench": "Measures nothing."}
    assert command.main(["--list"]) == 0
    assert "Measures nothing." in capsys.readouterr().out


def test_the_real_benchmarks_have_a_purpose() -> None:
    assert "peers_saving" not in command.discover()
    assert all(command.discover().values())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sample_bnch"], "'sample_bnch' is not a benchmark; did you mean sample_bench?"),
        (["qqq"], "'qqq' is not a benchmark; there are: sample_bench"),
        ([], "there are: sample_bench"),
        (["sample_bench", "--json", "/nowhere/x.json"], "there is no directory /nowhere"),
    ],
)
def test_wrong_arguments_are_explained(
    sample: None, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        command.main(arguments)
    assert left.value.code == 2
    assert says in capsys.readouterr().err


def test_samples() -> None:
    samples = Samples([4.0, 1.0, 3.0, 2.0, 5.0])
    assert samples.median == 3.0
    assert samples.quartiles == (2.0, 4.0)
    assert Samples([7.0]).quartiles == (7.0, 7.0)
    assert Samples([4.0, 9.0]).over(Samples([2.0, 3.0])).values == [2.0, 3.0]
    with pytest.raises(ValueError, match="shorter"):
        Samples([1.0, 2.0]).over(Samples([1.0]))


def test_cases_take_turns_and_warmup_is_thrown_away() -> None:
    calls: list[str] = []

    def case(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    taken = interleaved({n: lambda n=n: case(n) for n in "abc"}, rounds=3, warmup=1)  # type: ignore[misc]
    assert "".join(calls) == "cab" + "abc" + "bca" + "cab"
    assert taken["a"].values == [4.0, 9.0, 11.0]


def test_memcpy_copies_everything() -> None:
    copy = Memcpy(1 << 20)
    assert 0 < copy() < 1
    assert (copy._target == 1).all()


def test_seconds_measures_the_call() -> None:
    done: list[int] = []
    assert seconds(lambda: done.append(1)) >= 0
    assert done == [1]
