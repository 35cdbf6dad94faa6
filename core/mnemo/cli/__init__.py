"""The ``mnemo`` command. Each module of this package is one of its sub-commands."""

from __future__ import annotations

import sys

import typer

from mnemo.cli import clean, config, confirm, export, rollback, run, status
from mnemo.errors import ConfigError, MnemoError

app = typer.Typer(
    name="mnemo",
    help="Fault tolerance for PyTorch training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("run", cls=run.RunCommand, context_settings=run.CONTEXT)(run.run)
app.command()(status.status)
app.command()(export.export)
app.command()(rollback.rollback)
app.command()(clean.clean)
app.command()(confirm.confirm_lost)
app.add_typer(config.app, name="config")


def main() -> None:
    """Run the command line; an error of mnemo's is one line on standard error."""
    try:
        app()
    except MnemoError as error:
        typer.echo(f"mnemo: {error}", err=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
