"""Text that is on every machine: the source of Python's standard library, as bytes."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class Windows(Dataset[Tensor]):
    """Consecutive windows of ``length`` bytes that do not overlap."""

    def __init__(self, text: np.ndarray, length: int) -> None:
        self.windows = text[: len(text) // length * length].reshape(-1, length)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.windows[index].astype(np.int64))


class StandardLibrary(L.LightningDataModule):
    """The modules of the standard library in the order of their names.

    Args:
        context: Bytes that the model sees; a window holds one more, the target of the last.
        batch_size: Windows per rank and batch.
    """

    def __init__(self, context: int, batch_size: int) -> None:
        super().__init__()
        self.length, self.batch_size = context + 1, batch_size

    def setup(self, stage: str) -> None:
        """Read the text; the last twentieth is for validation."""
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = np.frombuffer(b"".join(file.read_bytes() for file in files), dtype=np.uint8)
        split = len(text) * 19 // 20
        self.train, self.validation = (
            Windows(part, self.length) for part in (text[:split], text[split:])
        )

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return shuffled windows; Lightning deals them out to the ranks."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return the held-out windows in order."""
        return DataLoader(self.validation, self.batch_size)
