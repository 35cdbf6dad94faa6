"""Train the same GPT twice, undisturbed and with a process killed, and compare the outcome.

The kill is a SIGKILL of a random rank at a random step, while its state is being copied. Nothing
catches a SIGKILL: the rank's memory is gone, and both ranks start again from what the snapshot
process holds. The parameters at the end have to be equal bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mnemo.faults import Declaration, Fault, Fired, Hook
from mnemo.recovery.journal import journal_path, read

HERE = Path(__file__).parent
RANKS = 2


@dataclass(frozen=True)
class Outcome:
    """What one training left behind.

    Attributes:
        losses: Of every step, in order.
        sha256: Hash of all parameters.
        repeated: Steps that were computed more than once.
        journal: Records of starts, failures and recoveries.
        step_times: Of every computed step, in seconds since the Unix epoch.
    """

    losses: list[float]
    sha256: str
    repeated: int
    journal: list[dict[str, object]]
    step_times: list[float]


class Demo:
    """Runs the trainings and tells what happens."""

    def __init__(self, console: Console, work: Path, steps: int) -> None:
        self.console, self.work, self.steps = console, work, steps

    def launch(self, name: str, environ: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
        """Start one training under ``mnemo run``; its output goes to ``log``."""
        command = [
            str(Path(sys.executable).with_name("mnemo")),
            "run",
            f"--config={HERE / 'mnemo.yaml'}",
            f"--nproc-per-node={RANKS}",
            str(HERE / "train.py"),
            f"--ranks={RANKS}",
            f"--steps={self.steps}",
            f"--out={self.work / name}",
        ]
        own = {
            "MNEMO_RUN__ID": f"demo-{name}",
            "MNEMO_RUN__DIR": str(self.work / "run"),
            "MNEMO_RUN__JOURNAL": str(self.work / "journal"),
            "OMP_NUM_THREADS": "1",
        }
        with log.open("wb") as output:
            return subprocess.Popen(
                command,
                env={**os.environ, **own, **environ},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def train(self, name: str, title: str, declared: Declaration | None = None) -> Outcome:
        """Run one training to its end while showing its steps.

        Raises:
            SystemExit: The training failed; the end of its output has been shown.
        """
        lines, log = self.work / name / "steps.jsonl", self.work / f"{name}.log"
        environ = declared.environ() if declared else {}
        process = self.launch(name, environ, log)
        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn())
        struck: Fired | None = None
        try:
            with Progress(*columns, TimeElapsedColumn(), console=self.console) as progress:
                task = progress.add_task(f"{title}: importing torch", total=self.steps)
                while process.poll() is None:
                    time.sleep(0.1)
                    if declared and not struck and (fired := declared.fired()):
                        struck = fired[0]
                        self.tell_crash(struck)
                    if steps := _read_lines(lines):
                        waiting = struck and float(str(steps[-1]["time"])) < struck.time
                        doing = "starting again" if waiting else "training"
                        newest = int(str(steps[-1]["step"]))
                        progress.update(task, completed=newest, description=f"{title}: {doing}")
                progress.update(task, completed=self.steps, description=f"{title}: done")
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(timeout=60)
        if process.returncode != 0:
            self.console.print(f"[red]{title}: mnemo run ended with {process.returncode}[/]")
            self.console.print("\n".join(log.read_text().splitlines()[-30:]), markup=False)
            raise SystemExit(1)
        result = json.loads((self.work / name / "result.json").read_text())
        times = [float(str(line["time"])) for line in _read_lines(lines)]
        return Outcome(
            losses=result["losses"],
            sha256=result["sha256"],
            repeated=len(times) - len(result["losses"]),
            journal=read(journal_path(self.work / "journal", f"demo-{name}")),
            step_times=times,
        )

    def tell_crash(self, fired: Fired) -> None:
        """Say that the rank has been killed."""
        self.console.print(
            f"  [bold red]SIGKILL[/] hit rank {fired.rank} (pid {fired.pid}) at step {fired.step},"
            " while its state was being copied; all ranks start again from memory"
        )


def _read_lines(path: Path) -> list[dict[str, object]]:
    """Return the whole lines of a file that is being written."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def summary(calm: Outcome, struck: Outcome, fired: Fired) -> Table:
    """Lay both outcomes side by side."""
    failure = next(record for record in struck.journal if record["event"] == "failure")
    recovery = next(record for record in struck.journal if record["event"] == "recovery")
    detected = float(str(failure["noticed"])) - fired.time
    again = min(moment for moment in struck.step_times if moment > fired.time) - fired.time
    same = sum(one == other for one, other in zip(calm.losses, struck.losses, strict=True))
    equal = "[green]equal ✓[/]" if calm.sha256 == struck.sha256 else "[bold red]different ✗[/]"

    table = Table(title="The same training, undisturbed and with a rank killed")
    table.add_column("")
    table.add_column("undisturbed", justify="right")
    table.add_column("killed", justify="right")
    table.add_row("crash", "", f"rank {fired.rank}, step {fired.step}")
    table.add_row("detected after", "", f"{detected * 1000:.0f} ms")
    table.add_row("state restored after", "", f"{float(str(recovery['seconds'])):.2f} s")
    table.add_row("next step after", "", f"{again:.1f} s")
    table.add_row("steps lost, computed again", "", str(struck.repeated))
    table.add_row("steps", str(len(calm.losses)), str(len(struck.losses)))
    table.add_row("final loss", f"{calm.losses[-1]:.6f}", f"{struck.losses[-1]:.6f}")
    table.add_row("steps with the same loss", "", f"{same} of {len(calm.losses)}")
    table.add_row("hash of all parameters", calm.sha256[:16], struck.sha256[:16])
    table.add_row("", "", equal)
    return table


def main() -> int:
    """Run the demo; 0 if both trainings ended in the same parameters."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of each training")
    parser.add_argument("--seed", type=int, help="chooses rank and step of the kill")
    args = parser.parse_args()

    console = Console()
    seed = random.randrange(10_000) if args.seed is None else args.seed
    choice = random.Random(seed)
    span = (args.steps // 6, args.steps * 5 // 6)
    kill = Fault("sigkill", choice.randrange(RANKS), Hook("mid_copy", choice.randint(*span)))
    console.print(
        f"A GPT of 10 million parameters, {RANKS} processes, {args.steps} steps on the source of "
        f"Python's standard library.\nFirst undisturbed, then with a process killed (seed {seed})."
    )
    with tempfile.TemporaryDirectory(prefix="mnemo-demo-") as work:
        demo = Demo(console, Path(work), args.steps)
        calm = demo.train("calm", "undisturbed")
        declared = Declaration((kill,), record=str(Path(work) / "fired"))
        struck = demo.train("struck", "with a kill", declared)
        declared.assert_fired()
        console.print(summary(calm, struck, declared.fired()[0]))
    return 0 if calm.sha256 == struck.sha256 else 1


if __name__ == "__main__":
    sys.exit(main())
