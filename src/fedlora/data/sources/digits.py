"""The handwritten digits that come with scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.data.division import stratified
from fedlora.data.sources.base import ImageSource, ImageTable
from fedlora.errors import FedloraError
from fedlora.sampling import derive_seed


class Digits(ImageSource):
    """The 1,797 handwritten digits that come with scikit-learn: grey, 8 x 8 pixels.

    The test split is the same in every run, whatever the run's seed, so that test accuracies
    compare.

    Args:
        test_fraction: part of each class kept for testing.
        templates: prompts with one ``{}`` each; None for a few about digits.

    Raises:
        FedloraError: if ``test_fraction`` is not between 0 and 1 or a template is not usable.
    """

    def __init__(self, test_fraction: float = 0.2, templates: list[str] | None = None) -> None:
        if not 0 < test_fraction < 1:
            raise FedloraError(
                "data.source.test_fraction must be between 0 and 1, both excluded, got "
                f"{test_fraction}."
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
