"""Fingerprints of what should be the same when a run is resumed."""

from __future__ import annotations

import lightning.pytorch as pl

from mnemo.session.fingerprints import (
    data_fingerprint,
    fingerprint,
    group_fingerprints,
    lasting_words,
    optimizer_fingerprint,
    scheduler_fingerprint,
    script_fingerprint,
    structure_fingerprint,
)

_ARGUMENTS = (
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
)
"""Of a trainer; how long it trains may well change from start to start."""


def fingerprints(trainer: pl.Trainer) -> dict[str, str]:
    """When training begins, by the words in which a change is reported."""
    found = {
        "optimizer": optimizer_fingerprint(trainer.optimizers),
        "hyperparameters": fingerprint(lasting_words(dict(trainer.lightning_module.hparams))),
        "script": script_fingerprint(),
    }
    loader = trainer.fit_loop._combined_loader
    # Loaders that are made anew may be other ones on purpose.
    reloads: int = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
    if loader is not None and not reloads:
        found["data"] = data_fingerprint(loader.flattened)
    return found


def as_built(trainer: pl.Trainer) -> dict[str, str]:
    """Of the model and the trainer's arguments, before anything is restored."""
    arguments = {name: lasting_words(getattr(trainer, name)) for name in _ARGUMENTS}
    return {
        "model": structure_fingerprint(trainer.lightning_module),
        **{name: fingerprint(words) for name, words in arguments.items()},
    }


def as_configured(trainer: pl.Trainer) -> dict[str, str]:
    """Of the optimizers' groups and of the schedulers, which a resume and training write into."""
    configs = trainer.strategy.lr_scheduler_configs
    schedules = [(c.interval, c.frequency, c.monitor) for c in configs]
    schedulers = scheduler_fingerprint(c.scheduler for c in configs)
    return {
        **group_fingerprints(trainer.optimizers),
        "scheduler": fingerprint(repr((schedulers, schedules))),
    }
