"""``python -m benchmarks NAME [--quick] [--json FILE]``, ``python -m benchmarks --list``.

The exit code says whether the measurement went through, not whether the bars hold: those are in
the table and in the file.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from difflib import get_close_matches
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.harness import Report


def discover() -> dict[str, str]:
    """Map each benchmark to the first line of its docstring, without importing any."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if "run" in functions:
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark, show its report and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure mnemo.")
    parser.add_argument("name", nargs="?", help="the benchmark")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, within a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--list", action="store_true", help="show the benchmarks and leave")
    args = parser.parse_args(arguments)
    console, known = Console(), discover()

    if args.list:
        table = Table("name", "what it measures")
        for name, purpose in known.items():
            table.add_row(name, purpose)
        console.print(table)
        return 0
    if args.name not in known:
        close = get_close_matches(args.name or "", known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(known) or 'none'}"
        parser.error(f"{args.name!r} is not a benchmark; {hint}" if args.name else hint)
    if args.json and not args.json.resolve().parent.is_dir():
        parser.error(f"--json {args.json}: there is no directory {args.json.resolve().parent}")

    report = Report(args.name)
    importlib.import_module(f"benchmarks.{args.name}").run(args.quick, report)
    report.show(console)
    if args.json:
        report.write(args.json)
        console.print(f"written to {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
