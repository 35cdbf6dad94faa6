"""The checkpoint in a snapshot is the one that Lightning would have written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_mnemo.checkpoint import list_checkpoint
from mnemo.snapshot.tree import Part, Stable, take_apart, unpack

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of Lightning, on so small a fit


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        self.net[3].bias.requires_grad_(False)
        self.tied = self.net[0]
        self.register_buffer("mean", torch.zeros(4))
        self.save_hyperparameters({"width": 8})

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.mean = 0.9 * self.mean + 0.1 * batch[0].mean(0)  # another tensor at each step
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


class Steady(Net):
    """Replaces no tensor."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.net(batch[0]).square().mean()


class MovesParameter(Steady):
    """Gives a parameter other memory, behind the same object."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        bias = self.net[0].bias
        bias.data = bias.data.clone()


class MovesBuffer(Steady):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.mean.data = self.mean.data + 1


class MovesMoment(Steady):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for state in self.optimizers().state.values():
            state["exp_avg"] = state["exp_avg"].clone()


class WithMetric(Net):
    def __init__(self) -> None:
        super().__init__()
        self.kept = MeanMetric()
        self.kept.persistent(True)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.kept.update(loss.detach())
        return loss


class Momentum(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=1e-2, momentum=0.9)


class PlainSgd(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=1e-2)


class Lbfgs(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=1e-2)


class OwnStateDict(Net):
    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        return {**super().state_dict(*args, **options), "more": torch.ones(3)}


class Sees(Net):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {k: v * 2 for k, v in checkpoint["state_dict"].items()}
        checkpoint["seen"] = sorted(checkpoint["optimizer_states"][0]["state"])


class CallbackSees(pl.Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"calls": 3}

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["names"] = sorted(checkpoint["state_dict"])


class OtherStrategy(SingleDeviceStrategy):
    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {"net": "kept elsewhere"}


class DataModule(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        g = torch.Generator().manual_seed(1)
        return DataLoader(TensorDataset(torch.randn(48, 4, generator=g)), batch_size=8)

    def state_dict(self) -> dict[str, Any]:
        return {"position": 7}


class Compare(pl.Callback):
    """At each step: takes the state apart as a snapshot does, and puts it together again."""

    def __init__(self) -> None:
        self.listed: list[dict[str, Any]] = []
        self._known: dict[str, Part] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        expected = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        checkpoint = list_checkpoint(trainer)
        taken = take_apart(checkpoint, self._known)
        tensors = [tensor.detach() for _, tensor in taken.all_tensors()]
        assert_equal(unpack(taken.pack(), tensors.__getitem__, trusted=True), expected, "")
        self.listed.append(checkpoint)


def assert_equal(found: Any, expected: Any, path: str) -> None:
    assert type(found) is type(expected), path
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            assert_equal(found[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), path
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_equal(one, other, f"{path}.{i}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), path
    else:
        assert found == expected, path


def fit(make: Callable[[], Net], *callbacks: pl.Callback, strategy: Any = "auto") -> Compare:
    pl.seed_everything(3, verbose=False)
    compare = Compare()
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy=strategy,
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, compare],
    )
    trainer.fit(make(), DataModule())
    assert len(compare.listed) == 12
    return compare


def is_stable(compare: Compare) -> tuple[bool, bool]:
    """Of the model, and of the first optimizer's state."""
    newest = compare.listed[-1]
    state = newest["optimizer_states"][0]["state"]
    return isinstance(newest["state_dict"], Stable), isinstance(state, Stable)


@pytest.mark.parametrize("make", [Net, Momentum])
def test_plain_state_is_listed_apart(make: type[Net]) -> None:
    assert is_stable(fit(make)) == (True, True)


@pytest.mark.parametrize("make", [PlainSgd, Lbfgs])
def test_optimizers_of_another_kind(make: type[Net]) -> None:
    assert is_stable(fit(make))[0]


@pytest.mark.parametrize("make", [Steady, MovesParameter, MovesBuffer, MovesMoment])
def test_tensors_that_move(make: type[Net]) -> None:
    fit(make)


def test_metrics_that_are_saved() -> None:
    fit(WithMetric)


def test_a_state_dict_of_its_own() -> None:
    assert not is_stable(fit(OwnStateDict))[0]


@pytest.mark.parametrize(
    ("make", "callback"),
    [(Sees, pl.Callback), (Net, CallbackSees), (Net, lambda: EMAWeightAveraging(decay=0.5))],
)
def test_hooks_are_shown_the_whole(make: type[Net], callback: Callable[[], pl.Callback]) -> None:
    assert is_stable(fit(make, callback())) == (False, False)


def test_a_hook_set_on_the_instance() -> None:
    def make() -> Net:
        made = Net()
        made.on_save_checkpoint = lambda checkpoint: checkpoint.update(late=1)  # type: ignore[method-assign]
        return made

    compare = fit(make)
    assert compare.listed[-1]["late"] == 1
    assert is_stable(compare) == (False, False)


def test_a_strategy_of_its_own() -> None:
    compare = fit(Net, strategy=OtherStrategy(torch.device("cpu")))
    assert compare.listed[-1]["state_dict"] == {"net": "kept elsewhere"}
