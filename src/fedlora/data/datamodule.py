"""The data of a federation: who holds what, and batches of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from fedlora.data.batches import Batch, EpochSampler, LabelledRows
from fedlora.data.cache import MemoryPictures, Pictures
from fedlora.data.digits import Digits
from fedlora.data.division import Division, divide
from fedlora.data.partition import Rows, check_num_partitions
from fedlora.data.preprocess import ImagePreprocess
from fedlora.data.sources import ImageSource
from fedlora.sampling import derive_seed
from fedlora.state import Client, Round

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner


@dataclass(frozen=True, eq=False)
class _Ready:
    """What setup() leaves behind."""

    images: Pictures
    labels: Tensor
    division: Division

    def rows(self, rows: Rows) -> LabelledRows:
        return LabelledRows(self.images, self.labels, torch.from_numpy(rows))


class FederatedDataModule(LightningDataModule):
    """Pictures divided among clients, with a validation and a test split at the server.

    A batch is ``{"image": uint8 (n, 3, size, size), "label": int64 (n,), "index": int64 (n,)}``
    on the CPU; ``index`` is the row in the source. Pictures are resized once, in :meth:`setup`;
    ``preprocess.normalise`` is left to the model, on its device.

    Args:
        source: where the pictures come from; None for ``Digits()``.
        partitioner: who gets which, any of ``flwr_datasets.partitioner`` that divides rows; never
            changed. None for Dirichlet label skew with alpha 0.3.
        num_clients: clients; the partitioner's ``num_partitions`` must be the same.
        batch_size: rows in a training batch; the last one of an epoch may be smaller.
        eval_batch_size: rows in any other batch.
        val_fraction: part of the training rows that the server keeps for validation, taken
            before they are divided among the clients.
        client_val_fraction: part of each client's rows that it validates on; 0 turns it off.
            Clients with few rows may have no such part.
        seed: of splits, of the default partitioner and, with the round's seed, of the batches.
            A given partitioner has a seed of its own.

    Attributes:
        preprocess: size and scaling of the pictures; while None, :meth:`setup` takes that of
            ``trainer.lightning_module``.

    Raises:
        ValueError: if a number is out of range or the partitioner makes another number of clients.
    """

    def __init__(
        self,
        source: ImageSource | None = None,
        partitioner: Partitioner | None = None,
        num_clients: int = 10,
        batch_size: int = 32,
        eval_batch_size: int = 256,
        val_fraction: float = 0.1,
        client_val_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {
            "num_clients": (num_clients, 1),
            "batch_size": (batch_size, 1),
            "eval_batch_size": (eval_batch_size, 1),
            "seed": (seed, 0),
        }
        for name, (value, least) in sizes.items():
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        fractions = {"val_fraction": val_fraction, "client_val_fraction": client_val_fraction}
        for name, fraction in fractions.items():
            if not 0 <= fraction < 1:
                raise ValueError(f"{name} must be at least 0 and less than 1, got {fraction}.")
        if partitioner is not None:
            # The public property needs the data for some partitioners; setup() asks it again.
            declared = getattr(partitioner, "_num_partitions", None)
            check_num_partitions(partitioner, num_clients, declared)
        self.preprocess: ImagePreprocess | None = None
        self.source = Digits() if source is None else source
        self.partitioner = partitioner
        self.num_clients = num_clients
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_fraction = val_fraction
        self.client_val_fraction = client_val_fraction
        self.seed = seed
        self._state: _Ready | None = None

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of the labels; valid after :meth:`prepare_data`."""
        return self.source.class_names

    @property
    def templates(self) -> list[str]:
        """Prompt templates with one ``{}`` each."""
        return self.source.templates

    @property
    def num_classes(self) -> int:
        """The number of classes; valid after :meth:`prepare_data`."""
        return len(self.class_names)

    def prepare_data(self) -> None:
        """Fetch or check the data; runs once per machine."""
        self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Divide the rows and resize the pictures; does nothing that was done before.

        Raises:
            ValueError: if there is no ``preprocess``, or the rows cannot be divided as asked.
        """
        preprocess = self._find_preprocess()
        if self._state is not None and self._state.images.preprocess == preprocess:
            return
        table = self.source.load()
        if len(table) and not 0 <= table.labels.min() <= table.labels.max() < self.num_classes:
            raise ValueError(
                f"labels must be between 0 and {self.num_classes - 1} (there are "
                f"{self.num_classes} class names), got {table.labels.min()} to "
                f"{table.labels.max()}. Give one class name per label."
            )
        division = divide(
            table,
            num_clients=self.num_clients,
            partitioner=self.partitioner,
            val_fraction=self.val_fraction,
            client_val_fraction=self.client_val_fraction,
            seed=self.seed,
        )
        images = MemoryPictures(self.source, len(table), preprocess)
        self._state = _Ready(images, torch.from_numpy(table.labels), division)

    def clients(self) -> list[Client]:
        """Every client of the federation, by id; after :meth:`setup`."""
        division = self._ready.division
        return [
            Client(id=i, num_samples=len(rows), name=name)
            for i, (rows, name) in enumerate(zip(division.train, division.names, strict=True))
        ]

    def num_batches(self, client: Client) -> int:
        """Batches in one local epoch of a client."""
        return -(-len(self._ready.division.train[client.id]) // self.batch_size)

    def client_batches(self, client: Client, rnd: Round, epoch: int) -> Iterator[Batch]:
        """A client's training batches, in an order of this epoch's own.

        Args:
            client: whose.
            rnd: the round; its seed and its idx count.
            epoch: the local epoch, from 0.

        Returns:
            Each row once, in :meth:`num_batches` batches; the same ones for the same arguments.
        """
        seed = derive_seed(self.seed, rnd.seed, "batches", rnd.idx, client.id, epoch)
        rows = self._ready.rows(self._ready.division.train[client.id])
        return rows.batches(self.batch_size, seed)

    def client_val_batches(self, client: Client) -> Iterator[Batch]:
        """A client's validation batches, always in the same order; none if it has no such rows."""
        rows = self._ready.rows(self._ready.division.client_val[client.id])
        return rows.batches(self.eval_batch_size)

    def train_dataloader(self) -> DataLoader[Batch]:
        """The training rows of all clients in one pool, in a new order each epoch."""
        rows = self._ready.rows(np.concatenate(self._ready.division.train))
        return rows.loader(self.batch_size, EpochSampler(len(rows), self.seed))

    def val_dataloader(self) -> DataLoader[Batch]:
        """The server's validation rows, each once."""
        return self._ready.rows(self._ready.division.val).loader(self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test rows, each once."""
        return self._ready.rows(self._ready.division.test).loader(self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The test rows, each once."""
        return self.test_dataloader()

    @property
    def _ready(self) -> _Ready:
        if self._state is None:
            raise RuntimeError("The data is not there yet. Call prepare_data() and setup() first.")
        return self._state

    def _find_preprocess(self) -> ImagePreprocess:
        module = getattr(self.trainer, "lightning_module", None)
        found = self.preprocess or getattr(module, "preprocess", None)
        if not isinstance(found, ImagePreprocess):
            raise ValueError(
                f"preprocess must be an ImagePreprocess, got {found}: it comes with the model. Let "
                "a trainer call setup(), or set datamodule.preprocess before."
            )
        return found
