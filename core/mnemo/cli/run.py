"""``mnemo run``: torchrun's flags, and training that survives the death of a rank."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from typer.core import TyperCommand

from mnemo.config import (
    CONFIG_VARIABLE,
    InProcess,
    Then,
    load_config,
    overrides_to_environ,
    parse_duration,
)
from mnemo.errors import ConfigError, CrashLoopError, LaunchError
from mnemo.launcher import Agent, LaunchOptions
from mnemo.launcher.joining import join
from mnemo.launcher.options import (
    choose_run_id,
    count_ranks,
    hidden_streams,
    rank_command,
)
from mnemo.launcher.output import Terminal
from mnemo.launcher.rendezvous import Nodes, meeting_point
from mnemo.launcher.watch import smp_hooks
from mnemo.recovery.journal import AGENTS_JOURNAL, Journal, journal_path
from mnemo.smp.paths import AGENTS_DIRECTORY, RunPaths

CONTEXT: Final = {"allow_interspersed_args": False}
_OVERRIDE: Final = re.compile(r"[a-z_]+\.[A-Za-z_.]+=.*", re.DOTALL)
_IGNORED: Final = "Accepted for torchrun's sake; means nothing on one node."


class RunCommand(TyperCommand):
    """Lets settings (``snapshot.overhead=1%``) stand anywhere before the script.

    Everything from the script on is the script's.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Move the settings behind the flags, where they are positional arguments."""
        takes_value = {
            name for p in self.params for name in p.opts if not getattr(p, "is_flag", True)
        }
        flags: list[str] = []
        overrides: list[str] = []
        rest = list(args)
        while rest:
            word = rest[0]
            if _OVERRIDE.fullmatch(word):
                overrides.append(rest.pop(0))
            elif word.startswith("-") and word not in {"-", "--"}:
                flags.append(rest.pop(0))
                if word in takes_value and rest:
                    flags.append(rest.pop(0))
            else:
                break
        return super().parse_args(ctx, [*flags, *overrides, *rest])


def _flag(*names: str, help: str = _IGNORED, hidden: bool = False) -> Any:  # noqa: A002
    """An option with torchrun's two spellings, and torchrun's variable (``PET_…``)."""
    long = next(name for name in names if name.startswith("--"))
    variable = "PET_" + long.removeprefix("--").replace("-", "_").upper()
    spellings = dict.fromkeys([*names, "--" + long.removeprefix("--").replace("-", "_")])
    return typer.Option(
        *spellings, envvar=variable, show_envvar=False, help=help, hidden=hidden or help == _IGNORED
    )


def run(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[SECTION.KEY=VALUE]... SCRIPT [ARG]...",
            help="Settings, the script (or module, or program), and its own arguments.",
            show_default=False,
        ),
    ],
    *,
    config: Annotated[
        Path | None, typer.Option(help="YAML file; the default is the one MNEMO_CONFIG names.")
    ] = None,
    nproc_per_node: Annotated[
        str, _flag("--nproc-per-node", help="Ranks: a number, cpu, gpu or auto.")
    ] = "1",
    max_restarts: Annotated[
        int, _flag("--max-restarts", help="How often all ranks are restarted within the window.")
    ] = 3,
    restart_window: Annotated[
        str, _flag("--restart-window", help="The window, such as 1h or 90s.")
    ] = "1h",
    module: Annotated[
        bool, _flag("-m", "--module", help="SCRIPT is a module, as for python -m.")
    ] = False,
    no_python: Annotated[
        bool, _flag("--no-python", help="SCRIPT is a program, not a Python file.")
    ] = False,
    log_dir: Annotated[
        Path | None,
        _flag("--log-dir", help="Directory of the ranks' log files; the default is run.journal."),
    ] = None,
    redirects: Annotated[
        str,
        _flag("-r", "--redirects", help="Off the terminal: 1 stdout, 2 stderr, 3 both; 0:3,1:1."),
    ] = "0",
    local_ranks_filter: Annotated[
        str, _flag("--local-ranks-filter", help="Only these ranks on the terminal, such as 0,1.")
    ] = "",
    master_addr: Annotated[
        str, _flag("--master-addr", help="Where rank 0 hosts the store.")
    ] = "127.0.0.1",
    master_port: Annotated[
        int | None, _flag("--master-port", help="Its port; the default is a free one.")
    ] = None,
    nnodes: Annotated[
        str,
        _flag("--nnodes", help="Nodes; 4:5 is four, and a spare in case one is lost."),
    ] = "1",
    node_rank: Annotated[int, _flag("--node-rank")] = 0,
    rdzv_id: Annotated[
        str, _flag("--rdzv-id", help="Identity of the run, where run.id is not set.")
    ] = "none",
    role: Annotated[str, _flag("--role", help="ROLE_NAME of the ranks.")] = "default",
    rdzv_backend: Annotated[
        str, _flag("--rdzv-backend", help="c10d, etcd, or static for --master-addr.")
    ] = "static",
    rdzv_endpoint: Annotated[
        str,
        _flag("--rdzv-endpoint", help="Where nodes meet: HOST[:PORT], or HOST,HOST."),
    ] = "",
    rdzv_conf: Annotated[str, _flag("--rdzv-conf")] = "",
    standalone: Annotated[bool, _flag("--standalone")] = False,
    tee: Annotated[str, _flag("-t", "--tee")] = "0",
) -> None:
    """Train; a rank that dies costs no step: it is replaced, or all restart from memory.

    Takes torchrun's flags and sets torchrun's environment.
    """
    del rdzv_conf, standalone, node_rank  # see _IGNORED
    del tee  # the files are always written, and the terminal is only left out by --redirects
    overrides, script, args = _split(words)
    _require_working_directory()
    nodes = Nodes.parse(nnodes)
    settings = load_config(config, overrides=overrides)
    run_id = choose_run_id(
        settings.run.id,
        environ=os.environ,
        rdzv_id=rdzv_id,
        name=settings.run.name,
        script=script,
    )
    journal = Journal(journal_path(Path(settings.run.journal).absolute(), run_id))
    ranks = count_ranks(nproc_per_node, os.environ)
    environ = overrides_to_environ(overrides)
    environ["MNEMO_RUN__JOURNAL"] = str(journal.path.parent)
    # What only the program sets differs there; so it knows where this process looks.
    paths = RunPaths.of(run_id, settings.run.dir)
    environ |= {AGENTS_JOURNAL: str(journal.path), AGENTS_DIRECTORY: str(paths.directory)}
    file = config or os.environ.get(CONFIG_VARIABLE)
    if file:
        environ[CONFIG_VARIABLE] = str(Path(file).absolute())
    options = LaunchOptions(
        command=rank_command(script, args, module=module, no_python=no_python, environ=os.environ),
        run_id=run_id,
        ranks=ranks,
        log_dir=(log_dir or Path(settings.run.journal)) / run_id,
        master_addr=master_addr,
        master_port=master_port,
        torch_run_id="" if rdzv_id == "none" else rdzv_id,
        role=role,
        max_restarts=max_restarts,
        restart_window_s=_window(restart_window),
        grace_s=settings.recover.grace,
        environ=environ,
        hidden=hidden_streams(redirects, local_ranks_filter, ranks),
        in_process=settings.recover.in_process is InProcess.auto and nodes == Nodes(1),
        standbys=0 if no_python else settings.recover.standbys,
        hang_limit_s=settings.recover.hang or None,
    )
    terminal = Terminal(colour="NO_COLOR" not in os.environ)
    team = None
    if nodes != Nodes(1):
        team = join(
            nodes,
            rdzv_backend,
            meeting_point(rdzv_backend, rdzv_endpoint, master_addr, master_port),
            run_id=run_id,
            ranks=ranks,
            interface=settings.network.interface,
            paths=paths,
            wait_s=settings.recover.no_spare,
            saves=settings.recover.then is Then["save-and-exit"],
            say=terminal.say,
        )
        if settings.recover.in_process is InProcess.auto:
            terminal.say("several nodes: a rank that dies is not replaced, all restart")
    agent = Agent(
        options,
        journal=journal,
        terminal=terminal,
        hooks=smp_hooks(paths, alone=team is None),
        team=team,
    )
    try:
        code = agent.run()
    except CrashLoopError as error:
        terminal.say(str(error))
        code = agent.exit_code or 1
    sys.exit(code)


def _split(words: list[str]) -> tuple[list[str], str, list[str]]:
    """Settings, script, and the script's arguments."""
    first = next((i for i, word in enumerate(words) if not _OVERRIDE.fullmatch(word)), None)
    if first is None:
        msg = "no script after the settings: mnemo run [SECTION.KEY=VALUE]... SCRIPT [ARG]..."
        raise typer.BadParameter(msg)
    return words[:first], words[first], words[first + 1 :]


def _require_working_directory() -> None:
    try:
        Path.cwd()
    except FileNotFoundError as error:
        msg = "the working directory has been removed: change to one that exists"
        raise LaunchError(msg) from error


def _window(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        msg = f"--restart-window={text} is no duration; use one such as 1h or 90s"
        raise ConfigError(msg) from error
