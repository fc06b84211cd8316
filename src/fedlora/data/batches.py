"""Batches by indexing, without work per picture, and the order in which they come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fedlora.data.cache import Pictures
from fedlora.sampling import derive_seed

Batch = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class LabelledRows(Dataset[Batch]):
    """Some rows of a source, as a data set of torch.

    Attributes:
        images: the pictures of all rows of the source.
        labels: (rows of the source,) int64.
        rows: (n,) int64, the rows of this set.
    """

    images: Pictures
    labels: Tensor
    rows: Tensor

    def __len__(self) -> int:
        """The number of rows in this set."""
        return len(self.rows)

    def __getitem__(self, position: int) -> Batch:
        """A batch of one."""
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int] | Tensor) -> Batch:
        """The whole batch at once: torch's DataLoader asks for this one where it exists."""
        rows = self.rows[torch.as_tensor(positions, dtype=torch.int64)]
        return {"image": self.images[rows], "label": self.labels[rows], "index": rows}

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

    Lightning calls ``set_epoch``; without it each pass over the sampler is the next epoch.
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
        self.epoch += 1
        yield from order.tolist()


def shuffled(num_rows: int, seed: int) -> Tensor:
    """The numbers below ``num_rows`` in the order of a seed, (num_rows,) int64."""
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))


def _as_it_is(batch: Any) -> Any:
    return batch
