"""The data of a federation: who holds what, and batches of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from fedlora.data.augment import Augmentation
from fedlora.data.batches import Batch, EpochSampler
from fedlora.data.cache.base import Pictures
from fedlora.data.cache.disk import open_pictures
from fedlora.data.checks import check_labels, check_pictures, check_settings
from fedlora.data.division import Division, Mask, divide
from fedlora.data.holdings import Holdings, cache_folder
from fedlora.data.partition import check_num_partitions
from fedlora.data.preprocess import ImagePreprocess
from fedlora.data.sources.base import ImageSource, ImageTable
from fedlora.data.sources.digits import Digits
from fedlora.errors import FedloraError
from fedlora.sampling import derive_seed
from fedlora.state import Client, Round

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner


class FederatedDataModule(LightningDataModule):
    """Pictures divided among clients, with a validation and a test split at the server.

    A batch is ``{"image": uint8 (n, 3, size, size), "label": int64 (n,), "index": int64 (n,)}``
    on the CPU; ``index`` is the row in the source. Pictures are read and resized once, in
    :meth:`setup`; ``preprocess.normalise`` is left to the model, on its device.

    Args:
        source: where the pictures come from; None for ``Digits()``.
        partitioner: who gets which, any of ``flwr_datasets.partitioner`` that divides rows; never
            changed. None: one client per site where the source has sites, else Dirichlet label
            skew with alpha 0.3.
        num_clients: clients, the partitioner's ``num_partitions``; None: one per site, else 10.
        batch_size: rows in a training batch; the last one of an epoch may be smaller.
        eval_batch_size: rows in any other batch.
        test_fraction: part of each site's and class's rows that becomes the test split, where the
            source has none and nothing is held out. Which rows depends on their names alone.
        val_fraction: part of the training rows, of each site and class, that the server keeps for
            validation, taken before they are divided among the clients; without effect where the
            source has a validation split.
        client_val_fraction: part of each client's rows that it validates on; 0 turns it off.
            Clients with few rows may have no such part.
        client_test_fraction: part of each client's rows that it tests on, taken out of its training
            rows before its validation part. Where each client is a site and nothing is held out,
            the test split's rows of its site are added to it and stay in the test split too; with 0
            a client tests on these alone, elsewhere on none.
        hold_out: a site or several that are kept for testing only, or ``column=value`` of another
            column; the test split is these and nothing else then.
        n_shots: most training rows of each class that a client keeps (few-shot); None for all.
        augment: random changes of training pictures; None for none.
        on_bad_image: a picture that cannot be read ends the run (``error``), or is left out and
            listed in the run folder (``skip``).
        cache_dir: where pictures at the model's size are kept, for all runs; None for the user's
            cache folder. It may be deleted whenever no run is going on.
        cache_gb: most of that folder, in 10^9 bytes; pictures beyond are decoded when asked for.
        seed: of splits, of the default partitioner and, with the round's seed, of the batches.
            A given partitioner has a seed of its own.

    Attributes:
        preprocess: size and scaling of the pictures; while None, :meth:`setup` takes that of
            ``trainer.lightning_module``.

    Raises:
        FedloraError: if a number is out of range or the partitioner makes another number of
            clients.
    """

    def __init__(
        self,
        source: ImageSource | None = None,
        partitioner: Partitioner | None = None,
        num_clients: int | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 256,
        test_fraction: float = 0.2,
        val_fraction: float = 0.1,
        client_val_fraction: float = 0.1,
        client_test_fraction: float = 0.0,
        hold_out: str | int | list[str | int] | None = None,
        n_shots: int | None = None,
        augment: Augmentation | None = None,
        on_bad_image: Literal["error", "skip"] = "error",
        cache_dir: str | None = None,
        cache_gb: float = 20.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.preprocess: ImagePreprocess | None = None
        self.source = Digits() if source is None else source
        self.partitioner = partitioner
        self.num_clients = num_clients
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.test_fraction = test_fraction
        self.val_fraction = val_fraction
        self.client_val_fraction = client_val_fraction
        self.client_test_fraction = client_test_fraction
        given = [hold_out] if isinstance(hold_out, str | int) else hold_out or ()
        self.hold_out = [str(name) for name in given]  # a site may be called 1
        self.n_shots = n_shots
        self.augment = augment
        self.on_bad_image = on_bad_image
        self.cache_dir = cache_dir
        self.cache_gb = cache_gb
        self.seed = seed
        self._holdings: Holdings | None = None
        check_settings(vars(self))
        if partitioner is not None and num_clients is not None:
            # The public property needs the data for some partitioners; setup() asks it again.
            declared = getattr(partitioner, "_num_partitions", None)
            check_num_partitions(partitioner, num_clients, declared)

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
        """Read and resize the pictures and divide the rows; does nothing that was done before.

        Raises:
            FedloraError: if there is no ``preprocess``, a picture cannot be read (with
                ``on_bad_image="error"``), or the rows cannot be divided as asked.
        """
        preprocess = self._find_preprocess()
        if self._holdings is not None and self._holdings.images.preprocess == preprocess:
            return
        table = self._load()
        images = self._open(table, preprocess)
        self._holdings = Holdings(images, table, self._divide(table, images))

    def divide(self) -> tuple[ImageTable, Division]:
        """Who gets what, after :meth:`prepare_data`.

        Reads no pictures, except with ``on_bad_image="skip"``, where it needs ``preprocess``.
        """
        table = self._load()
        if self.on_bad_image == "skip":
            return table, self._divide(table, self._open(table, self._find_preprocess()))
        return table, self._divide(table, None)

    def _load(self) -> ImageTable:
        table = self.source.load()
        check_labels(table, self.num_classes)
        return table

    def _open(self, table: ImageTable, preprocess: ImagePreprocess) -> Pictures:
        images = open_pictures(
            self.source,
            table,
            preprocess,
            folder=cache_folder(self.cache_dir),
            limit_gb=self.cache_gb,
            reporter=getattr(self.trainer, "progress", None),
        )
        check_pictures(table, images, self.on_bad_image)
        return images

    def _divide(self, table: ImageTable, images: Pictures | None) -> Division:
        usable: Mask = np.ones(len(table), dtype=np.bool_)
        usable[list(images.bad if images else ())] = False
        return divide(
            table,
            num_clients=self.num_clients,
            partitioner=self.partitioner,
            test_fraction=self.test_fraction,
            val_fraction=self.val_fraction,
            client_val_fraction=self.client_val_fraction,
            client_test_fraction=self.client_test_fraction,
            hold_out=self.hold_out,
            n_shots=self.n_shots,
            seed=self.seed,
            usable=usable,
            class_names=self.class_names,
        )

    @property
    def holdings(self) -> Holdings:
        """Pictures, rows and who has them; after :meth:`setup`."""
        if self._holdings is None:
            raise RuntimeError("The data is not there yet. Call prepare_data() and setup() first.")
        return self._holdings

    def clients(self) -> list[Client]:
        """Every client of the federation, by id; after :meth:`setup`."""
        return self.holdings.clients()

    def class_counts(self) -> list[int]:
        """Training rows of each class, of all clients together; after :meth:`setup`."""
        return self.holdings.class_counts(self.num_classes)

    def keys(self, index: Tensor) -> list[str]:
        """What the source calls some rows, for a batch's ``index`` (n,); after :meth:`setup`."""
        return self.holdings.keys(index)

    def num_batches(self, client: Client) -> int:
        """Batches in one local epoch of a client."""
        return -(-len(self.holdings.division.train[client.id]) // self.batch_size)

    def client_batches(self, client: Client, rnd: Round, epoch: int) -> Iterator[Batch]:
        """A client's training batches, in an order of this epoch's own.

        Args:
            client: whose.
            rnd: the round; its seed and its idx count.
            epoch: the local epoch, from 0.

        Returns:
            Each row once, in :meth:`num_batches` batches; the same ones for the same arguments.
        """
        order, changes = (
            derive_seed(self.seed, rnd.seed, what, rnd.idx, client.id, epoch)
            for what in ("batches", "augment")
        )
        train = self.holdings.division.train[client.id]
        return self.holdings.rows(train, self.augment, changes).batches(self.batch_size, order)

    def client_rows(self, client: Client) -> Iterator[Batch]:
        """A client's training rows as they are, always in the same batches and order."""
        rows = self.holdings.rows(self.holdings.division.train[client.id])
        return rows.batches(self.eval_batch_size)

    def client_val_batches(self, client: Client) -> Iterator[Batch]:
        """A client's validation batches, always in the same order; none if it has no such rows."""
        rows = self.holdings.rows(self.holdings.division.client_val[client.id])
        return rows.batches(self.eval_batch_size)

    def client_test_batches(self, client: Client) -> Iterator[Batch]:
        """A client's test batches, always in the same order; none if it has no such rows."""
        rows = self.holdings.rows(self.holdings.division.client_test[client.id])
        return rows.batches(self.eval_batch_size)

    def num_client_val(self, client: Client) -> int:
        """Validation rows of a client."""
        return len(self.holdings.division.client_val[client.id])

    def num_client_test(self, client: Client) -> int:
        """Test rows of a client."""
        return len(self.holdings.division.client_test[client.id])

    def train_dataloader(self) -> DataLoader[Batch]:
        """The training rows of all clients in one pool, in a new order each epoch."""
        pool = np.concatenate(self.holdings.division.train)
        rows = self.holdings.rows(pool, self.augment, derive_seed(self.seed, "augment"))
        return rows.loader(self.batch_size, EpochSampler(len(rows), self.seed))

    def val_dataloader(self) -> DataLoader[Batch]:
        """The server's validation rows, each once."""
        return self.holdings.rows(self.holdings.division.val).loader(self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test rows, each once."""
        return self.holdings.rows(self.holdings.division.test).loader(self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The test rows, each once."""
        return self.test_dataloader()

    def _find_preprocess(self) -> ImagePreprocess:
        module = getattr(self.trainer, "lightning_module", None)
        found = self.preprocess or getattr(module, "preprocess", None)
        if not isinstance(found, ImagePreprocess):
            raise FedloraError(
                f"preprocess must be an ImagePreprocess, got {found}: it comes with the model. Let "
                "a trainer call setup(), or set datamodule.preprocess before."
            )
        return found
