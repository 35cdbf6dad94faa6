"""State that the next batch depends on and that no Lightning checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics import Metric

from lightning_mnemo.checks import why_not_replaced
from mnemo.session.attributes import AttributeWatch
from mnemo.session.keeper import Keeper
from mnemo.session.modules import Modules
from mnemo.session.replacing import Replicas
from mnemo.session.unsaved import Unsaved, restore_wrapper, wrapper_state
from mnemo.snapshot.listing import tensors_of

_LIGHTNINGS = {
    *vars(pl.LightningModule()),
    *("_hparams", "_hparams_name", "_hparams_initial", "_log_hyperparams"),
}
"""Attributes of a module that are Lightning's own."""


_SETTINGS = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
"""What of a trainer is asked anew at every batch, so that some change it while they train."""


def replicas(trainer: pl.Trainer) -> Replicas:
    """What all ranks hold alike between two updates, in data-parallel training."""

    def tensors() -> Iterator[torch.Tensor]:
        yield from trainer.lightning_module.parameters()
        yield from tensors_of(trainer.optimizers)

    return Replicas(tensors, trainer.strategy.model, why_not_replaced(trainer))


class Extras:
    """Flags of the trainer, gradients that wait, and what modules are besides their state dict."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._module = trainer.lightning_module
        self._attributes = AttributeWatch(
            "use on_save_checkpoint", skip=_LIGHTNINGS, kinds=(Metric,)
        )
        self.begin()
        # Who has one keeps what is needed there, and need not be told of the rest.
        self._keeps_own = is_overridden("on_save_checkpoint", self._module)
        self._stepped: set[int] = set()
        self._handles: list[Any] = []

    def begin(self) -> None:
        """What there is now each start makes of itself: what differs later is kept."""
        self._unsaved = Unsaved(self._module)
        self._attributes.begin(list(self._module.named_modules()))
        self._made = self._settings()

    def _wrapped(self) -> torch.nn.Module:
        model = self._trainer.strategy.model
        assert model is not None
        return model

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self._trainer, name) for name in _SETTINGS}

    # --- manual optimization ------------------------------------------------------------------

    def watch_optimizers(self, keeper: Keeper) -> None:
        """In manual optimization: notice each step, by whomever it is made."""
        if self._module.automatic_optimization:
            return
        for number, optimizer in enumerate(self._trainer.optimizers):
            raw = getattr(optimizer, "_optimizer", optimizer)

            def before_step(*_: Any, number: int = number) -> None:
                keeper.before_update()
                self._stepped.add(number)

            self._handles.append(raw.register_step_pre_hook(before_step))

    def has_stepped(self) -> bool:
        """Whether an optimizer has stepped since the last boundary."""
        return bool(self._stepped)

    def begin_batch(self) -> None:
        """The steps made so far belong to a boundary that is past."""
        self._stepped.clear()

    def waiting(self) -> dict[int, list[torch.Tensor | None]]:
        """Gradients of optimizers that did not step: they will be added to."""
        if self._module.automatic_optimization:
            return {}
        found = {}
        for number, optimizer in enumerate(self._trainer.optimizers):
            gradients = [p.grad for g in optimizer.param_groups for p in g["params"]]
            if number not in self._stepped and any(g is not None for g in gradients):
                found[number] = gradients
        return found

    def volatile(self) -> set[int]:
        """Addresses of tensors that change before the next update."""
        found = {b.data_ptr() for b in self._module.buffers() if b.layout is torch.strided}
        found |= {g.data_ptr() for gs in self.waiting().values() for g in gs if g is not None}
        return found

    # --- state --------------------------------------------------------------------------------

    def state(self, modules: Modules) -> dict[str, Any]:
        """Everything, by reference.

        Args:
            modules: What ``named_modules`` gives; asking it takes longer than the rest of this.
        """
        return {
            "unsaved": self._unsaved.state(modules),
            "wrapper": wrapper_state(self._wrapped()),
            "attributes": self._attributes.look(modules, warn=not self._keeps_own),
            "gradients": self.waiting(),
            "should_stop": self._trainer.should_stop,
            "settings": {n: v for n, v in self._settings().items() if v != self._made[n]},
        }

    def restore(self, state: dict[str, Any], optimizer_states: list[dict[str, Any]]) -> str:
        """The inverse of `state`, when loops and optimizers are where they were.

        Returns:
            What of the module is not as it was, in words; empty if nothing is.
        """
        trainer = self._trainer
        self._unsaved.restore(state["unsaved"])
        restore_wrapper(self._wrapped(), state["wrapper"])
        for number, gradients in state["gradients"].items():
            optimizer = trainer.optimizers[number]
            parameters = [p for g in optimizer.param_groups for p in g["params"]]
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = None if gradient is None else gradient.to(parameter.device)
        trainer.should_stop = state["should_stop"]
        _resume_weight_averaging(trainer, optimizer_states)
        for name, value in state["settings"].items():
            setattr(trainer, name, value)
        return self._attributes.begin(list(self._module.named_modules()), state["attributes"])

    def undo(self) -> None:
        """Remove what was registered."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _resume_weight_averaging(trainer: pl.Trainer, optimizer_states: list[dict[str, Any]]) -> None:
    """Stochastic weight averaging sets itself up at the start of an epoch; go through that again.

    Making its scheduler changes learning rates, so those are set back to what they were.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, StochasticWeightAveraging) or callback._initialized:
            continue
        if callback.swa_start <= trainer.current_epoch <= callback.swa_end:
            callback.on_train_epoch_start(trainer, trainer.lightning_module)
            for optimizer, saved in zip(trainer.optimizers, optimizer_states, strict=True):
                for group, values in zip(
                    optimizer.param_groups, saved["param_groups"], strict=True
                ):
                    group.update({k: v for k, v in values.items() if k != "params"})
        elif trainer.current_epoch == callback.swa_end + 1:
            # An epoch for BatchNorm alone, whose only step is its end: all that is left to do is
            # to undo what its start did.
            callback._accumulate_grad_batches = trainer.accumulate_grad_batches
            callback.momenta = {
                child: child.momentum
                for child in trainer.lightning_module.modules()
                if isinstance(child, _BatchNorm)
            }
            trainer.fit_loop.max_batches += 1
