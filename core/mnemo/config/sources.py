"""Where settings are given: a YAML file, the environment, the command line, arguments.

Each reader returns a flat mapping from dotted keys to `Given`. Keys are checked here, while it is
known who wrote them; values stay text and are checked once all sources are laid over each other.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from numbers import Number
from typing import TYPE_CHECKING, Final

from mnemo.config.keys import check_key, check_section
from mnemo.config.schema import EXCLUSIVE, settings
from mnemo.config.yaml_file import read_sections
from mnemo.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

_VARIABLE: Final = re.compile(r"MNEMO_([A-Za-z0-9]+(?:_[A-Za-z0-9]+)*)__(\w+)")
_NULL: Final = "null"


@dataclass(frozen=True, slots=True)
class Given:
    """One setting as somebody wrote it.

    Attributes:
        text: What was written; None puts the setting back to its default.
        origin: Where, in short: ``mnemo.yaml:2``.
        place: Where, within a sentence: ``in mnemo.yaml, line 2``.
    """

    text: str | None
    origin: str
    place: str


def read_file(path: str) -> dict[str, Given]:
    """Read a YAML file of sections.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or has an unknown or repeated key.
    """
    given: dict[str, Given] = {}
    for section, entries in read_sections(path):
        for name, value, line in entries:
            key = f"{section.key}.{name}"
            place = f"in {path}, line {line}"
            check_key(key, place)
            given[key] = Given(value_text(key, value, place), f"{path}:{line}", place)
    return given


def read_environ(environ: Mapping[str, str]) -> dict[str, Given]:
    """Read the variables of the form ``MNEMO_SECTION__KEY``; others are not settings.

    Raises:
        ConfigError: A variable of that form names no setting.
    """
    given: dict[str, Given] = {}
    for variable in sorted(environ):
        match = _VARIABLE.fullmatch(variable)
        if match:
            key = f"{match[1]}.{match[2]}".lower()
            place = f"in the variable {variable}"
            check_key(key, place)
            given[key] = Given(_unless_null(environ[variable]), variable, place)
    return given


def read_overrides(overrides: Iterable[str]) -> dict[str, Given]:
    """Read ``section.key=value`` words of a command line; of the same key the last one counts.

    Raises:
        ConfigError: A word has another form or names no setting.
    """
    given: dict[str, Given] = {}
    place = "on the command line"
    for word in overrides:
        key, equals, text = word.partition("=")
        if not (key and equals):
            raise ConfigError(
                f"{word!r} is not an override ({place}). Write section.key=value, such as "
                "snapshot.every=10."
            )
        check_key(key, place)
        given[key] = Given(_unless_null(text), "command line", place)
    return given


def read_arguments(sections: Mapping[str, Mapping[str, object] | None]) -> dict[str, Given]:
    """Read sections that a program passes as mappings; None is an absent section.

    Raises:
        ConfigError: A section or key is unknown, or a value is no text, number or switch.
    """
    given: dict[str, Given] = {}
    place = "in the arguments"
    for section, values in sections.items():
        check_section(section, place)
        if values is None:
            continue
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"{section} is {values!r} ({place}), but a section is a mapping: {section}={{...}}."
            )
        for name, value in values.items():
            key = f"{section}.{name}"
            check_key(key, place)
            given[key] = Given(value_text(key, value, place), "argument", place)
    return given


def overrides_to_environ(overrides: Iterable[str]) -> dict[str, str]:
    """Give the variables that carry command-line overrides over to another process.

    Raises:
        ConfigError: A word is no override or names no setting.
    """
    given = read_overrides(overrides)
    for key, other in (EXCLUSIVE, EXCLUSIVE[::-1]):
        if key in given and given[key].text is not None:
            # A variable that the other process inherits must not contradict the override.
            given.setdefault(other, Given(None, "command line", "on the command line"))
    return {
        f"MNEMO_{key.replace('.', '__').upper()}": _NULL if value.text is None else value.text
        for key, value in given.items()
    }


def value_text(key: str, value: object, place: str) -> str | None:
    """Write a Python value as a person would, so that it is checked as text is.

    Raises:
        ConfigError: The value is a list, a mapping or something else that is not one value.
    """
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, timedelta):
        return f"{value.total_seconds()!r}s"
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is None:
        return None
    if not isinstance(value, (str, Number)):
        raise _refusal(key, f"a {type(value).__name__}", place)
    # A bool would pass as the text "True" where a name is expected.
    if isinstance(value, bool) and not isinstance(settings()[key].default, bool):
        raise _refusal(key, repr(value), place)
    return str(value)


def _refusal(key: str, what: str, place: str) -> ConfigError:
    return ConfigError(f"{key} is {what} ({place}). Give {settings()[key].kind.accepts}.")


def _unless_null(text: str) -> str | None:
    return None if text.strip() == _NULL else text
