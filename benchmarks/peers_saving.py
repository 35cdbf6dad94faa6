"""How others save training state, each driven as its authors mean it to be.

One interface for all, so that a benchmark can measure them in turns::

    blocked = saver.save(state, step)     # right after the optimizer step
    ...                                   # forward and backward of the next step
    blocked += saver.before_update()      # right before the optimizer changes the state
    saver.drain()                         # untimed: until the bytes are on disk

What a call returns is the time in seconds that training stood still for it. A save while the one
before is still being written waits for that one, and counts the wait.
"""

from __future__ import annotations

import shutil
import threading
import warnings
from typing import TYPE_CHECKING, Any, Protocol

import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save

from benchmarks.harness import seconds

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

State = dict[str, Any]


class Saver(Protocol):
    """One way to save; the newest checkpoint lies at `path` after `drain`."""

    name: str
    path: Path

    def save(self, state: State, step: int) -> float:
        """Save ``state`` as of ``step``; return the seconds blocked."""
        ...

    def before_update(self) -> float:
        """Make it safe to change the state; return the seconds blocked."""
        ...

    def drain(self) -> None:
        """Wait until the newest save is on disk."""
        ...

    def close(self) -> None:
        """Drain, stop all threads and remove what was written."""
        ...


class TorchSave:
    """``torch.save`` in the training thread."""

    name = "torch.save"

    def __init__(self, directory: Path) -> None:
        self.path = directory / "torch_save.pt"

    def save(self, state: State, step: int) -> float:
        """See `Saver.save`."""
        return seconds(lambda: torch.save({**state, "step": step}, self.path))

    def before_update(self) -> float:
        """Nothing is under way."""
        return 0.0

    def drain(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """See `Saver.close`."""
        self.path.unlink(missing_ok=True)


class _AnnouncingIO(TorchCheckpointIO):
    """Tells when a checkpoint is written, which AsyncCheckpointIO does not."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = threading.Event()
        self.idle.set()

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().save_checkpoint(*args, **kwargs)
        finally:
            self.idle.set()


class LightningAsync:
    """Lightning's AsyncCheckpointIO: clones in the training thread, writes in another."""

    name = "Lightning AsyncCheckpointIO"

    def __init__(self, directory: Path) -> None:
        self.path = directory / "lightning.ckpt"
        self._writer = _AnnouncingIO()
        self._io = AsyncCheckpointIO(self._writer)

    def save(self, state: State, step: int) -> float:
        """See `Saver.save`."""

        def save() -> None:
            self.drain()
            self._writer.idle.clear()
            self._io.save_checkpoint({**state, "step": step}, self.path)

        return seconds(save)

    def before_update(self) -> float:
        """The clone was made in `save`."""
        return 0.0

    def drain(self) -> None:
        """See `Saver.drain`."""
        self._writer.idle.wait()

    def close(self) -> None:
        """See `Saver.close`."""
        self._io.teardown()
        self.path.unlink(missing_ok=True)


class DcpAsync:
    """``torch.distributed.checkpoint.async_save`` with asynchronous staging on one rank.

    The copy to staging memory runs in a thread and is awaited in `before_update`.
    """

    name = "DCP async_save"

    def __init__(self, directory: Path) -> None:
        self.path = directory / "dcp"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=torch.cuda.is_available(),
                use_shared_memory=False,
                use_async_staging=True,
                use_non_blocking_copy=torch.cuda.is_available(),
            )
        )
        self._response: AsyncSaveResponse | None = None

    def save(self, state: State, step: int) -> float:
        """See `Saver.save`."""

        def save() -> None:
            self.drain()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a world of one, and of overwriting
                response = async_save(
                    {**state, "step": step},
                    checkpoint_id=self.path,
                    async_stager=self._stager,
                    no_dist=True,
                )
            assert isinstance(response, AsyncSaveResponse)
            self._response = response

        return seconds(save)

    def before_update(self) -> float:
        """See `Saver.before_update`."""
        if self._response is None:
            return 0.0
        return seconds(self._response.staging_completion.result)

    def drain(self) -> None:
        """See `Saver.drain`."""
        if self._response is not None:
            self._response.upload_completion.result()
            self._response = None

    def close(self) -> None:
        """See `Saver.close`."""
        self.drain()
        self._stager.close()
        shutil.rmtree(self.path, ignore_errors=True)


def all_savers(directory: Path) -> Mapping[str, Saver]:
    """Make one saver of each kind, by name; each writes below ``directory``."""
    savers: list[Saver] = [TorchSave(directory), LightningAsync(directory), DcpAsync(directory)]
    return {saver.name: saver for saver in savers}
