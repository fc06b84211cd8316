"""Pictures of the Hugging Face hub, or in the files of such a data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora.data.decode import BadImageError, read_all
from fedlora.data.sources.base import SPLITS, ImageTable
from fedlora.data.sources.classes import did_you_mean, listed
from fedlora.data.sources.files_on_disk import full_path, printable
from fedlora.data.sources.folder_layout import SPLIT_NAMES
from fedlora.data.sources.hub import is_local, open_data_set
from fedlora.data.sources.hub_columns import label_column, picture_column, scalar_columns
from fedlora.data.sources.hub_rows import SplitRows
from fedlora.data.sources.scanned import Found, ScannedSource
from fedlora.data.sources.shards import Shards
from fedlora.data.sources.table_columns import find_optional, further_columns, sites_of
from fedlora.errors import FedloraError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


@dataclass(frozen=True, eq=False)
class _Found(Found):
    """What a look into the data set showed; ``pictures`` is the column of the pictures."""

    rows: SplitRows
    pictures: str


class HuggingFaceImages(ScannedSource[_Found]):
    """Pictures of a data set of the Hugging Face hub, or in its files in a folder.

    .. code-block:: yaml

        data:
          source:
            class_path: fedlora.data.HuggingFaceImages
            init_args:
              name: uoft-cs/cifar10            # or a folder, or a .parquet or .arrow file
              revision: main                   # a branch, tag or commit; for the hub only
              splits: {train: train, test: test}
              templates: ["a blurry photo of a {}."]

    **Where from.** ``name`` is, in this order,

    - a folder as the hub has it, with parquet files in it or in ``data/`` and perhaps a README.md
      that describes configs: what ``hf download --repo-type dataset NAME --local-dir DIR`` makes;
    - a folder that ``save_to_disk`` of ``datasets`` wrote;
    - a single .parquet or .arrow file, all of which is for training;
    - a name of the hub, OWNER/NAME. ``datasets`` downloads it once into its cache
      (``HF_HOME``) and makes a table there that is as large again. Without a network the cache
      alone is used. ``HF_HUB_OFFLINE=1`` makes that certain.

    Parquet and Arrow files in a folder are read where they are, without a copy; so large data sets
    are better downloaded with ``hf download``. No code of a data set is ever run.

    **Columns.** Pictures are in the one column of the type Image, or of bytes; labels in the one
    of the type ClassLabel, or the one called label, labels, class, category, target, fine_label or
    cls. Where several could be meant, those with such a name count (for pictures: image, img,
    picture, jpg, jpeg, png, webp), and else you are asked to name one. A row may have the path of
    its picture instead of its bytes: relative ones count from the folder. Other columns of text
    (up to 100 characters), numbers or classes are kept: a partitioner can divide by them and
    ``data.hold_out`` can name them.

    **Classes** of a ClassLabel come in its order, also those without pictures; other values in the
    order of their names (numbers by size: 2 before 10).

    **Splits** are called train or training; val, valid, validation or dev; test or testing, in any
    case. Others must be named in ``splits``; those that ``splits`` does not name are left out.

    Args:
        name: of the data set, or a path.
        config: which of several data sets under that name; None for the only or the default one.
        image_column: the column of the pictures; None to find it.
        label_column: the column of the labels; None to find it.
        site_column: the column that says who recorded a picture: its values can become the
            clients. None for the column called "site", if there is one.
        splits: from train, val and test to the data set's own splits; None to find them.
        revision: branch, tag or commit on the hub; None for the newest.
        class_names: None for those of the data set. A list: new names in the data set's order (or
            its own names in a new order; or names for whole numbers). A dict: from the data set's
            names to those that prompts use.
        templates: prompts with one ``{}`` each; None for "a photo of a {}.".

    Raises:
        FedloraError: if an argument is not usable by itself; disk and network are looked at in
            :meth:`prepare`.
    """

    def __init__(
        self,
        name: str,
        config: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        site_column: str | None = None,
        splits: dict[str, str] | None = None,
        revision: str | None = None,
        class_names: list[str] | dict[str, str] | None = None,
        templates: list[str] | None = None,
    ) -> None:
        if not str(name).strip():
            raise FedloraError("data.source.name must be a data set, got an empty name. Name one.")
        self.name = str(name)
        self.config = config
        self.image_column = image_column
        self.label_column = label_column
        self.site_column = site_column
        self.splits = _check_splits(splits)
        self.revision = revision
        super().__init__(class_names, templates)

    @property
    def place(self) -> str:
        """The full path, or the hub's name and revision; with what tells the pictures apart."""
        if is_local(self.name):
            where = printable(str(full_path(self.name, "data.source.name")))
        else:
            where = f"hf://datasets/{self.name}@{self.revision or 'main'}"
        options = {"config": self.config, "image_column": self.image_column}
        return " ".join([where, *(f"{name}={value}" for name, value in options.items() if value)])

    def read(self, rows: Sequence[int]) -> list[Tensor | BadImageError]:
        """Pictures (C, H, W), uint8, each of its own size."""
        found = self._found
        entries = [_picture(*entry) for entry in found.rows.pictures(found.pictures, rows)]
        decoded = iter(read_all([e for e in entries if not isinstance(e, BadImageError)]))
        return [entry if isinstance(entry, BadImageError) else next(decoded) for entry in entries]

    def summary(self) -> str:
        """One line that says what was found, for the user.

        Raises:
            FedloraError: as :meth:`prepare`.
        """
        found, table = self._found, self._found.table
        parts = [f"{len(found.class_names):,} classes"]
        if table.site is not None:
            parts.append(f"{len(set(table.site.tolist())):,} sites")
        counts = Counter(table.split.tolist())
        parts += [f"{name} {counts[name]:,}" for name in SPLITS if counts[name]]
        return f"{len(table):,} pictures in {self.name}: {', '.join(parts)}"

    def __getstate__(self) -> dict[str, Any]:
        """Another process opens the files itself."""
        return {**vars(self), "_seen": None}

    def _look(self) -> _Found:
        import pyarrow as pa

        shards = open_data_set(self.name, self.config, self.revision)
        ours = self._ours(shards)
        rows = SplitRows(self.name, {theirs: shards[theirs] for theirs in ours})
        if not len(rows):
            raise FedloraError(f"data.source.name={self.name} has no rows: no pictures.")
        try:
            return self._table(rows, list(ours.values()))
        except (pa.ArrowException, OSError) as error:
            raise FedloraError(
                f"data.source.name={self.name} cannot be read: {str(error).splitlines()[0]}. "
                "Download it again."
            ) from error

    def _table(self, rows: SplitRows, splits: list[str]) -> _Found:
        pictures = picture_column(rows.features, self.image_column, self.name)
        label = label_column(rows.features, self.label_column, self.name)
        scalars = scalar_columns(rows.features)
        site = find_optional(
            self.site_column, "site", scalars, "data.source.site_column", self.name
        )
        for part in rows.parts.values():
            part.check(pictures)
        labels, class_names = rows.labels(label, self._given)
        others = [name for name in scalars if name not in (pictures, label, site)]
        table = ImageTable(
            labels=labels,
            split=np.repeat(splits, [len(part) for part in rows.parts.values()]),
            keys=rows.keys,
            site=None if site is None else sites_of(rows.column(site)),
            columns=further_columns({name: rows.column(name).values for name in others}),
            stamps=rows.stamps(pictures),
        )
        return _Found(class_names, table, rows, pictures)

    def _ours(self, shards: Mapping[str, Shards]) -> dict[str, str]:
        """The data set's splits that are used, and what they are to us."""
        there = listed(shards, 20)
        if self.splits is None:
            ours = {theirs: SPLIT_NAMES.get(theirs.lower(), "") for theirs in shards}
            unknown = [theirs for theirs, our in ours.items() if not our]
            if unknown or "train" not in ours.values():
                why = f"{listed(unknown)} unknown" if unknown else "none of them is for training"
                raise FedloraError(
                    f"{self.name} has the splits {there}, {why}. Say which are which: "
                    f"data.source.splits={{train: {next(iter(shards))}}} and val or test beside "
                    "it; those not named are left out."
                )
            return ours
        for theirs in self.splits.values():
            if theirs not in shards:
                raise FedloraError(
                    f"data.source.splits names {theirs!r} but {self.name} has the splits {there}."
                    f"{did_you_mean(theirs, shards) or ' Name one of these.'}"
                )
        return {theirs: our for our, theirs in self.splits.items()}


def _check_splits(given: dict[str, str] | None) -> dict[str, str] | None:
    """The user's ``splits`` with our names in their usual form."""
    if given is None:
        return None
    ours = {SPLIT_NAMES.get(str(our).lower(), ""): theirs for our, theirs in given.items()}
    if "train" not in ours or "" in ours or len(ours) < len(given):
        raise FedloraError(
            "data.source.splits must map train, and val and test if you like, to splits of the "
            f"data set, got {given!r}. Write for example {{train: train, test: validation}}."
        )
    if len(set(ours.values())) < len(ours):
        raise FedloraError(
            f"data.source.splits must name different splits, got {given!r}: pictures to train on "
            "would be tested on, too. Leave val or test out to have a part of train set aside."
        )
    return ours


def _picture(part: Shards, entry: Any) -> Path | bytes | BadImageError:
    """What is to be decoded of what stands in the column of pictures."""
    content = entry.get("bytes") if isinstance(entry, Mapping) else entry
    if content is None and isinstance(entry, Mapping):
        content = entry.get("path")
    if content is None:
        return BadImageError("there is no picture in this row")
    return content if isinstance(content, bytes | BadImageError) else part.folder / str(content)
