from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from fedlora.data.datamodule import FederatedDataModule
from fedlora.modules.classifier import CLIPLoRAClassifier
from fedlora.modules.metrics import Scores, compute_metrics, make_metrics, update_metrics

NAMES = ["macro_f1", "balanced_acc", "auroc", "per_class"]


@pytest.fixture(scope="module")
def data() -> FederatedDataModule:
    return FederatedDataModule(num_clients=3, eval_batch_size=9)


def make_trainer(folder: Path, batches: int) -> Trainer:
    return Trainer(
        max_epochs=1,
        limit_train_batches=1,
        limit_val_batches=batches,
        limit_test_batches=batches,
        num_sanity_val_steps=1,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@torch.no_grad()
def at_once(module: Any, loader: Any, batches: int) -> Scores:
    """The figures of the first batches, from one forward pass over all of their rows."""
    taken = [batch for batch, _ in zip(loader, range(batches), strict=False)]
    whole = {name: torch.cat([batch[name] for batch in taken]) for name in taken[0]}
    metrics = make_metrics(10, NAMES)
    update_metrics(metrics, module.eval().validation_step(whole))
    return compute_metrics(metrics, NAMES)


def test_figures_of_an_epoch_are_no_means_over_batches(
    folder: Path, data: FederatedDataModule, tmp_path: Path
) -> None:
    module, trainer = CLIPLoRAClassifier(str(folder), metrics=NAMES), make_trainer(tmp_path, 5)
    trainer.fit(module, datamodule=data)
    expected = at_once(module, data.val_dataloader(), 5).values
    assert expected["auroc"] is not None
    fitted = {name: float(value) for name, value in trainer.callback_metrics.items()}
    named = {f"val/{name}": value for name, value in expected.items()}
    assert {name: fitted[name] for name in fitted if name in named} == pytest.approx(
        named, rel=1e-4
    )
    assert set(fitted) == {"train/loss", *named}
    expected = at_once(module, data.test_dataloader(), 5).values
    (test,) = trainer.test(module, datamodule=data, verbose=False)
    assert test == pytest.approx({f"test/{k}": v for k, v in expected.items()}, rel=1e-4)


def test_what_is_not_defined_is_left_out(
    folder: Path, data: FederatedDataModule, tmp_path: Path
) -> None:
    module = CLIPLoRAClassifier(str(folder), metrics=["auroc", "macro_f1"])
    trainer = make_trainer(tmp_path, 1)
    trainer.validate(module, datamodule=data, verbose=False)
    data = FederatedDataModule(num_clients=3, eval_batch_size=1)
    (found,) = trainer.validate(module, datamodule=data, verbose=False)  # one row, so one class
    assert set(found) == {"val/acc", "val/loss", "val/macro_f1"}
