"""Trainers that cannot be protected are told so, and told what can."""

from __future__ import annotations

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

from lightning_mnemo import MnemoCallback
from lightning_mnemo.callback import Sections
from lightning_mnemo.checks import require_supported, what_is_off
from mnemo.config import MnemoConfig
from mnemo.errors import ConfigError


class Pretends(pl.Trainer):
    """A Trainer with any strategy, also such as this machine could not run."""

    def __init__(self, strategy: object) -> None:
        self.callbacks: list[pl.Callback] = [MnemoCallback()]
        self._accelerator_connector = SimpleNamespace(strategy=strategy)


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_sharding_strategies(kind: type) -> None:
    """DeepSpeed's is a kind of DDP to Lightning, but shards."""
    trainer = Pretends(kind.__new__(kind))
    with pytest.raises(ConfigError, match=rf"does not support {kind.__name__}: .*strategy='ddp'"):
        require_supported(trainer, MnemoCallback)


def test_the_other_package_of_the_same_code() -> None:
    other = pytest.importorskip("pytorch_lightning")
    trainer = other.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    words = "this Trainer is pytorch_lightning.*write 'import lightning.pytorch as pl'"
    with pytest.raises(ConfigError, match=words):
        MnemoCallback().setup(trainer, None, "fit")  # type: ignore[arg-type]


def test_what_is_off_depends_on_who_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Pretends(SimpleNamespace(launcher=None, world_size=2))
    monkeypatch.delenv("MNEMO_AGENT", raising=False)
    why = "needs mnemo run"
    [line] = what_is_off(trainer, why)
    off = "replacing a single rank is off: needs mnemo run; "
    assert line == f"{off}a crash ends all ranks, and the next start resumes from memory"
    monkeypatch.setenv("MNEMO_AGENT", "1")
    [line] = what_is_off(trainer, why)
    assert line == f"{off}a crash restarts all ranks from memory"
    assert what_is_off(trainer, "") == []


def test_wrong_settings_are_told_before_training() -> None:
    with pytest.raises(ConfigError, match=r"snapshot\.overhed"):
        MnemoCallback(snapshot={"overhed": "1%"})


def test_every_section_is_an_argument() -> None:
    assert list(Sections.__annotations__) == list(MnemoConfig.__annotations__)
