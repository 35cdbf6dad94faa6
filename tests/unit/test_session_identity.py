"""Which run a process belongs to."""

from __future__ import annotations

import pytest

from mnemo.config import load_config
from mnemo.errors import ConfigError
from mnemo.session.identity import resolve_identity


@pytest.mark.parametrize("name", ["MNEMO_RUN_ID", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"])
def test_an_id_is_taken_as_it_is_or_refused(name: str) -> None:
    """Two that differ never become one."""
    assert resolve_identity(load_config(), {name: "gpt-7b_1.0"}).run_id == "gpt-7b_1.0"
    with pytest.raises(ConfigError, match=r"run\.id 'ab c/1' cannot name a directory"):
        resolve_identity(load_config(), {name: "ab c/1"})
