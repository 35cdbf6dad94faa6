"""Train the GPT on any number of CPU ranks, with mnemo or without.

mnemo run --nproc-per-node=2 train.py --ranks 2 --steps 200
mnemo run --nproc-per-node=2 train.py --ranks 2 --steps 200 --strategy mnemo_ddp
python train.py --ranks 2 --steps 200 --no-mnemo
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path

import lightning as L
from data import StandardLibrary
from model import GPT
from torch import Tensor, nn

HERE = Path(__file__).parent


class LossLog(L.Callback):
    """Rank 0 appends the loss of every step to ``steps.jsonl`` and shows every tenth.

    A step that is repeated after a crash is there twice.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / "steps.jsonl"

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: object, *_: object
    ) -> None:
        """Append one line, whole, so that nothing is lost with the process."""
        assert isinstance(outputs, dict)
        loss: Tensor = outputs["loss"]
        if trainer.is_global_zero:
            line = {"step": trainer.global_step, "loss": loss.item(), "time": time.time()}
            with self.path.open("w" if trainer.global_step == 1 else "a") as file:
                file.write(json.dumps(line) + "\n")
            if trainer.global_step % 10 == 0:
                print(f"step {trainer.global_step:5d}  loss {loss.item():.4f}", flush=True)


def sha256(module: nn.Module) -> str:
    """Hash the names and the bytes of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    """Train, then write ``result.json``: loss of every step and hash of all parameters."""
    parser = argparse.ArgumentParser(description="Train a small GPT on Python's source.")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--ranks", type=int, default=2, help="processes that train together")
    parser.add_argument("--context", type=int, default=64, help="bytes that the model sees")
    parser.add_argument("--batch-size", type=int, default=8, help="windows per rank and step")
    parser.add_argument("--layers", type=int, default=8, help="blocks of the model")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("gpt-run"), help="where results go")
    parser.add_argument(
        "--strategy",
        default="ddp",
        help="mnemo_ddp, under mnemo run: a rank that dies is replaced while the others go on",
    )
    parser.add_argument("--no-mnemo", action="store_true", help="train without fault tolerance")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    L.seed_everything(args.seed, workers=True)
    callbacks: list[L.Callback] = [LossLog(args.out)]
    if not args.no_mnemo:
        from lightning_mnemo import MnemoCallback

        callbacks.append(MnemoCallback(HERE / "mnemo.yaml"))
    trainer = L.Trainer(
        accelerator="cpu",
        strategy=args.strategy if args.ranks > 1 else "auto",
        devices=args.ranks,
        max_steps=args.steps,
        val_check_interval=20,
        limit_val_batches=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=callbacks,
    )
    model = GPT(context=args.context, layers=args.layers, steps=args.steps)
    trainer.fit(model, StandardLibrary(args.context, args.batch_size))

    if trainer.is_global_zero:
        lines = (args.out / "steps.jsonl").read_text().splitlines()
        losses = {line["step"]: line["loss"] for line in map(json.loads, lines)}
        result = {"losses": [losses[step] for step in sorted(losses)], "sha256": sha256(model)}
        (args.out / "result.json").write_text(json.dumps(result) + "\n")
        print(f"{len(losses)} steps, final loss {result['losses'][-1]:.4f}, {result['sha256']}")


if __name__ == "__main__":
    main()
