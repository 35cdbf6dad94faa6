"""Fingerprints of what should be the same when a run is resumed."""

from __future__ import annotations

import lightning.pytorch as pl

from mnemo.session.identity import data_fingerprint, fingerprint, script_fingerprint


def fingerprints(trainer: pl.Trainer) -> dict[str, str]:
    """By the words in which a change is reported."""
    found = {
        "optimizer": _optimizers(trainer),
        "hyperparameters": fingerprint(
            repr(sorted(dict(trainer.lightning_module.hparams).items(), key=str))
        ),
        "script": script_fingerprint(),
    }
    loader = trainer.fit_loop._combined_loader
    # Loaders that are made anew may be other ones on purpose.
    reloads: int = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
    if loader is not None and not reloads:
        found["data"] = data_fingerprint(loader.flattened)
    return found


def _optimizers(trainer: pl.Trainer) -> str:
    """Only the first group of each optimizer: unfreezing adds groups while training."""
    described = [
        (type(o).__qualname__, [len(g["params"]) for g in o.param_groups[:1]])
        for o in trainer.optimizers
    ]
    return fingerprint(repr(described))
