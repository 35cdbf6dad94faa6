"""Fingerprints of what should be the same when a run is resumed."""

from __future__ import annotations

import lightning.pytorch as pl

from mnemo.session.identity import (
    data_fingerprint,
    fingerprint,
    optimizer_fingerprint,
    script_fingerprint,
)


def fingerprints(trainer: pl.Trainer) -> dict[str, str]:
    """By the words in which a change is reported."""
    found = {
        "optimizer": optimizer_fingerprint(trainer.optimizers),
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
