"""Lightning's checkpoint of a step, by reference: what a snapshot holds of it.

``dump_checkpoint`` asks every module and optimizer for its state, which takes milliseconds. Where
that is plain, the model's state dict and the optimizers' are given as `Stable` parts, which are
listed again only when their tensors are other ones. What is restored is the same either way.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.hooks import CheckpointHooks
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.utilities.model_helpers import is_overridden

from mnemo.snapshot.listing import module_state, optimizer_state
from mnemo.snapshot.tree import Stable, is_plain


def list_checkpoint(trainer: pl.Trainer) -> dict[str, Any]:
    """What ``trainer.save_checkpoint`` would write now; once restored, it is just that."""
    if _sees_the_whole(trainer):
        return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    checkpoint = _Listing(cast("pl.Trainer", _WithoutOptimizers(trainer))).dump_checkpoint(
        weights_only=False
    )
    checkpoint["optimizer_states"] = [_list_optimizer(trainer, o) for o in trainer.optimizers]
    return checkpoint


def _sees_the_whole(trainer: pl.Trainer) -> bool:
    """Whether any code but Lightning's own is shown the checkpoint, or makes a part of it."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    strategy = type(trainer.strategy)
    return (
        is_overridden("on_save_checkpoint", trainer.lightning_module)
        or any(is_overridden("on_save_checkpoint", c) for c in callbacks)
        or type(trainer.precision_plugin).on_save_checkpoint
        is not CheckpointHooks.on_save_checkpoint
        or strategy.lightning_module_state_dict is not Strategy.lightning_module_state_dict
        or strategy.optimizer_state is not Strategy.optimizer_state
    )


class _WithoutOptimizers:
    """A trainer to read from, whose optimizers are listed apart.

    Patching the trainer itself would show in the checkpoint that a signal handler of Lightning's
    saves, which may run at any time.
    """

    optimizers = ()

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


class _Listing(_CheckpointConnector):
    """Lightning's own way to make a checkpoint, but for the model's state dict."""

    def _get_lightning_module_state_dict(self) -> Any:
        return _list_module(self.trainer.lightning_module)


def _list_module(module: pl.LightningModule) -> Stable | dict[str, Any]:
    """One part. Buffers that are other objects, as those of metrics are, make it another one."""
    listed = module_state(module)
    parameters, rest = listed["parameters"], listed["rest"]
    if not isinstance(parameters, Stable) or not all(is_plain(t) for t in rest.values()):
        return module.state_dict()
    forms = [(name, t.dtype, t.shape) for name, t in rest.items()]
    # The tensors themselves, not what is detached from them: memory may be given to them anew.
    build = functools.partial(module.state_dict, keep_vars=True)
    return Stable([*parameters.members, *rest.values()], build, key=forms)


def _list_optimizer(trainer: pl.Trainer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    if hasattr(optimizer, "consolidate_state_dict"):  # its state is shared out among the ranks
        return trainer.strategy.optimizer_state(optimizer)
    return optimizer_state(optimizer)
