"""`mnemo config show`: what it prints can be read back, and says where values came from."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from mnemo.cli import main
from mnemo.cli.config import app
from mnemo.config import load_config, settings

FILE = 'run: {name: gpt, id: "042"}\npersist: {to: "s3://b/x: y # z", every: 1h30m}\n'


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    monkeypatch.chdir(tmp_path)
    for variable in [name for name in os.environ if name.startswith("MNEMO_")]:
        monkeypatch.delenv(variable)
    Path("mnemo.yaml").write_text(FILE)
    root = typer.Typer()
    root.add_typer(app, name="config")
    return root


def show(command: typer.Typer, *arguments: str, **environ: str) -> str:
    result = CliRunner().invoke(command, ["config", "show", *arguments], env=environ)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_output_is_a_configuration(command: typer.Typer) -> None:
    for words in ([], ["snapshot.every=10"], ["snapshot.overhead=2%"]):
        Path("shown.yaml").write_text(show(command, "--config", "mnemo.yaml", *words))
        original = load_config("mnemo.yaml", overrides=words, environ={})
        assert load_config("shown.yaml", environ={}).config == original.config


def test_origins_are_aligned_comments(command: typer.Typer) -> None:
    shown = show(
        command, "--config", "mnemo.yaml", "snapshot.every=10", MNEMO_RECOVER__GRACE="2min"
    )
    lines = [line for line in shown.splitlines() if not line.endswith(":")]
    assert len({line.rindex(" # ") for line in lines}) == 1
    origins = {
        line.partition(":")[0].strip(): line.rpartition(" # ")[2]
        for line in lines
        if "every" in line
    }
    assert origins == {"# overhead": "not used: snapshot.every is set", "every": "mnemo.yaml:2"}
    assert "  grace: 2min " in shown
    assert "# MNEMO_RECOVER__GRACE\n" in shown
    assert "# command line\n" in shown
    assert "\x1b" not in shown


def test_long_value_stays_on_its_line(command: typer.Typer) -> None:
    url = "s3://bucket/" + "x" * 300
    assert f"  to: {url}  # command line\n" in show(command, f"persist.to={url}")


def test_terminal_gets_colour(command: typer.Typer) -> None:
    assert "\x1b[" in show(command, FORCE_COLOR="1", TERM="xterm-256color")


def test_json(command: typer.Typer) -> None:
    tree = json.loads(show(command, "--json", "snapshot.every=5", MNEMO_CONFIG="mnemo.yaml"))
    assert [f"{section}.{name}" for section in tree for name in tree[section]] == list(settings())
    assert tree["persist"]["every"] == {
        "value": 5400.0,
        "text": "1h30min",
        "origin": "mnemo.yaml:2",
    }
    assert tree["snapshot"]["every"] == {"value": 5, "text": "5", "origin": "command line"}
    assert tree["run"]["resume"] == {"value": "auto", "text": "auto", "origin": "default"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "none.yaml"], "mnemo: the configuration file none.yaml cannot be read: "),
        (["snapshot.overhed=1%"], "mnemo: snapshot.overhed is not a setting (on the command line)"),
        (["persist.keep=0"], "mnemo: persist.keep is '0' (on the command line). Give "),
    ],
)
@pytest.mark.usefixtures("command")
def test_error_is_one_line(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["mnemo", "config", "show", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(message)
    assert printed.err.count("\n") == 1
