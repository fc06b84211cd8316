"""Where pictures come from: a table of what there is, and the pixels when they are asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedlora.data.decode import BadImageError
from fedlora.data.templates import check_templates

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class ImageTable:
    """One row per picture: all that splits and partitions look at, and no pixels.

    Attributes:
        labels: (n,) int64, position in the source's ``class_names``.
        split: (n,) of "train", "val", "test". Where no row says "val" or none says "test", a part
            of the training rows becomes that split.
        keys: (n,) distinct and sortable: what a row is called wherever it stands in the table
            (a relative path, an id). Splits depend on keys, never on positions.
        site: (n,) str, who recorded the picture, or None where nobody knows.
        columns: further columns by name, (n,) each, str or numbers: what else a partitioner can
            divide by and ``hold_out`` can name (a scanner, a domain).
        stamps: (n,) str, which changes whenever the pixels of a row do (for a file: its size and
            time of change). Pictures with stamps are kept in the cache folder, shared by runs;
            None: they are kept in memory, for sources that hold them there anyway.
    """

    labels: NDArray[np.int64]
    split: NDArray[np.str_]
    keys: NDArray[Any]
    site: NDArray[np.str_] | None = None
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    stamps: NDArray[np.str_] | None = None

    def __post_init__(self) -> None:
        """Check that the columns fit together."""
        if self.labels.ndim != 1 or self.labels.dtype.kind not in "iu":
            raise ValueError(
                "labels must be whole numbers, one per picture, shape (n,), got "
                f"{self.labels.dtype} of shape {self.labels.shape}."
            )
        columns = {"split": self.split, "keys": self.keys, "site": self.site, "stamps": self.stamps}
        columns |= self.columns
        for name, column in columns.items():
            if column is not None and column.shape != (len(self),):
                raise ValueError(
                    f"{name} must have one value per label, shape ({len(self)},), "
                    f"got {column.shape}."
                )
        if self.site is not None and (self.site == "").any():
            raise ValueError(
                f"site must not be empty, as it is in row {int(np.argmax(self.site == ''))}: say "
                "None in place of the column where nobody knows the sites."
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

    @property
    def place(self) -> str:
        """What tells this source from others in the cache folder: a full path, a hub name.

        Where the table has stamps this must say it all: two sources of one place and class share
        what is kept of pictures with equal keys and stamps.
        """
        return f"{type(self).__module__}.{type(self).__qualname__}"

    def summary(self) -> str:
        """One line for the user that says what was found, valid once ``prepare()`` has run."""
        return f"{type(self).__name__}, {len(self.class_names):,} classes"

    @abstractmethod
    def load(self) -> ImageTable:
        """Say what there is. Reads no pixels, so it is quick for any number of pictures."""

    @abstractmethod
    def read(self, rows: Sequence[int]) -> Tensor | Sequence[Tensor | BadImageError]:
        """Read pictures, in chunks; from several threads at once where the table has stamps.

        Args:
            rows: positions in the table of ``load()``.

        Returns:
            uint8, grey (C = 1) or RGB (C = 3): one tensor (n, C, H, W), or n tensors (C, H, W)
            where sizes differ, with an error (returned, not raised) in the place of a picture
            that cannot be read.
        """
