"""Small runs on the embedded model, and what two of them are compared by."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedlora import (
    AdapterAveraging,
    CLIPLoRAClassifier,
    FederatedDataModule,
    FederatedTrainer,
    LoRAConfig,
)
from fedlora.aggregation import Aggregator
from fedlora.callbacks.base import FederatedCallback
from fedlora.checkpoint import load
from fedlora.data import Digits
from fedlora.personal import ClientStore
from fedlora.run_folder import RunFolder

# Little of everything: for tests of what happens, not of how good it gets.
QUICK = {
    "source": Digits(test_fraction=0.02),
    "batch_size": 8,
    "val_fraction": 0.02,
    "client_val_fraction": 0.02,
}


class Killed(BaseException):
    """Stands for a kill inside this process: nothing catches it."""


class KillAtClient(FederatedCallback):
    def __init__(self, n: int) -> None:
        self.left = n

    def on_client_end(self, *args: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


def make_model(**settings: Any) -> CLIPLoRAClassifier:
    settings = {"lora": LoRAConfig(r=4, lora_alpha=8), "head_lr": 1e-2} | settings
    settings = {"optimizer": partial(torch.optim.AdamW, lr=2e-3)} | settings
    return CLIPLoRAClassifier(**settings)


def make_data(**settings: Any) -> FederatedDataModule:
    # Small parts to evaluate on: that is half of what a small run takes.
    small = {"test_fraction": 0.05, "val_fraction": 0.05, "client_val_fraction": 0.05}
    return FederatedDataModule(**({"num_clients": 3} | small | settings))


def make_trainer(
    root: Path, rule: Aggregator | None = None, averaging: Any = None, **settings: Any
) -> FederatedTrainer:
    defaults = {
        "max_rounds": 3,
        "limit_train_batches": 2,
        "logger": False,
        "progress": "off",
        "threads": 1,
        "accelerator": "cpu",
    }
    return FederatedTrainer(
        averaging=averaging or AdapterAveraging(rule),
        default_root_dir=str(root),
        **(defaults | settings),
    )


def fit(
    root: Path,
    rule: Aggregator | None = None,
    *,
    ckpt_path: str | None = None,
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    **settings: Any,
) -> FederatedTrainer:
    trainer = make_trainer(root, rule, **settings)
    trainer.fit(make_model(**(model or {})), make_data(**(data or {})), ckpt_path=ckpt_path)
    return trainer


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def fingerprint(folder: Path) -> dict[str, Any]:
    """All that must be equal to the bit: adapter, residual, client states, tables, files."""
    run = RunFolder(folder)
    server = load(run.checkpoint("last")).server
    found: dict[str, Any] = dict(server.adapter.tensors())
    for name, residual in server.adapter.residual.items():
        found[f"residual/{name}"] = residual.dense()
    store = ClientStore(run.clients)
    for client, version in server.versions.items():
        for name, tensor in store.read(client, server.versions).tensors():
            found[f"client {client} at {version}/{name}"] = tensor
    found["history"] = [{k: v for k, v in row.items() if "time" not in k} for row in server.history]
    for path, timing in ((run.metrics, "time/round_s"), (run.clients_csv, "seconds")):
        found[path.name] = [{k: v for k, v in row.items() if k != timing} for row in rows(path)]
    for path in sorted(run.adapter.glob("*.safetensors")):
        found[path.name] = path.read_bytes()
    return found


def assert_same_bits(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], name
