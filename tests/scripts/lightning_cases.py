"""The trainings that `lightning_lab` runs: one function each, with what is special about it."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchmetrics import MeanMetric, MetricCollection, MinMaxMetric
from torchmetrics.classification import BinaryAccuracy, BinaryPrecision, BinaryRecall

from mnemo import faults

WIDTH, HIDDEN = 64, 96
"""Large enough for tensors that are copied in the background."""


@dataclass
class Case:
    model: pl.LightningModule
    train: Any
    val: Any = None
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: list[pl.Callback] = field(default_factory=list)
    fit: dict[str, Any] = field(default_factory=dict)
    before: Callable[[pl.Trainer], None] = lambda trainer: None
    after: Callable[[pl.Trainer], None] = lambda trainer: None


def make(name: str, out: Path) -> Iterator[Case]:
    """The fits of a case, one after another."""
    pl.seed_everything(7, verbose=False)
    made = globals()[name](out)
    if isinstance(made, Case):
        yield made
    else:
        yield from made


def extra(trainer: pl.Trainer) -> dict[str, Any]:
    """What else must be equal at the end."""
    found: dict[str, Any] = {}
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint):
            continue
        state = callback.state_dict()
        where = str(trainer.default_root_dir)
        found.setdefault("checkpoints", []).append(repr(state).replace(where, ""))
        directory = Path(callback.dirpath or "")
        found["files"] = sorted(p.name for p in directory.glob("*"))
    for stopping in trainer.early_stopping_callbacks:
        found["stopping"] = repr(stopping.state_dict())
    return found


def samples(count: int = 64, seed: int = 5) -> TensorDataset:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, WIDTH, generator=g)
    return TensorDataset(x, x[:, :1] * 2 + x[:, 1:2])


def loader(count: int = 64, **options: Any) -> DataLoader:
    return DataLoader(samples(count), **{"batch_size": 8, "shuffle": True, **options})


def val() -> DataLoader:
    return DataLoader(samples(32, seed=6), batch_size=16)


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(WIDTH, HIDDEN),
            nn.BatchNorm1d(HIDDEN),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(HIDDEN, 1),
        )
        self.running = MeanMetric()

    def loss(self, batch):
        x, y = batch
        return ((self.net(x) - y) ** 2).mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.running.update(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("running", self.running, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.8)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


# --- optimization -----------------------------------------------------------------------------


def plain(out):
    return Case(Net(), loader(), val())


def steady_buckets(out):
    """DDP never fills its buckets in another order than at first."""
    return Case(Net(), loader(), val(), {"strategy": "ddp_find_unused_parameters_true"})


def trained(out):
    """Whether an earlier life came to its training: a search would find something else now."""
    rows = out / "rows-0.jsonl"
    return rows.exists() and rows.stat().st_size > 0


class Searched(Net):
    """Reaches the phase ``search`` in each step, also of a search; logs what was found."""

    def __init__(self) -> None:
        super().__init__()
        self.lr = 1e-3
        self.batch_size = 8

    def training_step(self, batch, batch_idx):
        faults.reach("search", step=self.global_step)
        self.log_dict({"lr": self.lr, "batch_size": float(self.batch_size)})
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def lr_search(out):
    """Before the first batch a learning rate is searched, by training and going back."""
    search = LearningRateFinder(max_lr=1.0 if trained(out) else 1e-2, num_training_steps=20)
    return Case(Searched(), loader(), val(), {}, [search])


def lr_search_later(out):
    """So it is before the second epoch, where Lightning 2.6 goes back without having trained."""

    class Later(LearningRateFinder):
        def on_fit_start(self, trainer, pl_module):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                self.lr_find(trainer, pl_module)

    search = Later(max_lr=1e-2, num_training_steps=20)
    return Case(Searched(), loader(), val(), {}, [search])


def lr_tuned(out):
    """So it is by a Tuner, in a fit of its own."""

    def tune(trainer: pl.Trainer) -> None:
        Tuner(trainer).lr_find(case.model, case.train, case.val, max_lr=1e-2, num_training=20)

    case = Case(Searched(), loader(), val(), before=tune)
    return case


def batch_search(out):
    """Before the first batch a batch size is searched."""

    class Sized(Searched):
        def train_dataloader(self):
            return loader(batch_size=self.batch_size)

        def val_dataloader(self):
            return val()

        def configure_optimizers(self):
            steps = int(self.trainer.estimated_stepping_batches)
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    search = BatchSizeFinder(steps_per_trial=2, init_val=1, max_trials=5 if trained(out) else 3)
    return Case(Sized(), None, callbacks=[search])


def accumulation(out):
    """Epochs of 9 batches end in mid-accumulation."""
    return Case(Net(), loader(72), val(), {"accumulate_grad_batches": 4, "max_epochs": 3})


def plateau(out):
    class Plateau(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"},
            }

    return Case(Plateau(), loader(), val(), {"max_epochs": 4})


def epoch_scheduler(out):
    class PerEpoch(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    return Case(PerEpoch(), loader(), val(), {"max_epochs": 3, "gradient_clip_val": 0.1})


def lbfgs(out):
    class Lbfgs(Net):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    return Case(Lbfgs(), loader(32), val())


def bf16(out):
    return Case(Net(), loader(), val(), {"precision": "bf16-mixed"})


def scaler(out):
    """A gradient scaler that overflows at first: steps are skipped."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**40))
    return Case(Net(), loader(), val(), {"plugins": [plugin], "max_epochs": 4})


class Gan(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        generator, critic = self.optimizers()
        x, y = batch
        made = self.net(x)
        critic_loss = (self.critic(made.detach()) - self.critic(y)).mean() ** 2
        critic_loss = critic_loss + (self.critic(y) - 1).pow(2).mean()
        critic.zero_grad()
        self.manual_backward(critic_loss)
        critic.step()
        for parameter in self.critic.parameters():
            parameter.data.clamp_(-0.5, 0.5)
        loss = self.loss(batch) - 0.1 * self.critic(self.net(x)).mean()
        generator.zero_grad()
        self.manual_backward(loss)
        generator.step()
        for scheduler in self.lr_schedulers():
            scheduler.step()
        self.log_dict({"loss": loss, "critic": critic_loss})
        return loss

    def configure_optimizers(self):
        first = torch.optim.Adam(self.net.parameters(), lr=1e-2)
        second = torch.optim.RMSprop(self.critic.parameters(), lr=1e-2)
        return [first, second], [
            torch.optim.lr_scheduler.StepLR(first, 4, 0.5),
            torch.optim.lr_scheduler.StepLR(second, 3, 0.5),
        ]


def gan(out):
    return Case(Gan(), loader(), val())


def manual_pending(out):
    """Two optimizers, one of which steps only every third batch: its gradients wait."""

    class Pending(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            often, rarely = self.optimizers()
            loss = self.loss(batch)
            self.manual_backward(loss)
            often.step()
            often.zero_grad()
            if (batch_idx + 1) % 3 == 0:
                rarely.step()
                rarely.zero_grad()
            return loss

        def configure_optimizers(self):
            return [
                torch.optim.SGD(self.net[:2].parameters(), lr=0.05),
                torch.optim.Adam(self.net[4].parameters(), lr=0.05),
            ]

    return Case(Pending(), loader(), val())


def manual_raw(out):
    """Optimizers stepped without Lightning knowing: its step count stays at 0."""

    class Raw(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            loss = self.loss(batch)
            loss.backward()
            optimizer.step()
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    return Case(Raw(), loader(), val())


def none_loss(out):
    class Sometimes(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx % 3 == 1 else loss

    return Case(Sometimes(), loader(), val())


def skip_epoch(out):
    class Skips(Net):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.current_epoch == 1 and batch_idx == 5 else None

    return Case(Skips(), loader(), val(), {"max_epochs": 3})


def lora(out):
    """Most weights frozen; two layers tied; a layer made late; unusual buffers."""

    class Lora(Net):
        def __init__(self) -> None:
            super().__init__()
            self.out = None
            self.register_buffer("seen", torch.zeros(1), persistent=False)
            self.register_buffer("total", torch.zeros(1))

        def configure_model(self):
            if self.out is not None:
                return
            self.out = nn.Linear(HIDDEN, 1, bias=False)
            self.tied = nn.Linear(HIDDEN, 1, bias=False)
            self.tied.weight = self.out.weight
            for parameter in self.net[0].parameters():
                parameter.requires_grad = False

        def loss(self, batch):
            x, y = batch
            if self.training:
                self.seen += 1
                self.total += x.sum()
            hidden = self.net[:4](x)
            return ((self.out(hidden) + self.tied(hidden) - y) ** 2).mean() * (1 + self.seen / 99)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    return Case(Lora(), loader(), val())


def finetuning(out):
    """A layer is unfrozen, and given to the optimizer, in mid-training."""
    from lightning.pytorch.callbacks import BaseFinetuning

    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=1e-3)

    class Tuned(Net):
        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    return Case(Tuned(), loader(), val(), {"max_epochs": 3}, [Unfreeze()])


def layer_schedule(out):
    """Settings of torch's own layers change by a schedule that only looks at what they are.

    So does one of the trainer.
    """

    class Scheduled(Net):
        def on_train_epoch_start(self):
            self.net[3].p *= 0.8

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.net[3].p *= 0.9
            self.net[1].momentum *= 0.95
            self.trainer.gradient_clip_val *= 0.9

    return Case(Scheduled(), loader(), val(), {"max_epochs": 3, "gradient_clip_val": 0.5})


class Bank(nn.Module):
    """Keeps a number of each batch, and says how many there were where it is loaded."""

    def __init__(self, kept: int = 0, *, grows: bool = True) -> None:
        super().__init__()
        self.grows = grows
        self.register_buffer("kept", torch.zeros(kept))

    def forward(self, x):
        if self.training and self.grows:
            self.kept = torch.cat([self.kept, x.detach().mean()[None]])
        return x + self.kept.mean()

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        if self.grows:
            self.kept = torch.empty_like(state_dict[prefix + "kept"])
        super()._load_from_state_dict(state_dict, prefix, *rest)


def shapeless(out, bank=None):
    """A layer and a buffer that get their shapes from the data; nothing is validated before."""
    model = Net()
    model.net[0] = nn.LazyLinear(HIDDEN)
    model.net.append(bank or Bank())
    return Case(model, loader(), None, {"max_epochs": 3})


def shapeless_fixed(out):
    """`shapeless`, with a buffer that stays as it is."""
    return shapeless(out, Bank(3, grows=False))


def set_at_start(out, p=0.3):
    """What a layer drops is set when the training begins, and said when it is over."""

    class Setting(Net):
        def on_train_start(self):
            self.net[3].p = p

        def on_train_end(self):
            print(f"dropped {self.net[3].p}", file=sys.stderr)

    return Case(Setting(), loader(), val())


def set_at_start_changed(out):
    """`set_at_start` with another value."""
    return set_at_start(out, p=0.9)


def layer_exchanged(out):
    class Operated(Net):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.net[2] = nn.GELU()

    return Case(Operated(), loader(), val(), {"max_epochs": 3})


def hook_added(out):
    class Operated(Net):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.net[0].register_forward_hook(lambda module, args, output: output * 0.9)

    return Case(Operated(), loader(), val(), {"max_epochs": 3})


def pruning(out):
    from lightning.pytorch.callbacks import ModelPruning

    return Case(
        Net(), loader(), val(), {"max_epochs": 3}, [ModelPruning("l1_unstructured", amount=0.2)]
    )


# --- metrics and loop settings ----------------------------------------------------------------


def metrics(out):
    class Metrics(Net):
        def __init__(self) -> None:
            super().__init__()
            self.collection = MetricCollection(
                [BinaryPrecision(), BinaryRecall(), BinaryAccuracy()]
            )
            self.by_name = nn.ModuleDict({"a": MeanMetric(), "b": MinMaxMetric(MeanMetric())})
            self.valid = BinaryAccuracy()

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            x, y = batch
            self.collection.update(self.net(x).detach(), (y > 0).int())
            self.log_dict(self.collection, on_step=False, on_epoch=True)
            self.by_name["a"](loss.detach())
            self.log("a", self.by_name["a"], on_step=True, on_epoch=True)
            self.by_name["b"].update(loss.detach())
            self.by_name["b"].compute()
            self.log("total", loss * 2, on_step=True, on_epoch=True, reduce_fx="max")
            return loss

        def on_train_epoch_end(self):
            extremes = self.by_name["b"].compute()
            self.log_dict({f"b_{k}": v for k, v in extremes.items()})
            self.by_name["b"].reset()

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.valid.update(self.net(batch[0]), (batch[1] > 0).int())
            self.log("valid", self.valid)

    return Case(Metrics(), loader(), val(), {"max_epochs": 3})


def every_second_epoch(out):
    options = {"check_val_every_n_epoch": 2, "val_check_interval": 1.0, "max_epochs": 4}
    return Case(Net(), loader(), val(), {**options, "limit_train_batches": 5})


def validation_across_epochs(out):
    options = {"check_val_every_n_epoch": None, "val_check_interval": 5, "max_steps": 19}
    return Case(Net(), loader(), val(), {**options, "max_epochs": None})


def max_steps(out):
    return Case(Net(), loader(), val(), {"max_steps": 11, "max_epochs": None})


def overfit(out):
    return Case(Net(), loader(), val(), {"overfit_batches": 3, "val_check_interval": 1.0})


def reload_loaders(out):
    class Reloads(Net):
        def train_dataloader(self):
            return loader(64, batch_size=8 + self.current_epoch)

    options = {"reload_dataloaders_every_n_epochs": 2, "max_epochs": 5, "val_check_interval": 1.0}
    return Case(Reloads(), None, None, options)


def early_stopping(out):
    class Worse(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", float(self.global_step > 6), sync_dist=True)

    stop = EarlyStopping("val_loss", patience=2)
    return Case(Worse(), loader(), val(), {"max_epochs": 9}, [stop])


def timer(out):
    """Long enough not to end by time."""
    return Case(Net(), loader(), val(), {"max_time": {"minutes": 5}}, [Timer(interval="epoch")])


def no_validation(out):
    return Case(Net(), loader(), None, {"max_epochs": 3})


# --- data -------------------------------------------------------------------------------------


def weighted(out):
    """A sampler with a generator of its own, none of the loader's."""
    weights = torch.arange(1.0, 65.0)
    g = torch.Generator().manual_seed(3)
    sampler = WeightedRandomSampler(weights, 64, generator=g)
    return Case(Net(), loader(shuffle=False, sampler=sampler), val(), {"max_epochs": 3})


def generator(out):
    """The loader's own generator serves the shuffle; it must go on, epoch after epoch."""
    g = torch.Generator().manual_seed(3)
    return Case(Net(), loader(generator=g), val(), {"max_epochs": 3})


def replacement(out):
    """Indices drawn bit by bit from a generator during the epoch."""
    g = torch.Generator().manual_seed(3)
    data = samples()
    sampler = RandomSampler(data, replacement=True, num_samples=80, generator=g)
    return Case(Net(), loader(shuffle=False, sampler=sampler), val(), {"max_epochs": 3})


class Shuffled(Sampler):
    """A batch sampler with numpy's own generator and batches of changing size."""

    def __init__(self, count: int) -> None:
        self.count, self.numbers = count, np.random.default_rng(4)

    def __iter__(self):
        order = self.numbers.permutation(self.count).tolist()
        for start in range(0, self.count - 7, 8):
            yield order[start : start + (8 if start % 16 else 6)]

    def __len__(self) -> int:
        return self.count // 8


def batch_sampler(out):
    train = DataLoader(samples(), batch_sampler=Shuffled(64))
    return Case(Net(), train, val(), {"max_epochs": 3})


class Erratic(Sampler):
    """Draws from python's random numbers between batches: nothing can repeat that."""

    def __iter__(self):
        left = list(range(64))
        while left:
            yield left.pop(random.randrange(len(left)))

    def __len__(self) -> int:
        return 64


def erratic(out):
    class Draws(Net):
        def training_step(self, batch, batch_idx):
            random.random()
            return super().training_step(batch, batch_idx)

    return Case(Draws(), loader(shuffle=False, sampler=Erratic()), val())


def same_loader(out):
    """What it is trained with is what it is validated with, and what a callback looks at."""

    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx % 4 == 2:
                with torch.no_grad():
                    for x, _ in trainer.train_dataloader:
                        pl_module.net(x)

    both = loader()
    return Case(Net(), both, both, {"val_check_interval": 3, "max_epochs": 3}, [Looks()])


def shared_generator(out):
    """PyTorch's recipe for reproducible loaders, with the one generator for both."""
    g = torch.Generator().manual_seed(3)
    validated = loader(32, batch_size=16, generator=g)
    options = {"val_check_interval": 3, "max_epochs": 3}
    return Case(Net(), loader(generator=g), validated, options)


def unbatched(out):
    """``batch_size=None``: the dataset makes the batches."""

    class Batches(Dataset):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index):
            return samples(64)[index * 8 : index * 8 + 8]

    train = DataLoader(Batches(), batch_size=None, shuffle=True)
    return Case(Net(), train, val(), {"max_epochs": 3})


class Noisy(Dataset):
    """Augments with every generator there is, and with one of its own."""

    def __init__(self, own: bool = True) -> None:
        self.data = samples()
        self.own = np.random.default_rng(8) if own else None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        own = self.own.normal() if self.own is not None else 0.0
        noise = np.random.rand() + random.random() + own
        return x + 0.1 * torch.rand(WIDTH) + float(noise) * 0.1, y


def augmented(out):
    return Case(Net(), DataLoader(Noisy(), batch_size=8, shuffle=True), val())


def augmented_workers(out):
    options = {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 3}
    train = DataLoader(Noisy(own=False), batch_size=8, shuffle=True, **options)
    return Case(Net(), train, val(), {"max_epochs": 3})


def workers(out):
    return Case(Net(), loader(num_workers=2), val(), {"max_epochs": 3})


class Dictionary(Net):
    def training_step(self, batch, batch_idx):
        losses = [self.loss(part) for part in batch.values() if part is not None]
        return torch.stack(losses).sum()


def combined(mode: str) -> Case:
    loaders = {"a": loader(64), "b": loader(40, batch_size=16)}
    return Case(Dictionary(), CombinedLoader(loaders, mode), val(), {"max_epochs": 3})


def max_size_cycle(out):
    return combined("max_size_cycle")


def min_size(out):
    return combined("min_size")


def max_size(out):
    return combined("max_size")


class Stream(IterableDataset):
    """Batches without a length."""

    def __init__(self, count: int = 9) -> None:
        self.count = count
        self.loads = 0

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        first, by = (info.id, info.num_workers) if info else (0, 1)
        g = torch.Generator().manual_seed(4 + first)
        for _ in range(first, self.count * 8, by):
            x = torch.randn(WIDTH, generator=g)
            yield x, x[:1] * 2


def stream(out):
    train = DataLoader(Stream(), batch_size=8)
    return Case(Net(), train, val(), {"val_check_interval": 4, "max_epochs": 3})


def stream_workers(out):
    train = DataLoader(Stream(), batch_size=8, num_workers=2)
    return Case(Net(), train, val(), {"val_check_interval": 4})


def mixed(out):
    """One loader that can be moved on beside one that cannot."""
    loaders = {"a": DataLoader(Stream(5), batch_size=8), "b": loader(64)}
    options = {"val_check_interval": 4, "max_epochs": 3}
    return Case(Dictionary(), CombinedLoader(loaders, "max_size_cycle"), val(), options)


class StatefulStream(Stream):
    """Remembers where it is."""

    def __init__(self, count: int = 9) -> None:
        super().__init__(count)
        self.position = 0
        self.g = torch.Generator().manual_seed(4)

    def __iter__(self):
        while self.position < self.count * 8:
            self.position += 1
            x = torch.randn(WIDTH, generator=self.g)
            yield x, x[:1] * 2
        self.position = 0

    def state_dict(self):
        return {"position": self.position, "g": self.g.get_state()}

    def load_state_dict(self, state):
        self.position = state["position"]
        self.g.set_state(state["g"])


def stateful_map(out):
    from torchdata.stateful_dataloader import StatefulDataLoader

    train = StatefulDataLoader(samples(), batch_size=8, shuffle=True, num_workers=0)
    return Case(Net(), train, val(), {"max_epochs": 3})


def stateful_stream(out):
    from torchdata.stateful_dataloader import StatefulDataLoader

    train = StatefulDataLoader(StatefulStream(), batch_size=8, num_workers=0)
    return Case(Net(), train, val(), {"val_check_interval": 4, "max_epochs": 3})


def stateful_workers(out):
    from torchdata.stateful_dataloader import StatefulDataLoader

    train = StatefulDataLoader(samples(), batch_size=8, shuffle=True, num_workers=2)
    return Case(Net(), train, val(), {"max_epochs": 2})


def loader_iter(out):
    class Fetches(Net):
        def training_step(self, dataloader_iter):
            batch, index, _ = next(dataloader_iter)
            self.log("index", float(index), batch_size=8)
            return self.loss(batch)

    return Case(Fetches(), loader(), val(), {"max_epochs": 3})


# --- callbacks that write weights -------------------------------------------------------------


def ema(out):
    average = EMAWeightAveraging(decay=0.9, update_every_n_steps=2)
    return Case(Net(), loader(), val(), {"max_epochs": 3}, [average])


def averaging(out):
    class Each(WeightAveraging):
        def should_update(self, step_idx=None, epoch_idx=None):
            return epoch_idx is not None

    return Case(Net(), loader(), val(), {"max_epochs": 3}, [Each()])


def swa(out):
    class PerEpoch(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    callback = StochasticWeightAveraging(0.05, swa_epoch_start=2, annealing_epochs=2)
    return Case(PerEpoch(), loader(), val(), {"max_epochs": 5}, [callback])


class Sam(Net):
    """Sharpness-aware minimization: climbs through ``.data``, then steps from there."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        climbed = []
        for parameter in self.net.parameters():
            step = 0.05 * parameter.grad.sign()
            parameter.data.add_(step)
            climbed.append((parameter, step))
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        for parameter, step in climbed:
            parameter.data.sub_(step)
        optimizer.step()
        optimizer.zero_grad()
        return loss


def sam(out):
    return Case(Sam(), loader(), val())


def clipping(out):
    class Clips(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            for parameter in pl_module.net[0].parameters():
                parameter.data.clamp_(-0.3, 0.3)

        def on_train_epoch_end(self, trainer, pl_module):
            pl_module.net[4].weight.data.mul_(0.9)

    return Case(Net(), loader(), val(), {"max_epochs": 3}, [Clips()])


def early_writer(out):
    """Writes through ``.data`` while a copy could still be under way, which leaves no trace."""

    class Decays(Net):
        def __init__(self) -> None:
            super().__init__()
            many = 1 << 15
            self.net = nn.Sequential(nn.Linear(WIDTH, many), nn.ReLU(), nn.Linear(many, 1))

        def on_train_batch_start(self, batch, batch_idx):
            for parameter in self.parameters():
                parameter.data.mul_(0.99)

    return Case(Decays(), loader(), val())


# --- outputs ----------------------------------------------------------------------------------


class KilledWhileSaving(pl.Callback):
    """Names the instant in the middle of a checkpoint callback's work."""

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        import inspect

        if any(frame.function == "save_checkpoint" for frame in inspect.stack()):
            faults.reach("saving", step=trainer.global_step)


def outputs(out):
    loggers = [TensorBoardLogger(out / "logs"), CSVLogger(out / "csv", flush_logs_every_n_steps=4)]
    model = Net()
    model.save_hyperparameters({"width": WIDTH})
    saves = [
        ModelCheckpoint(monitor="val_loss", save_top_k=2, save_last=True),
        ModelCheckpoint(
            out / "steps", filename="{step}", every_n_train_steps=3, save_top_k=-1, save_last="link"
        ),
    ]
    options = {"logger": loggers, "enable_checkpointing": True, "log_every_n_steps": 1}
    others: list[pl.Callback] = [*saves, LearningRateMonitor("step"), KilledWhileSaving()]
    return Case(model, loader(), val(), {**options, "max_epochs": 3}, others)


def fixed_version(out):
    loggers = [TensorBoardLogger(out, "tb", 3), CSVLogger(out, "csv", 3)]
    return Case(Net(), loader(), val(), {"logger": loggers, "log_every_n_steps": 1})


def bars(bar: pl.Callback) -> Case:
    return Case(Net(), loader(), val(), {"enable_progress_bar": True}, [bar])


def tqdm_bar(out):
    return bars(pl.callbacks.TQDMProgressBar(refresh_rate=1))


def rich_bar(out):
    return bars(pl.callbacks.RichProgressBar(refresh_rate=1))


# --- everything else --------------------------------------------------------------------------


def changing(out):
    """An attribute that changes while it trains and is in no checkpoint."""

    class Counts(Net):
        def __init__(self) -> None:
            super().__init__()
            self.counted = 0
            self._history = []

        def training_step(self, batch, batch_idx):
            self.counted += 1
            self._history.append(batch_idx)
            return super().training_step(batch, batch_idx)

    return Case(Counts(), loader(), val())


def unsaved(out):
    """What comes back although it is in no state dict."""

    class Unsaved(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(WIDTH), persistent=False)
            self.net[4].requires_grad_(False)

        def on_fit_start(self):
            self.random = torch.Generator().manual_seed(4)
            self.others = np.random.default_rng(5)

        def loss(self, batch):
            x, y = batch
            if self.training:
                self.mean.lerp_(x.mean(0), 0.1)
                x = x - self.mean + torch.randn(x.shape, generator=self.random)
                x = x * float(self.others.random())
            return super().loss((x, y))

        def on_train_batch_start(self, batch, batch_idx):
            if self.global_step == 7:
                self.net[4].requires_grad_(True)
                self.net[3].eval()

    return Case(Unsaved(), loader(), val(), {"max_epochs": 3})


def wider(out):
    """`plain` with another model."""
    case = plain(out)
    case.model.net[4] = nn.Linear(HIDDEN, 1, bias=False)
    return case


def changed(out):
    """`plain` with other hyperparameters, optimizer and data."""

    class Changed(Net):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    model = Changed()
    model.save_hyperparameters({"width": 3})
    return Case(model, loader(64, batch_size=4), val())


def shorter(out):
    """`plain` with one epoch."""
    return Case(Net(), loader(), val(), {"max_epochs": 1})


def without_batches(out):
    """`plain` with none."""
    return Case(Net(), loader(), val(), {"limit_train_batches": 0})


def subtly_changed(out):
    """`plain` with another layer, schedule and precision, and other arguments of the trainer."""

    class Changed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net[2] = nn.GELU()

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.7)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    options = {"precision": "bf16-mixed", "gradient_clip_val": 0.5, "limit_train_batches": 7}
    return Case(Changed(), loader(), val(), {**options, "accumulate_grad_batches": 2})


def faster(out):
    """`plain` with another learning rate."""

    class Faster(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=2e-2)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.8)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    return Case(Faster(), loader(), val())


def groups(out, decay=0.1):
    """Two groups with settings of their own, and a scheduler that changes one from the start."""

    class Groups(Net):
        def configure_optimizers(self):
            first, second = self.net[:2], self.net[2:]
            optimizer = torch.optim.AdamW(
                [
                    {"params": first.parameters(), "lr": 3e-3},
                    {"params": second.parameters(), "weight_decay": decay},
                ],
                lr=1e-2,
            )
            warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=6)
            return [optimizer], [{"scheduler": warm_up, "interval": "step"}]

    return Case(Groups(), loader(), val())


def groups_changed(out):
    """`groups` with another weight decay in the second."""
    return groups(out, decay=0.2)


def regrouped(out):
    """`plain` with its parameters in two groups."""

    class Regrouped(Net):
        def configure_optimizers(self):
            parts = (self.net[:2], self.net[2:])
            return torch.optim.AdamW([{"params": part.parameters()} for part in parts])

    return Case(Regrouped(), loader(), val())


def named_checkpoint(out):
    """``fit(ckpt_path=…)``, of a checkpoint made by `plain` after its second step."""
    return Case(Net(), loader(), val(), fit={"ckpt_path": str(out / "start.ckpt")})


def several(out):
    """Three trainings in one process, the last two by the same Trainer's settings."""
    for seed in (1, 2, 3):
        pl.seed_everything(seed, verbose=False)
        yield Case(Net(), loader(), val())


def fails(out):
    class Fails(Net):
        def training_step(self, batch, batch_idx):
            if self.global_step == 5 and not (out / "failed").exists():
                (out / "failed").touch()
                raise ValueError("the user's own mistake")
            return super().training_step(batch, batch_idx)

    return Case(Fails(), loader(), val())


def interrupted(out):
    class Interrupted(Net):
        def training_step(self, batch, batch_idx):
            if self.global_step == 5:
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    return Case(Interrupted(), loader(), val())


def slow(out):
    class Slow(Net):
        def training_step(self, batch, batch_idx):
            time.sleep(0.02)
            return super().training_step(batch, batch_idx)

    return Case(Slow(), loader(), val(), {"max_epochs": 4})


def wandb_offline(out):
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(save_dir=out, offline=True)
    return Case(Net(), loader(), val(), {"logger": logger, "log_every_n_steps": 1})


def untouched(out):
    """Everything a Trainer does besides fitting, and a second fit of the same Trainer."""
    model = Net()
    model.test_step = model.validation_step

    def after(trainer: pl.Trainer) -> None:
        trainer.validate(model, val(), verbose=False)
        trainer.test(model, val(), verbose=False)
        trainer.fit_loop.max_epochs = 4
        trainer.fit(model, loader(), val())

    return Case(model, loader(), val(), after=after)


def barebones(out):
    options = {"logger": None, "enable_checkpointing": None, "enable_model_summary": None}
    options |= {"barebones": True, "num_sanity_val_steps": None, "enable_progress_bar": None}
    return Case(Net(), loader(), val(), options)


def fast_dev_run(out):
    return Case(Net(), loader(), val(), {"fast_dev_run": 3, "val_check_interval": 1.0})


def twice(out):
    from lightning_mnemo import MnemoCallback

    return Case(Net(), loader(), val(), callbacks=[MnemoCallback()])


def sharded(out):
    from lightning.pytorch.strategies import ModelParallelStrategy

    return Case(Net(), loader(), val(), {"strategy": ModelParallelStrategy()})


# --- Slurm ------------------------------------------------------------------------------------


class Signals(pl.Callback):
    """The scheduler: sends a signal after step 6, once."""

    def __init__(self, out: Path, number: signal.Signals) -> None:
        self._sent, self._number = out / "signal-sent", number

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 6 and not self._sent.exists():
            self._sent.touch()
            os.kill(os.getpid(), self._number)


def slurm(out: Path, number: signal.Signals, **options: Any) -> Case:
    environment = {"plugins": [SLURMEnvironment(**options)]} if options else {}
    return Case(Net(), loader(), val(), environment, [Signals(out, number)])


def slurm_usr1(out):
    return slurm(out, signal.SIGUSR1)


def slurm_term(out):
    return slurm(out, signal.SIGTERM)


def slurm_usr1_not_requeued(out):
    return slurm(out, signal.SIGUSR1, auto_requeue=False)


def slurm_requeues_at_term(out):
    return slurm(out, signal.SIGTERM, requeue_signal=signal.SIGTERM)


# --- files that Lightning finds by itself -----------------------------------------------------


def on_exception(out):
    """Fails in step 7, once; Lightning then saves a checkpoint, which the next fit looks for."""
    case = plain(out)
    case.callbacks += [FailsOnce(out), OnExceptionCheckpoint(out)]
    case.trainer["enable_checkpointing"] = True
    return case


class FailsOnce(pl.Callback):
    def __init__(self, out: Path) -> None:
        self._failed = out / "failed"

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 6 and not self._failed.exists():
            self._failed.touch()
            raise RuntimeError("a mistake of the user's")
