"""The training of `benchmarks.node_loss`: a small GPT, data-parallel, under mnemo or with a file.

Each rank appends to ``OUT/rank-RANK`` a JSON line for whatever it has come to, with the time.
"""

from __future__ import annotations

import time

BEGUN = time.time()

import argparse  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import statistics  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402
from torch.utils.data.distributed import DistributedSampler  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

SHARE = 0.03
"""Of step time that checkpoints may cost."""
_MEASURED = range(8, 16)
"""Steps of a fresh run after each of which a checkpoint is made, to know what one costs."""
_WORDS, _LENGTH, _BATCH = 256, 64, 2
_EPOCHS = 10**6


class Gpt(nn.Module):
    """Decoder-only, pre-norm; logits of shape ``(batch, length, words)``."""

    def __init__(self, width: int = 256, layers: int = 6, heads: int = 4) -> None:
        super().__init__()
        self.token = nn.Embedding(_WORDS, width)
        self.place = nn.Parameter(torch.zeros(_LENGTH, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, _WORDS)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(_LENGTH))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """Words of shape ``(batch, length)``."""
        x = self.token(words) + self.place
        logits: torch.Tensor = self.head(self.layers(x, mask=self.mask, is_causal=True))
        return logits


class Marks:
    """What this rank has come to, for who measures."""

    def __init__(self, out: Path) -> None:
        self._file = (out / f"rank-{os.environ['RANK']}").open("a", buffering=1)

    def __call__(self, what: str, **more: float) -> None:
        """Write it down; ``begun`` tells one life from another."""
        mark = {"what": what, "at": time.time(), "begun": BEGUN, **more}
        self._file.write(json.dumps(mark) + "\n")


def train(out: Path, mark: Marks, *, alone: bool) -> None:
    """Train until killed."""
    torch.manual_seed(7)
    model = DistributedDataParallel(Gpt(), find_unused_parameters=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    data = TensorDataset(torch.randint(_WORDS, (4096, _LENGTH + 1)))
    loader = DataLoader(data, batch_size=_BATCH, sampler=DistributedSampler(data))
    mark("built")
    if alone:
        with_file(out / "checkpoint", mark, model, optimizer, loader)
    else:
        with_mnemo(mark, model, optimizer, loader)


def loss_of(model: nn.Module, words: torch.Tensor) -> torch.Tensor:
    """Of guessing each next word."""
    logits = model(words[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten())


def with_mnemo(
    mark: Marks, model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any]
) -> None:
    """As the README has it."""
    import mnemo

    run = mnemo.Session(model=model, optimizer=optimizer)
    batches = run.batches(loader, epochs=_EPOCHS)
    first = next(batches)
    mark("ready", step=run.steps_done)
    while True:
        loss = loss_of(model, first[0])
        loss.backward()
        run.step(loss)
        mark("step", step=run.steps_done)
        first = next(batches)


def with_file(
    path: Path,
    mark: Marks,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader[Any],
) -> None:
    """Rank 0 saves to ``path``, all load from there.

    What is spent on it after a fresh start says how often: as often as `SHARE` pays for. Batches
    that were passed are not passed again, which only makes the restart faster.
    """
    step, every = 0, 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, every = state["step"], state["every"]
    mark("ready", step=step)
    saves: list[float] = []
    steps: list[float] = []

    def save() -> None:
        begun = time.perf_counter()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "step": step, "every": every}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
        saves.append(time.perf_counter() - begun)

    for (words,) in passes(loader):
        begun = time.perf_counter()
        loss_of(model, words).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.append(time.perf_counter() - begun)
        step += 1
        mark("step", step=step)
        if dist.get_rank() != 0:
            continue
        if not every and step in _MEASURED:
            save()
        elif not every and step > _MEASURED[-1]:
            cost, usual = statistics.median(saves), statistics.median(steps[4:])
            every = math.ceil(cost / (SHARE * usual))
            mark("interval", every=every, save_s=cost, step_s=usual)
        if every and step % every == 0:
            save()
            mark("saved", step=step)


def passes(loader: DataLoader[Any]) -> Iterator[tuple[torch.Tensor]]:
    """Over the data, again and again."""
    while True:
        yield from loader


def main() -> None:
    """Of a rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--file", action="store_true", help="without mnemo")
    words = parser.parse_args()
    mark = Marks(words.out)
    if not words.file:
        import mnemo  # noqa: F401 - no part of the peer's start
    mark("imported")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mark("group")
    train(words.out, mark, alone=words.file)


if __name__ == "__main__":
    main()
