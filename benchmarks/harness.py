"""What every benchmark shares: the report that it fills, and honest ways to take times.

Times on a shared machine drift, so what is compared is measured in turns within one run
(`interleaved`), and reported as a median with quartiles. Figures that should not depend on the
machine are ratios to `Memcpy`, a warm copy of the same number of bytes.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import psutil
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rich.console import Console

_ANY_WIDTH = 10_000
Scalar = str | int | float | bool | None
Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Bar:
    """A figure that the project promises, beside what was measured.

    Attributes:
        name: As the promise names it.
        value: Measured; not a number where the measurement failed.
        bar: What it is compared with.
        better: On which side of ``bar`` the value should lie; equal holds.
    """

    name: str
    value: float
    bar: float
    better: Better

    @property
    def holds(self) -> bool:
        """Whether the promise is kept."""
        return self.value <= self.bar if self.better == "lower" else self.value >= self.bar

    def as_dict(self) -> dict[str, Scalar]:
        """Return the JSON form; a value that is not finite becomes null."""
        value = self.value if math.isfinite(self.value) else None
        return {
            "name": self.name,
            "value": value,
            "bar": self.bar,
            "better": self.better,
            "holds": self.holds,
        }


@dataclass
class Report:
    """What a benchmark has found; filled by its ``run``.

    Attributes:
        benchmark: Its name.
        rows: Measurements, one flat mapping each.
        bars: Promises and whether they hold.
    """

    benchmark: str
    rows: list[dict[str, Scalar]] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)

    def row(self, **measured: Scalar) -> None:
        """Add one measurement; units belong into the names (``stall_ms``)."""
        self.rows.append(measured)

    def bar(self, name: str, value: float, bar: float, better: Better) -> None:
        """Compare one figure with its promise.

        Raises:
            ValueError: ``name`` was used before.
        """
        if any(known.name == name for known in self.bars):
            msg = f"the bar {name!r} is reported twice in {self.benchmark}"
            raise ValueError(msg)
        self.bars.append(Bar(name, float(value), float(bar), better))

    def as_dict(self) -> dict[str, object]:
        """Return the one JSON object that a run leaves."""
        return {
            "benchmark": self.benchmark,
            "commit": commit(),
            "machine": machine(),
            "rows": [
                {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in r}
                for r in (row.items() for row in self.rows)
            ],
            "bars": [bar.as_dict() for bar in self.bars],
        }

    def write(self, path: Path) -> None:
        """Write `as_dict` as one JSON object."""
        path.write_text(json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n")

    def show(self, console: Console) -> None:
        """Print the rows, then the bars."""
        if self.rows:
            anything = console.options.update(width=_ANY_WIDTH)
            whole = self._table()
            if console.measure(whole, options=anything).maximum <= console.width:
                console.print(whole)
            else:
                for table in self._turned_tables(console):
                    console.print(table)
        if self.bars:
            table = Table(title="bars")
            for name in ("name", "value", "bar", "holds"):
                table.add_column(name, justify="left" if name == "name" else "right")
            for bar in self.bars:
                sign = "≤" if bar.better == "lower" else "≥"
                holds = "[green]✓[/]" if bar.holds else "[red]✗[/]"
                table.add_row(bar.name, _shown(bar.value), f"{sign} {_shown(bar.bar)}", holds)
            console.print(table)

    def _columns(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def _table(self) -> Table:
        """One line a measurement."""
        table = Table(title=self.benchmark)
        for name in self._columns():
            numeric = any(isinstance(row.get(name), int | float) for row in self.rows)
            table.add_column(name, justify="right" if numeric else "left")
        for row in self.rows:
            table.add_row(*(_shown(row.get(name)) for name in self._columns()))
        return table

    def _turned_tables(self, console: Console) -> list[Table]:
        """One column a measurement, for a screen on which the other form does not fit.

        As many beside each other as leave every figure whole.
        """
        anything = console.options.update(width=_ANY_WIDTH)
        tables: list[Table] = []
        for beside in range(len(self.rows), 0, -1):
            starts = range(0, len(self.rows), beside)
            tables = [self._turned_table(self.rows[i : i + beside]) for i in starts]
            widths = [console.measure(each, options=anything).minimum for each in tables]
            if max(widths) <= console.width:
                break
        return tables

    def _turned_table(self, rows: Sequence[Mapping[str, Scalar]]) -> Table:
        first, *others = self._columns()
        table = Table(title=self.benchmark)
        table.add_column(first, no_wrap=True)
        for row in rows:
            table.add_column(_shown(row.get(first)), justify="right")
        for name in others:
            if any(row.get(name) is not None for row in rows):
                table.add_row(name, *(_shown(row.get(name)) for row in rows))
        return table


def _shown(value: Scalar) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def commit() -> str:
    """Return the commit measured, with ``-dirty`` where tracked files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, check=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.decode().strip() + ("-dirty" if changes.stdout.strip() else "")


def machine() -> dict[str, Scalar]:
    """Describe what was measured on, without names or paths of the host."""
    info = Path("/proc/cpuinfo").read_text()
    models = [line.split(":", 1)[1] for line in info.splitlines() if line.startswith("model name")]
    try:
        torch: str | None = version("torch")
    except PackageNotFoundError:
        torch = None
    return {
        "cpu": models[0].strip() if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch,
        "kernel": platform.release(),
    }


@dataclass(frozen=True)
class Samples:
    """Repeated measurements of one thing, in the order taken."""

    values: Sequence[float]

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The values below which a quarter and three quarters lie."""
        if len(self.values) == 1:
            return self.values[0], self.values[0]
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high

    def over(self, reference: Samples) -> Samples:
        """Return the ratios of what was measured in the same rounds.

        Raises:
            ValueError: The numbers of rounds differ.
        """
        pairs = zip(self.values, reference.values, strict=True)
        return Samples([value / other for value, other in pairs])

    def beyond(self, reference: Samples) -> Samples:
        """Return the differences to what was measured in the same rounds: drift cancels out.

        Raises:
            ValueError: The numbers of rounds differ.
        """
        pairs = zip(self.values, reference.values, strict=True)
        return Samples([value - other for value, other in pairs])


def seconds(action: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def interleaved(
    cases: Mapping[str, Callable[[], float]], *, rounds: int, warmup: int = 1
) -> dict[str, Samples]:
    """Measure several cases in turns, so that drift of the machine hits them alike.

    Args:
        cases: Each call does one measurement and returns it, in seconds or any other unit.
        rounds: Measurements kept per case; the order rotates by one every round.
        warmup: Rounds done first and thrown away.
    """
    names = list(cases)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            value = cases[name]()
            if number >= 0:
                taken[name].append(value)
    return {name: Samples(values) for name, values in taken.items()}


class Memcpy:
    """A warm copy of ``nbytes`` within memory: the reference for all that moves state.

    Both sides are touched beforehand, so that no page fault is measured.
    """

    def __init__(self, nbytes: int) -> None:
        self._source = np.ones(nbytes, dtype=np.uint8)
        self._target = np.zeros(nbytes, dtype=np.uint8)
        self._target.fill(0)  # zeros() maps pages without touching them

    def __call__(self) -> float:
        """Copy once; return the seconds that it took."""
        return seconds(lambda: np.copyto(self._target, self._source))
