"""What there is once the data is set up: pictures, rows, and who has which."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedlora.data.augment import Augmentation
from fedlora.data.batches import LabelledRows
from fedlora.data.cache.base import Pictures
from fedlora.data.division import Division
from fedlora.data.partition import Rows
from fedlora.data.sources.base import ImageTable
from fedlora.files import expand
from fedlora.state import Client


@dataclass(frozen=True, eq=False)
class Holdings:
    """Who holds what.

    Attributes:
        images: the pixels of every row.
        table: every row of the source.
        division: which rows are whose.
    """

    images: Pictures
    table: ImageTable
    division: Division

    def rows(self, rows: Rows, augment: Augmentation | None = None, seed: int = 0) -> LabelledRows:
        """Some rows as a data set, changed at random from the seed where there is ``augment``."""
        return LabelledRows(self.images, self._labels, torch.from_numpy(rows), augment, seed)

    @cached_property
    def _labels(self) -> Tensor:
        return torch.from_numpy(self.table.labels)

    def clients(self) -> list[Client]:
        """Every client of the federation, by id."""
        pairs = zip(self.division.train, self.division.names, strict=True)
        return [Client(id=i, num_samples=len(rows), name=n) for i, (rows, n) in enumerate(pairs)]

    def pictures(self) -> tuple[int, int]:
        """How many clients train on, and how many are in other batches, in several counted so."""
        parts = self.division
        others = (parts.val, parts.test, *parts.client_val, *parts.client_test)
        return sum(map(len, parts.train)), sum(map(len, others))

    @property
    def skipped(self) -> dict[str, str]:
        """Pictures left out: key -> why it cannot be read."""
        return {str(self.table.keys[row]): why for row, why in sorted(self.images.bad.items())}

    def keys(self, index: Tensor) -> list[str]:
        """What the source calls some rows, (n,)."""
        return [str(key) for key in self.table.keys[index.numpy(force=True)]]

    def class_counts(self, num_classes: int) -> list[int]:
        """Training rows of each class, of all clients together."""
        labels = self.table.labels[np.concatenate(self.division.train)]
        counts: list[int] = np.bincount(labels, minlength=num_classes).tolist()
        return counts

    def fingerprint(self) -> str:
        """A digest of which pictures, by key, are whose and of which class: SHA-256, hex."""
        division, part = self.division, np.full(len(self.table), -1)
        of_clients = (*division.train, *division.client_val, *division.client_test)
        # The last ones first: what the server tests on, too, counts as the server's.
        for number, rows in reversed([*enumerate((division.val, division.test, *of_clients))]):
            part[rows] = number
        digest = hashlib.sha256()
        for row in np.argsort(self.table.keys, kind="stable").tolist():
            line = f"{self.table.keys[row]}\0{self.table.labels[row]}\0{part[row]}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def summary(self) -> str:
        """One line about who has how much."""
        parts = self.division
        held = sum(map(len, parts.client_val))
        text = (
            f"{sum(map(len, parts.train)):,} to train on, {held:,} validate at the clients and "
            f"{len(parts.val):,} at the server, {len(parts.test):,} to test"
        )
        tested, shared = sum(map(len, parts.client_test)), parts.shared_test()
        text += f", {tested:,} test at the clients" if tested else ""
        text += f" ({shared:,} of them at the server, too)" if shared else ""
        text += f"; {parts.idle:,} with nobody" if parts.idle else ""
        return text + (f"; {parts.unusable:,} unreadable, left out" if parts.unusable else "")


def cache_folder(given: str | None) -> Path:
    """Where pictures are kept: as given, or in the user's cache folder."""
    if given is not None:
        return expand(given, "data.cache_dir")
    from platformdirs import user_cache_path

    return user_cache_path("fedlora") / "pictures"
