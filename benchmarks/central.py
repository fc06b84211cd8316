"""The federated run of a config against the same model trained centrally with the same budget.

Central is ``lightning.Trainer`` on the pooled training rows of all clients: the same batch size and
optimizer settings, and as many epochs as a client makes in all rounds, so the same number of
samples seen.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch
from from_config import FromConfig
from lightning import Trainer, seed_everything


def federated(args: Sequence[str], seed: int, root: Path) -> dict[str, float]:
    """Test accuracy of the federated run and of the untrained model, samples and steps."""
    built = FromConfig(
        *args, f"--seed_everything={seed}", f"--trainer.default_root_dir={root}", "--quiet"
    )
    built.fit()
    trainer = built.trainer
    summary = json.loads(trainer.run.summary.read_text(encoding="utf-8"))
    clients = trainer.datamodule.clients()
    return {
        "zero-shot": summary["zero_shot"]["test/acc"],
        "federated": summary["test/acc"],
        "samples": trainer.max_rounds * trainer.local_epochs * sum(c.num_samples for c in clients),
        "steps": trainer.max_rounds * sum(trainer.num_batches(c) for c in clients),
    }


def central(args: Sequence[str], seed: int) -> dict[str, float]:
    """Test accuracy after as many epochs over the pool, samples and steps."""
    built = FromConfig(*args, f"--seed_everything={seed}")
    settings = built.trainer
    partial = settings.local_steps or settings.clients_per_round or settings.limit_train_batches
    if partial:
        raise SystemExit(
            "central.py compares whole epochs of all clients: leave out trainer.local_steps, "
            "clients_per_round and limit_train_batches."
        )
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    seed_everything(seed, verbose=False)
    trainer = Trainer(
        accelerator=settings.accelerator,
        devices=1,
        precision=settings.averaging.precision,
        max_epochs=settings.max_rounds * settings.local_epochs,
        gradient_clip_val=settings.gradient_clip_val,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(built.model, datamodule=built.datamodule)
    samples = len(built.datamodule.train_dataloader().dataset) * trainer.max_epochs
    steps = trainer.global_step
    (values,) = trainer.test(built.model, datamodule=built.datamodule, verbose=False)
    return {"central": values["test/acc"], "samples": samples, "steps": steps}


def main() -> int:
    """Train both for each seed and print what they reach."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="What else is given goes to fedlora: --trainer.max_rounds=5 …"
    )
    parser.add_argument("--config", action="append", help="default: clip_lora.yaml")
    parser.add_argument("--seeds", default="0", help="e.g. 0,1,2")
    options, rest = parser.parse_known_args()
    args = [f"--config={name}" for name in options.config or ["clip_lora.yaml"]] + rest
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    differences = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in map(int, options.seeds.split(",")):
            pooled = central(args, seed)
            ours = federated(args, seed, Path(temporary))
            if pooled["samples"] != ours["samples"]:
                raise RuntimeError(f"the budgets differ: {pooled} and {ours}")
            differences.append(100 * (pooled["central"] - ours["federated"]))
            print(
                f"seed {seed}: test accuracy zero-shot {ours['zero-shot']:.4f}, federated "
                f"{ours['federated']:.4f}, central {pooled['central']:.4f}; central minus federated"
                f" {differences[-1]:+.2f} points. Samples seen by each {ours['samples']:,}, in "
                f"{ours['steps']:,} federated and {pooled['steps']:,} central steps",
                flush=True,
            )
    if len(differences) > 1:
        print(f"central minus federated, mean: {mean(differences):+.2f} points")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
