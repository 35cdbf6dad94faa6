"""The effective configuration: sources laid over each other, values checked."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, get_type_hints

from mnemo.config.kinds import without_password
from mnemo.config.schema import (
    EXCLUSIVE,
    MnemoConfig,
    NetworkConfig,
    PersistConfig,
    ProtectConfig,
    RecoverConfig,
    RunConfig,
    SnapshotConfig,
    settings,
)
from mnemo.config.sources import (
    Given,
    read_arguments,
    read_environ,
    read_file,
    read_overrides,
    value_text,
)
from mnemo.config.uncaught import leave_to_agent, say_once
from mnemo.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

CONFIG_VARIABLE: Final = "MNEMO_CONFIG"
"""Names the configuration file where none is given."""


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """The effective configuration and where each value came from.

    Attributes:
        config: Every setting.
        origins: By dotted key: ``default``, ``mnemo.yaml:2``, a variable's name,
            ``command line`` or ``argument``.
    """

    config: MnemoConfig
    origins: Mapping[str, str]

    @property
    def run(self) -> RunConfig:
        """Section ``run``."""
        return self.config.run

    @property
    def snapshot(self) -> SnapshotConfig:
        """Section ``snapshot``."""
        return self.config.snapshot

    @property
    def persist(self) -> PersistConfig:
        """Section ``persist``."""
        return self.config.persist

    @property
    def protect(self) -> ProtectConfig:
        """Section ``protect``."""
        return self.config.protect

    @property
    def network(self) -> NetworkConfig:
        """Section ``network``."""
        return self.config.network

    @property
    def recover(self) -> RecoverConfig:
        """Section ``recover``."""
        return self.config.recover


def load_config(
    file: str | Path | None = None,
    *,
    overrides: Iterable[str] = (),
    environ: Mapping[str, str] | None = None,
    **sections: Mapping[str, object] | None,
) -> ResolvedConfig:
    """Read the configuration from all its sources.

    An argument or override wins over the environment, that over the file, and that over the
    default. ``null`` puts a setting back to its default.

    In a rank of ``mnemo run``, a `ConfigError` that nobody catches is said by that in one line. One
    of several ranks that are started otherwise says it so itself: others may have no reason to.

    Args:
        file: YAML file; None takes the one that MNEMO_CONFIG names, if any.
        overrides: Words of a command line, ``section.key=value``. They win over `sections`.
        environ: Environment with ``MNEMO_SECTION__KEY`` variables; None takes the process's.
        **sections: Sections as mappings, such as ``snapshot={"every": 10}``.

    Returns:
        The effective configuration.

    Raises:
        ConfigError: The file cannot be read, a key is unknown, a value is not accepted, or two
            settings exclude each other. The message names key, value and place.
    """
    leave_to_agent()
    environ = os.environ if environ is None else environ
    try:
        return _load(file, overrides, environ, sections)
    except ConfigError as error:
        if environ.get("WORLD_SIZE", "1") != "1":
            say_once(error, here=True)
        raise


def _load(
    file: str | Path | None,
    overrides: Iterable[str],
    environ: Mapping[str, str],
    sections: Mapping[str, Mapping[str, object] | None],
) -> ResolvedConfig:
    """See `load_config`."""
    file = file or environ.get(CONFIG_VARIABLE)
    given: dict[str, Given] = {}
    for layer in (
        read_file(os.fspath(file)) if file else {},
        read_environ(environ),
        read_arguments(sections) | read_overrides(overrides),
    ):
        _lay_over(given, layer)
    values = _parse(given, _interpolate(given))
    origins = {key: given[key].origin if key in values else "default" for key in settings()}
    return ResolvedConfig(_build(values), origins)


def _lay_over(given: dict[str, Given], layer: Mapping[str, Given]) -> None:
    """Add a source to those of lower precedence, in place."""
    both = [layer[key] for key in EXCLUSIVE if key in layer and layer[key].text is not None]
    if len(both) == 2:
        raise ConfigError(
            f"{EXCLUSIVE[0]} is {both[0].text!r} ({both[0].place}) and {EXCLUSIVE[1]} is "
            f"{both[1].text!r} ({both[1].place}), but each chooses how often a snapshot is "
            "taken. Give one of them."
        )
    if both:
        for key in EXCLUSIVE:
            given.pop(key, None)
    for key, value in layer.items():
        given.pop(key, None)
        if value.text is not None:
            given[key] = value


def _interpolate(given: Mapping[str, Given]) -> dict[str, str]:
    """Give the text of each setting that was given, with ``${...}`` replaced."""
    from omegaconf import OmegaConf

    config = OmegaConf.create()
    for key, setting in settings().items():
        default = None if setting.default is None else setting.kind.format(setting.default)
        OmegaConf.update(config, key, default)
    for key, value in given.items():
        with _blaming(key, value):
            OmegaConf.update(config, key, value.text)
    texts: dict[str, str] = {}
    for key, value in given.items():
        with _blaming(key, value):
            found = OmegaConf.select(config, key, throw_on_missing=True)
        text = value_text(key, found, value.place)
        if text is not None:
            texts[key] = text
    return texts


@contextmanager
def _blaming(key: str, value: Given) -> Iterator[None]:
    """Turn an error of OmegaConf into one that names the setting."""
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except OmegaConfBaseException as error:
        # The first line says it; below, OmegaConf adds its own view of the key.
        problem = str(error).partition("\n")[0]
        text = without_password(str(value.text))
        raise ConfigError(f"{key} is {text!r} ({value.place}): {problem}.") from error


def _parse(given: Mapping[str, Given], texts: Mapping[str, str]) -> dict[str, Any]:
    """Give the value of each text."""
    values: dict[str, Any] = {}
    for key, text in texts.items():
        kind = settings()[key].kind
        try:
            values[key] = kind.parse(text)
        except (ValueError, OverflowError):
            # Without the cause: it would repeat the text, which may hold a password.
            raise ConfigError(
                f"{key} is {without_password(text)!r} ({given[key].place}). Give {kind.accepts}."
            ) from None
    return values


def _build(values: Mapping[str, Any]) -> MnemoConfig:
    """Fill the schema."""
    sections = {
        name: section_type(
            **{
                key.partition(".")[2]: value
                for key, value in values.items()
                if key.startswith(f"{name}.")
            }
        )
        for name, section_type in get_type_hints(MnemoConfig).items()
    }
    return MnemoConfig(**sections)
