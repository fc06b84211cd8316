"""Where pictures come from: a table of what there is, and the pixels when they are asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.data.partition import stratified
from fedlora.data.templates import check_templates
from fedlora.sampling import derive_seed

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class ImageTable:
    """One row per picture: all that splits and partitions look at, and no pixels.

    Attributes:
        labels: (n,) int64, position in the source's ``class_names``.
        split: (n,) of "train", "val", "test". Where no row says "val", a part of the training
            rows becomes the server's validation split.
        keys: (n,) distinct and sortable: what a row is called wherever it stands in the table
            (a relative path, an id). Splits depend on keys, never on positions.
        site: (n,) str, who recorded the picture, or None where nobody knows.
    """

    labels: NDArray[np.int64]
    split: NDArray[np.str_]
    keys: NDArray[Any]
    site: NDArray[np.str_] | None = None

    def __post_init__(self) -> None:
        """Check that the columns fit together."""
        columns = {"split": self.split, "keys": self.keys, "site": self.site}
        for name, column in columns.items():
            if column is not None and column.shape != (len(self),):
                raise ValueError(
                    f"{name} must have one value per label, shape ({len(self)},), "
                    f"got {column.shape}."
                )
        unknown = sorted(set(self.split.tolist()) - set(SPLITS))
        if unknown:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {unknown[0]!r}.")
        if len(np.unique(self.keys)) != len(self):
            raise ValueError("keys must be distinct: two pictures have the same one.")

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.labels)


class ImageSource(ABC):
    """Labelled pictures. A new kind of storage is a subclass of this and nothing else.

    The life of a source: ``prepare()`` once per machine, then, in every process, ``class_names``
    and ``load()`` in any order, and ``read()`` of the rows that ``load()`` told of. What
    ``prepare()`` finds out must be on disk and not in ``self``: with several processes on a
    machine only one of them runs it.

    Args:
        templates: prompts made of a class name, each with exactly one ``{}``.

    Raises:
        ValueError: if there is no template or one has not exactly one ``{}``.
    """

    def __init__(self, templates: Sequence[str]) -> None:
        self._templates = check_templates(templates)

    @property
    def templates(self) -> list[str]:
        """The prompt templates."""
        return list(self._templates)

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """Class names in the order of the labels; valid once ``prepare()`` has run."""

    # Not abstract: most sources have nothing to fetch.
    def prepare(self) -> None:  # noqa: B027
        """Download or check what ``load()`` needs. Runs once per machine, before all else."""

    @abstractmethod
    def load(self) -> ImageTable:
        """Say what there is. Reads no pixels, so it is quick for any number of pictures."""

    @abstractmethod
    def read(self, rows: Sequence[int]) -> Tensor | list[Tensor]:
        """Read pictures; called once per row and run, in chunks.

        Args:
            rows: positions in the table of ``load()``.

        Returns:
            uint8, grey (C = 1) or RGB (C = 3): one tensor (n, C, H, W), or a list of n tensors
            (C, H, W) where sizes differ.
        """


class Digits(ImageSource):
    """The 1,797 handwritten digits that come with scikit-learn: grey, 8 x 8 pixels.

    The test split is the same in every run, whatever the run's seed, so that test accuracies
    compare.

    Args:
        test_fraction: part of each class kept for testing.
        templates: prompts with one ``{}`` each; None for a few about digits.

    Raises:
        ValueError: if ``test_fraction`` is not between 0 and 1 or a template is not usable.
    """

    def __init__(self, test_fraction: float = 0.2, templates: list[str] | None = None) -> None:
        if not 0 < test_fraction < 1:
            raise ValueError(
                f"test_fraction must be between 0 and 1, both excluded, got {test_fraction}."
            )
        self.test_fraction = test_fraction
        super().__init__(_DIGIT_TEMPLATES if templates is None else templates)

    @property
    def class_names(self) -> list[str]:
        """The words zero to nine."""
        return ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

    def load(self) -> ImageTable:
        """All 1,797 rows in scikit-learn's order."""
        labels = self._arrays[1]
        order = np.random.default_rng(derive_seed("digits", "test split")).permutation(len(labels))
        split = np.full(len(labels), "train")
        split[order[stratified(labels[order], self.test_fraction)]] = "test"
        return ImageTable(labels, split.astype(np.str_), np.arange(len(labels)))

    def read(self, rows: Sequence[int]) -> Tensor:
        """Pictures (n, 1, 8, 8), uint8."""
        return self._arrays[0][list(rows)]

    @cached_property
    def _arrays(self) -> tuple[Tensor, NDArray[np.int64]]:
        """Pictures (1797, 1, 8, 8) and labels (1797,)."""
        from sklearn.datasets import load_digits

        found = load_digits()
        # 17 levels of ink, 0 to 16.
        pixels = np.round(found.images * (255 / 16)).astype(np.uint8)
        return torch.from_numpy(pixels).unsqueeze(1), found.target.astype(np.int64)


_DIGIT_TEMPLATES = (
    "a photo of the digit {}.",
    "the number {}.",
    "a blurry picture of the digit {}.",
    "a low resolution image of the digit {}.",
)
