"""``~`` in settings that name a place."""

from __future__ import annotations

import pytest

from mnemo.config import load_config
from mnemo.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("~/ckpt", "/home/me/ckpt"),
        (" ~ ", "/home/me"),
        ("s3://bucket/~/ckpt", "s3://bucket/~/ckpt"),
        ("ckpt~", "ckpt~"),
        ("./~", "./~"),
    ],
)
def test_checkpoints_in_the_home_directory(
    monkeypatch: pytest.MonkeyPatch, given: str, meant: str
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert load_config(environ={}, persist={"to": given}).persist.to == meant


@pytest.mark.parametrize("key", ["persist.to", "run.dir"])
def test_an_unknown_users_home(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is '~nobody-of-that-name/x'"):
        load_config(environ={}, overrides=[f"{key}=~nobody-of-that-name/x"])
