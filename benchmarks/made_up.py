"""Made-up pictures, of as many rows and classes as a benchmark needs, and settings of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from memory import make_folder
from torch import Tensor, from_numpy

from fedlora.data.sources.base import ImageSource, ImageTable

SIZES = ("tiny", "vit-b32", "vit-l14")
SIZE = 8  # pixels; the data module makes them as large as the model wants
HELD = 8  # rows that the server validates on, and as many that it tests on: not what is measured


class MadeUp(ImageSource):
    """One pattern per class under noise, grey; rows whose classes take turns.

    Args:
        count: training rows; validation and test rows come on top.
        classes: patterns.
    """

    def __init__(self, count: int = 1440, classes: int = 10) -> None:
        self.count = count
        self.classes = classes
        super().__init__(["a picture of pattern {}."])

    @property
    def class_names(self) -> list[str]:
        """The numbers of the patterns."""
        return [str(number) for number in range(self.classes)]

    def load(self) -> ImageTable:
        """All rows."""
        total = self.count + 2 * HELD
        split = np.repeat(["train", "val", "test"], [self.count, HELD, HELD])
        return ImageTable(np.arange(total) % self.classes, split, np.arange(total))

    def read(self, rows: Sequence[int]) -> Tensor:
        """Pictures (n, 1, 8, 8), uint8."""
        which = np.asarray(rows) % self.classes
        noise = np.random.default_rng([1, *rows[:1]]).integers(0, 128, (len(rows), 1, SIZE, SIZE))
        return from_numpy((self._patterns[which] + noise).astype(np.uint8))

    @cached_property
    def _patterns(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.random.default_rng(0).integers(0, 128, (self.classes, 1, SIZE, SIZE))


def settings(clients: int, batch: int, steps: int, classes: int = 10) -> list[str]:
    """A run on made-up pictures whose batches are all full.

    Args:
        clients: all play in every round.
        batch: rows of a batch.
        steps: of a client in a round.
        classes: of the pictures.

    Returns:
        What follows ``fedlora fit``: evaluation, logger and progress are off as far as possible.
    """
    rows = max(clients * batch * steps, classes)  # of each class there must be some
    return [*over_rows(rows, clients, batch, classes), f"--trainer.local_steps={steps}"]


def over_rows(rows: int, clients: int, batch: int, classes: int = 10) -> list[str]:
    """The same with so many training rows in all, passed over once a round."""
    return [
        "--config=clip_lora.yaml",
        "--data.source=made_up.MadeUp",
        f"--data.source.count={rows}",
        f"--data.source.classes={classes}",
        "--data.partitioner=flwr_datasets.partitioner.IidPartitioner",
        f"--data.num_clients={clients}",
        f"--data.batch_size={batch}",
        "--data.client_val_fraction=0",
        "--trainer.val_every_n_rounds=1000000",
        "--trainer.logger=false",
        "--trainer.progress=off",
    ]


def sized(size: str, scratch: Path) -> list[str]:
    """The settings of a model of some size; a folder that is there is kept."""
    if size == "tiny":
        return []
    folder = scratch / size.replace("-", "_")
    if not (folder / "whole").exists():
        make_folder(folder, size)
        (folder / "whole").touch()
    rank = ["--model.lora.r=16", "--model.lora.lora_alpha=32"]
    return [f"--model.model_name={folder}", *rank]
