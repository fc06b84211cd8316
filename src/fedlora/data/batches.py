"""Batches by indexing, without work per picture, and the order in which they come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fedlora.data.augment import Augmentation
from fedlora.data.cache.base import Pictures
from fedlora.sampling import derive_seed

Batch = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class LabelledRows(Dataset[Batch]):
    """Some rows of a source, as a data set of torch.

    Position p stands for row ``p % n`` in pass ``p // n`` over the set: an augmentation changes the
    pictures anew in each pass.

    Attributes:
        images: the pictures of all rows of the source.
        labels: (rows of the source,) int64.
        rows: (n,) int64, the rows of this set.
        augment: random changes of the pictures, or None.
        seed: of these changes; each pass has one of its own, derived from it.
    """

    images: Pictures
    labels: Tensor
    rows: Tensor
    augment: Augmentation | None = None
    seed: int = 0
    # The numbers drawn for the pass that is going on.
    _drawn: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        """The number of rows in this set."""
        return len(self.rows)

    def __getitem__(self, position: int) -> Batch:
        """A batch of one."""
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int] | Tensor) -> Batch:
        """A whole batch, of one pass; torch's DataLoader asks for this where it exists."""
        positions = torch.as_tensor(positions, dtype=torch.int64)
        place = positions % max(len(self), 1)
        rows = self.rows[place]
        images = self.images[rows]
        if self.augment is not None and len(rows):
            draws = self._draws(self.augment, int(positions[0]) // len(self))
            images = self.augment.augment(images, draws[place])
        return {"image": images, "label": self.labels[rows], "index": rows}

    def _draws(self, augment: Augmentation, number: int) -> Tensor:
        if number not in self._drawn:
            self._drawn.clear()
            self._drawn[number] = augment.draw(len(self), derive_seed(self.seed, number))
        return self._drawn[number]

    def batches(self, size: int, seed: int | None = None) -> Iterator[Batch]:
        """Every row once, the last batch possibly smaller.

        Args:
            size: rows in a batch.
            seed: of the order; None for the order of ``rows``.
        """
        order = torch.arange(len(self)) if seed is None else shuffled(len(self), seed)
        for start in range(0, len(self), size):
            yield self.__getitems__(order[start : start + size])

    def loader(self, size: int, sampler: Sampler[int] | None = None) -> DataLoader[Batch]:
        """A DataLoader, for those who need one; in the order of ``rows`` without a sampler."""
        return DataLoader(self, batch_size=size, sampler=sampler, collate_fn=_as_it_is)


class EpochSampler(Sampler[int]):
    """A new order in each epoch, which depends on nothing but the seed and the epoch.

    Positions count on from epoch to epoch, as :class:`LabelledRows` takes them. Lightning calls
    ``set_epoch``; without it each pass over the sampler is the next epoch.
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        self.num_rows = num_rows
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next pass is."""
        self.epoch = epoch

    def __len__(self) -> int:
        """The number of rows."""
        return self.num_rows

    def __iter__(self) -> Iterator[int]:
        """Positions of one epoch."""
        order = shuffled(self.num_rows, derive_seed(self.seed, "pool", self.epoch))
        order += self.epoch * self.num_rows
        self.epoch += 1
        yield from order.tolist()


def shuffled(num_rows: int, seed: int) -> Tensor:
    """The numbers below ``num_rows`` in the order of a seed, (num_rows,) int64."""
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))


def _as_it_is(batch: Any) -> Any:
    return batch
