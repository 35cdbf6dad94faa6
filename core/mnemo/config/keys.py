"""Which keys exist, and what somebody meant who wrote one that does not."""

from __future__ import annotations

from difflib import get_close_matches

from mnemo.config.schema import SECTIONS, settings
from mnemo.errors import ConfigError


def check_section(section: str, place: str) -> None:
    """Refuse an unknown section.

    Args:
        section: The name as it was written.
        place: Where, within a sentence: ``in mnemo.yaml, line 2``.

    Raises:
        ConfigError: There is no such section; the message says which was probably meant.
    """
    if section in SECTIONS:
        return
    inside = [key for key in settings() if section in (key, _name(key))]
    near = get_close_matches(section, SECTIONS, 1)
    if inside:
        parent, name = inside[0].split(".")
        hint = f"Write it inside its section: {parent}: {{{name}: ...}}."
    elif near:
        hint = f"Did you mean {near[0]}?"
    else:
        hint = f"The sections are {', '.join(SECTIONS)}."
    raise ConfigError(f"{section} is not a section ({place}). {hint}")


def check_key(key: str, place: str) -> None:
    """Refuse an unknown setting.

    Args:
        key: The dotted key as it was written.
        place: Where, within a sentence.

    Raises:
        ConfigError: There is no such setting; the message says which was probably meant.
    """
    if key in settings():
        return
    section, _, name = key.partition(".")
    siblings = [known for known in settings() if known.startswith(f"{section}.")]
    if section in SECTIONS and not siblings:
        raise ConfigError(f"{key} is not available in this version ({place}). Leave it out.")
    near = _nearest(section, name)
    if near:
        hint = f"Did you mean {near}?"
    elif siblings:
        hint = f"The settings of {section} are {', '.join(map(_name, siblings))}."
    else:
        hint = "`mnemo config show` lists the settings."
    raise ConfigError(f"{key} is not a setting ({place}). {hint}")


def _nearest(section: str, name: str) -> str | None:
    """The setting most likely meant: in the named section, else of the same name elsewhere."""
    sections = get_close_matches(section, SECTIONS, 1)
    inside = [key for key in settings() if key.partition(".")[0] in sections]
    for candidates in (inside, list(settings())):
        names = [_name(key) for key in candidates]
        found = get_close_matches(name or section, names, 1)
        if found:
            return candidates[names.index(found[0])]
    return None


def _name(key: str) -> str:
    return key.partition(".")[2]
