"""A YAML file of sections, read with the line of each entry.

Scalars stay the text that was written: what ``042`` or ``no`` mean is for the setting to say.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import yaml  # type: ignore[import-untyped]

from mnemo.config.keys import check_section
from mnemo.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator


class Entry(NamedTuple):
    """A key with its value.

    Attributes:
        key: The key as written.
        value: Text, None for null, or an empty list or mapping in place of a real one.
        line: Line of the key, from 1.
    """

    key: str
    value: str | list[object] | dict[str, object] | None
    line: int


def read_sections(path: str) -> Iterator[tuple[Entry, list[Entry]]]:
    """Read the sections of a file with their entries, in order.

    Raises:
        ConfigError: The file cannot be read, is no YAML, or has no mapping of known sections
            with unrepeated keys.
    """
    root = _compose(path)
    for section, node in _entries(root, path, "the file"):
        # Before what is in it: a setting outside its section deserves the better advice.
        check_section(section.key, f"in {path}, line {section.line}")
        entries = () if section.value is None else _entries(node, path, section.key)
        yield section, [entry for entry, _ in entries]


def _compose(path: str) -> yaml.Node:
    """Parse a file into nodes, which keep their lines; nothing in it is ever constructed."""
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(
            f"the configuration file {path} cannot be read: {error.strerror}. Check the path."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the configuration file {path} is not UTF-8 (byte {error.start}). "
            "Save it as UTF-8 text."
        ) from error
    except yaml.MarkedYAMLError as error:
        advice = "Indent with spaces, not tabs." if r"'\t'" in str(error) else "Correct the YAML."
        line = cast("yaml.Mark", error.problem_mark).line + 1
        raise ConfigError(f"{error.problem} (in {path}, line {line}). {advice}") from error
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"{problem} (in {path}). Correct the YAML.") from error
    if root is None:
        raise ConfigError(
            f"the configuration file {path} is empty. Write at least one section, such as "
            "run: {name: my-run}, or give no file."
        )
    return root


def _entries(node: yaml.Node, path: str, what: str) -> Iterator[tuple[Entry, yaml.Node]]:
    """Yield the entries of a mapping, each with the node of its value."""
    if not isinstance(node, yaml.MappingNode):
        found = "a list" if isinstance(node, yaml.SequenceNode) else repr(node.value)
        raise ConfigError(
            f"{what} is {found} (in {path}, line {node.start_mark.line + 1}), where a mapping is "
            "needed. Write key: value."
        )
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(
                f"a key of {what} is a list or mapping (in {path}, line {line}). Write a word."
            )
        key = key_node.value
        if key in lines:
            raise ConfigError(
                f"{key} is given twice in {what} (in {path}, lines {lines[key]} and {line}). "
                "Keep one."
            )
        lines[key] = line
        yield Entry(key, _value(value_node), line), value_node


def _value(node: yaml.Node) -> str | list[object] | dict[str, object] | None:
    if isinstance(node, yaml.SequenceNode):
        return []
    if isinstance(node, yaml.MappingNode):
        return {}
    return None if node.tag == "tag:yaml.org,2002:null" else str(node.value)
