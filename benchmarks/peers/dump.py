"""Write down what a fedlora run does, so that others can do the same."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from from_config import FromConfig
from safetensors.torch import save_file
from torch import Tensor

from fedlora.callbacks.base import FederatedCallback, Row
from fedlora.data import FederatedDataModule
from fedlora.modules.classifier import CLIPLoRAClassifier
from fedlora.modules.loading import resolve
from fedlora.state import AdapterState, Client, ClientUpdate, Round
from fedlora.trainer import FederatedTrainer

from .work import IMAGES, LABELS, START, TASK, Task, norm


class Notes(FederatedCallback):
    """Notes a run's start, batches, losses and averages.

    Attributes:
        start: what the first round started from.
        weights: of each client.
        rounds: for each round and client the rows of each batch.
        losses: for each round and client the mean training loss.
        norms: of the averaged adapter after each round.
    """

    def __init__(self) -> None:
        self.start: AdapterState | None = None
        self.weights: list[float] = []
        self.rounds: list[list[list[list[int]]]] = []
        self.losses: list[list[float]] = []
        self.norms: list[float] = []

    def on_round_start(
        self,
        trainer: FederatedTrainer,
        pl_module: CLIPLoRAClassifier,
        rnd: Round,
        clients: Sequence[Client],
    ) -> None:
        if self.start is None:
            self.start = trainer.server.adapter
        self.weights = [float(client.num_samples) for client in clients]
        self.rounds.append([_rows(trainer, client, rnd) for client in clients])
        self.losses.append([])

    def on_client_end(
        self, trainer: FederatedTrainer, pl_module: CLIPLoRAClassifier, update: ClientUpdate
    ) -> None:
        self.losses[-1].append(update.metrics["loss"])

    def on_aggregate(
        self,
        trainer: FederatedTrainer,
        pl_module: CLIPLoRAClassifier,
        before: AdapterState,
        after: AdapterState,
        report: Row,
    ) -> None:
        self.norms.append(norm([tensor for _, tensor in after.tensors()]))


def _rows(trainer: FederatedTrainer, client: Client, rnd: Round) -> list[list[int]]:
    """The rows of each batch that the client will train on."""
    epochs = (trainer.datamodule.client_batches(client, rnd, e) for e in itertools.count())
    batches = itertools.chain.from_iterable(epochs)
    return [b["index"].tolist() for b in itertools.islice(batches, trainer.num_batches(client))]


def make_work(folder: Path, settings: Sequence[str], rounds: int) -> Task:
    """Write a folder of work; one that is there, of these settings and as many rounds, is kept.

    Args:
        folder: where.
        settings: of the fedlora run whose work it is: without dropout, all clients in all rounds.
        rounds: how many.

    Returns:
        What was written, tensors aside.
    """
    if (folder / TASK).exists():
        task = Task.read(folder)
        if task.settings == list(settings) and len(task.rounds) >= rounds:
            return task
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    notes = Notes()
    built = FromConfig(
        *settings,
        f"--trainer.max_rounds={rounds}",
        "--trainer.threads=1",
        f"--trainer.default_root_dir={folder / 'run'}",
    )
    built.trainer.callbacks.append(notes)
    built.fit()
    shutil.rmtree(folder / "run")
    if notes.start is None:
        raise RuntimeError("no round has started.")
    images, labels = _pictures(built.datamodule)
    np.save(folder / IMAGES, images)
    np.save(folder / LABELS, labels)
    save_file(_names(notes.start), folder / START)
    task = Task(
        model=str(resolve(built.model.model_name)),
        targets=sorted(notes.start.A),
        rank=built.model.lora_config.r,
        alpha=built.model.lora_config.lora_alpha,
        lr=built.model.configure_optimizers().param_groups[0]["lr"],
        weights=notes.weights,
        rounds=notes.rounds,
        losses=notes.losses,
        norms=notes.norms,
        settings=list(settings),
    )
    task.write(folder)
    return task


def _pictures(data: FederatedDataModule) -> tuple[np.ndarray, np.ndarray]:
    """All pictures of the source at the model's size, and their labels."""
    table = data.source.load()
    images = data.holdings.images[torch.arange(len(table))]
    return images.numpy(), table.labels.astype(np.int64)


def _names(start: AdapterState) -> dict[str, Tensor]:
    """As the parameters of the adapted tower are called."""
    return {
        **{f"vision.{name}.lora_A.default.weight": t.contiguous() for name, t in start.A.items()},
        **{f"vision.{name}.lora_B.default.weight": t.contiguous() for name, t in start.B.items()},
        "head.weight": start.other["classifier.weight"].contiguous(),
        "head.bias": start.other["classifier.bias"].contiguous(),
    }
