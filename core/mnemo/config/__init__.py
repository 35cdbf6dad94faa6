"""The configuration: one schema, read alike from file, environment, command line and arguments.

`load_config` gives a `ResolvedConfig`: every setting, typed and checked, with its origin.
"""

from __future__ import annotations

from mnemo.config.load import CONFIG_VARIABLE, ResolvedConfig, load_config
from mnemo.config.schema import (
    InProcess,
    MnemoConfig,
    Overrun,
    PersistConfig,
    RecoverConfig,
    Resume,
    RunConfig,
    SnapshotConfig,
    Then,
    settings,
)
from mnemo.config.sources import overrides_to_environ
from mnemo.config.units import (
    format_duration,
    format_fraction,
    format_size,
    parse_duration,
    parse_fraction,
    parse_size,
)

__all__ = [
    "CONFIG_VARIABLE",
    "InProcess",
    "MnemoConfig",
    "Overrun",
    "PersistConfig",
    "RecoverConfig",
    "ResolvedConfig",
    "Resume",
    "RunConfig",
    "SnapshotConfig",
    "Then",
    "format_duration",
    "format_fraction",
    "format_size",
    "load_config",
    "overrides_to_environ",
    "parse_duration",
    "parse_fraction",
    "parse_size",
    "settings",
]
