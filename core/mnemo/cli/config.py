"""``mnemo config``: what the effective configuration is, and why."""

from __future__ import annotations

import json
import math
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml  # type: ignore[import-untyped]
from rich.console import Console
from rich.text import Text

from mnemo.config import ResolvedConfig, load_config, settings

app = typer.Typer(help="Look at the configuration.", no_args_is_help=True)


@app.callback()
def _config() -> None:
    """Look at the configuration."""


@app.command()
def show(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that win over all others."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file; the default is the one MNEMO_CONFIG names.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print every setting with its value and where the value came from."""
    resolved = load_config(config, overrides=overrides or ())
    if as_json:
        typer.echo(json.dumps(_described(resolved), indent=2))
    else:
        _print_yaml(resolved, Console(highlight=False))


def _described(resolved: ResolvedConfig) -> dict[str, dict[str, dict[str, Any]]]:
    """Nest value, text and origin of each setting by section and name."""
    tree: dict[str, dict[str, dict[str, Any]]] = {}
    for key in settings():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = {
            "value": attrgetter(key)(resolved.config),
            "text": _text(resolved, key),
            "origin": resolved.origins[key],
        }
    return tree


def _print_yaml(resolved: ResolvedConfig, console: Console) -> None:
    """Print YAML that `load_config` reads back, with the origins as comments."""
    lines = {
        key: f"  {key.partition('.')[2]}: {_scalar(_text(resolved, key), key)}"
        for key in settings()
    }
    unused = {"snapshot.overhead"} if resolved.snapshot.every is not None else set()
    width = max(map(len, lines.values())) + 2
    printed_section = ""
    for key, line in lines.items():
        section = key.partition(".")[0]
        if section != printed_section:
            console.print(Text(f"{section}:", style="bold"), soft_wrap=True)
            printed_section = section
        origin = "not used: snapshot.every is set" if key in unused else resolved.origins[key]
        shown = f"  # {line.strip()}" if key in unused else line
        style = "dim" if origin == "default" or key in unused else "cyan"
        text = Text.assemble(shown.ljust(width), (f"# {origin}", style))
        console.print(text, soft_wrap=True)


def _text(resolved: ResolvedConfig, key: str) -> str | None:
    """The value as a person would write it; None where there is none."""
    value = attrgetter(key)(resolved.config)
    return None if value is None else settings()[key].kind.format(value)


def _scalar(text: str | None, key: str) -> str:
    if text is None:
        return "null"
    if not isinstance(settings()[key].default, str):
        return text
    # The dump of a lone plain scalar ends with a document marker.
    dumped: str = yaml.safe_dump(text, width=math.inf, allow_unicode=True)
    return dumped.removesuffix("\n").removesuffix("\n...")
