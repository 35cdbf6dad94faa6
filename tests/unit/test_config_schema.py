"""The schema: its defaults, its use by OmegaConf, and that the documentation lists it."""

from __future__ import annotations

import dataclasses
import pickle
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mnemo.config import (
    InProcess,
    MnemoConfig,
    Overrun,
    Resume,
    RunConfig,
    SnapshotConfig,
    Then,
    load_config,
    settings,
)

ROOT = Path(__file__).parents[2]


def test_defaults() -> None:
    config = load_config(environ={}).config
    assert config == MnemoConfig()
    assert {key: attrgetter(key)(config) for key in settings()} == {
        "run.name": "",
        "run.id": "",
        "run.resume": Resume.auto,
        "run.dir": "",
        "run.journal": ".mnemo",
        "run.seed_samples": False,
        "snapshot.overhead": 0.01,
        "snapshot.every": None,
        "snapshot.overrun": Overrun.wait,
        "snapshot.verify": False,
        "snapshot.shard_replicas": True,
        "snapshot.keep_alive": 3600.0,
        "protect.nodes": "",
        "protect.domain": "",
        "protect.rate": None,
        "persist.to": "",
        "persist.every": 600.0,
        "persist.keep": 3,
        "recover.exact_only": True,
        "recover.grace": 30.0,
        "recover.in_process": InProcess.auto,
        "recover.standbys": 1,
        "recover.hang": 0.0,
        "recover.no_spare": 300.0,
        "recover.then": Then["save-and-exit"],
        "network.interface": "",
        "network.ports": "",
    }


def test_every_default_is_accepted_as_it_is_written() -> None:
    for key, setting in settings().items():
        if setting.default is not None:
            assert setting.kind.parse(setting.kind.format(setting.default)) == setting.default, key


def test_schema_is_an_omegaconf_structured_config() -> None:
    config = OmegaConf.structured(MnemoConfig(run=RunConfig(resume=Resume.never)))
    assert OmegaConf.get_type(config, "snapshot") is SnapshotConfig
    assert OmegaConf.to_object(config) == MnemoConfig(run=RunConfig(resume=Resume.never))


def test_configuration_cannot_be_changed() -> None:
    resolved = load_config(environ={})
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolved.config.snapshot.every = 3  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolved.config = MnemoConfig()  # type: ignore[misc]


def test_configuration_survives_a_spawned_process() -> None:
    resolved = load_config(environ={}, snapshot={"every": 3})
    assert pickle.loads(pickle.dumps(resolved)) == resolved


def test_settings_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        SnapshotConfig(0.5)  # type: ignore[misc]


def test_every_setting_and_section_has_a_docstring() -> None:
    source = (ROOT / "core/mnemo/config/schema.py").read_text()
    for key in settings():
        name = key.partition(".")[2]
        pattern = rf'    {name}: Annotated\[.*\] = .*\n    """\w'
        assert re.search(pattern, source), key
    for section in dataclasses.fields(MnemoConfig):
        assert type(getattr(MnemoConfig(), section.name)).__doc__


def test_documentation_lists_exactly_the_settings() -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    rows = re.findall(r"^\| `(\w+\.\w+)` \| (.+?) \|", text, re.MULTILINE)
    assert [key for key, _ in rows] == list(settings())
    for key, shown in rows:
        setting = settings()[key]
        default = "null" if setting.default is None else setting.kind.format(setting.default)
        assert shown == (f"`{default}`" if default else "empty"), key


def test_import_loads_neither_torch_nor_omegaconf() -> None:
    code = (
        "import sys, mnemo.config;"
        "print({'torch', 'numpy', 'omegaconf', 'lightning', 'fsspec'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "set()\n"), result.stderr
