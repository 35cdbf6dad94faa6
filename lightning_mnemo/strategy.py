"""`MnemoDDPStrategy`: data-parallel training whose ranks can be replaced one by one."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.connectors.callback_connector import _CallbackConnector
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

import mnemo.comm  # noqa: F401 - registers the backend
from lightning_mnemo.callback import MnemoCallback
from mnemo.session.joining import is_joining

_NAME = "mnemo_ddp"
_CAN_SKIP = "init_sync" in inspect.signature(DistributedDataParallel).parameters


class MnemoDDPStrategy(DDPStrategy):
    """``ddp``, in which a rank that dies under ``mnemo run`` is replaced while the others go on.

    Also by name, ``Trainer(strategy="mnemo_ddp")``, once `lightning_mnemo` is imported. A
    `MnemoCallback` comes with it, unless the trainer has one. On a CPU sums of gradients do not
    depend on how DDP fills its buckets, with any number of ranks; on other devices, and without
    ``mnemo run``, it is plain ``ddp``, and a crash restarts all ranks from memory.
    """

    strategy_name = _NAME

    def __init__(self, *args: Any, config: str | Path | None = None, **options: Any) -> None:
        """As `DDPStrategy`.

        Args:
            args: As `DDPStrategy` takes them.
            config: YAML file for the callback that comes with it.
            options: As `DDPStrategy` takes them.
        """
        super().__init__(*args, **options)
        self._config = config

    @override
    def connect(self, model: pl.LightningModule) -> None:
        super().connect(model)
        trainer: Any = model.trainer
        if not any(isinstance(callback, MnemoCallback) for callback in trainer.callbacks):
            callbacks = [*trainer.callbacks, MnemoCallback(self._config)]
            trainer.callbacks = _CallbackConnector._reorder_callbacks(callbacks)

    @override
    def configure_ddp(self) -> None:
        if _CAN_SKIP and is_joining():  # alone, and all parameters are replaced later
            self._ddp_kwargs = {**self._ddp_kwargs, "init_sync": False}
        super().configure_ddp()

    @override
    def setup_environment(self) -> None:
        if self._process_group_backend is None and self.root_device.type == "cpu":
            self._process_group_backend = "mnemo"
        super().setup_environment()


StrategyRegistry.register(
    _NAME, MnemoDDPStrategy, description="DDP whose ranks are replaced one by one (mnemo)"
)
