"""Pictures that a table lists, one row each."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedlora.data.decode import BadImageError, read_all
from fedlora.data.sources.base import SPLITS, ImageTable
from fedlora.data.sources.files_on_disk import (
    MISSING,
    existing_folder,
    full_path,
    printable,
    stamps,
)
from fedlora.data.sources.scanned import Found, ScannedSource
from fedlora.data.sources.table_columns import (
    Column,
    find_column,
    find_optional,
    further_columns,
    labels_of,
    sites_of,
    splits_of,
)
from fedlora.data.sources.text_table import TextTable, read_table
from fedlora.errors import FedloraError
from fedlora.files import expand

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class _Found(Found):
    """What a look at the table showed."""

    root: Path


class Manifest(ScannedSource[_Found]):
    """Pictures listed in a CSV or parquet file, one row each, with their labels.

    .. code-block:: yaml

        data:
          source:
            class_path: fedlora.data.Manifest
            init_args:
              path: ~/data/skin/lesions.csv
              root: ~/data/skin/pictures     # left out: the folder of the CSV file
              path_column: file
              label_column: diagnosis
              site_column: hospital
              class_names: {nv: mole, mel: melanoma}   # or a list, or left out
              templates: ["a photo of a {}, a skin lesion."]

    with ``lesions.csv`` ::

        file,diagnosis,hospital,split,age
        a/0001.jpg,nv,paris,train,41
        a/0002.jpg,mel,rome,test,67

    **The file** is CSV with commas, semicolons or tabs (the header tells, or Excel's line ``sep=;``
    before it), in UTF-8 and with the usual quotes; or parquet, told by its first bytes. Empty lines
    are passed over, columns without a name too. Messages name the row as a spreadsheet counts it:
    the first line is row 1, and a row with line breaks inside of quotes is one row. Rows of parquet
    count from 1.

    **Paths** count from ``root``; absolute ones are used as they are, ``~`` is the home folder and
    a backslash is a slash. No picture may be listed twice. One that is not there is reported by
    the data module like one that cannot be read.

    **Classes** are the values of the label column in the order of their names (numbers by size: 2
    before 10), or in that of ``class_names``. Where labels are whole numbers and ``class_names``
    is a list of names, a label is a position in that list, from 0.

    **Splits** are called train or training; val, valid, validation or dev; test or testing, in any
    case. Without such a column all pictures are for training, and the data module sets parts of
    them aside for validation and testing.

    **Other columns** are kept: a partitioner can divide by them (``partition_by: age``) and
    ``data.hold_out`` can name them. A column in which all values are numbers is one of numbers;
    one with texts of more than 100 characters is not kept.

    Args:
        path: the CSV or parquet file.
        root: the folder from which paths count; None for the folder that ``path`` is in.
        path_column: the column of the pictures' paths.
        label_column: the column of the labels.
        site_column: the column that says who recorded a picture: its values can become the
            clients. None for the column called "site", if there is one.
        split_column: the column of the splits. None for the column called "split", if there is
            one.
        class_names: None for the values of the label column; a list of them that says their
            order, or of names for whole numbers; or a dict from values to the names that prompts
            use.
        templates: prompts with one ``{}`` each; None for "a photo of a {}.".

    Raises:
        FedloraError: if an argument is not usable by itself; the disk is looked at in
            :meth:`prepare`.
    """

    def __init__(
        self,
        path: str,
        root: str | None = None,
        path_column: str = "path",
        label_column: str = "label",
        site_column: str | None = None,
        split_column: str | None = None,
        class_names: list[str] | dict[str, str] | None = None,
        templates: list[str] | None = None,
    ) -> None:
        if not str(path).strip():
            raise FedloraError("data.source.path must be a file, got an empty name. Name one.")
        self.path = path
        self.root = root
        self.path_column = path_column
        self.label_column = label_column
        self.site_column = site_column
        self.split_column = split_column
        super().__init__(class_names, templates)

    @property
    def place(self) -> str:
        """The full path of the root: tables of the same pictures share what is kept of them."""
        return printable(str(full_path(self._root_as_written())))

    def read(self, rows: Sequence[int]) -> list[Tensor | BadImageError]:
        """Pictures (C, H, W), uint8, each of its own size."""
        found = self._found
        return read_all([found.root / str(found.table.keys[row]) for row in rows])

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
        missing = np.count_nonzero(table.stamps == MISSING)
        parts += [f"{missing:,} not there"] if missing else []
        return f"{len(table):,} pictures listed in {self.path}: {', '.join(parts)}"

    def _root_as_written(self) -> Path:
        if self.root is not None:
            return expand(self.root, "data.source.root")
        return expand(self.path, "data.source.path").parent

    def _look(self) -> _Found:
        path = expand(self.path, "data.source.path")
        named = (self.path_column, self.label_column, self.site_column, self.split_column)
        text = read_table(path, [name for name in named if name is not None])
        paths, label, site, split = self._columns(text)
        root = existing_folder(self._root_as_written())
        keys = _keys(text.column(paths), root, self._root_as_written())
        splits = None if split is None else splits_of(text.column(split))
        sites = None if site is None else sites_of(text.column(site))
        labels, class_names = labels_of(text.column(label), self._given)
        table = ImageTable(
            labels=labels,
            split=np.full(len(keys), "train") if splits is None else splits,
            keys=np.array(keys),
            site=sites,
            columns=further_columns(
                {
                    name: values
                    for name, values in text.columns.items()
                    if name not in (paths, label, site, split)
                }
            ),
            stamps=stamps([os.path.join(str(root), key) for key in keys]),  # noqa: PTH118  # a million
        )
        return _Found(class_names, table, root)

    def _columns(self, text: TextTable) -> tuple[str, str, str | None, str | None]:
        """The names of the columns of paths, labels, sites and splits."""
        present, table = list(text.columns), str(text.path)
        return (
            find_column(self.path_column, present, "data.source.path_column", table),
            find_column(self.label_column, present, "data.source.label_column", table),
            find_optional(self.site_column, "site", present, "data.source.site_column", table),
            find_optional(self.split_column, "split", present, "data.source.split_column", table),
        )


def _keys(column: Column, root: Path, root_as_written: Path) -> list[str]:
    """What each picture is called: its path below the root, or in full where it lies elsewhere."""
    column.check_filled("a path")
    # An absolute path may begin with the root as the user wrote it, which may be a link.
    ways = {f"{str(way).rstrip('/')}/" for way in (root, root_as_written.absolute())}
    roots = sorted(ways, key=len, reverse=True)  # one may lie in the other
    keys = [_key(value.replace("\\", "/"), roots, root) for value in column.values]
    if len(set(keys)) == len(keys):
        return keys
    first: dict[str, int] = {}
    for i, key in enumerate(keys):
        if first.setdefault(key, i) != i:
            raise column.error(
                i,
                f"the picture {column.values[i]!r} is listed twice, first as "
                f"{column.values[first[key]]!r} ({column.where(first[key])}). Take one out.",
            )
    return keys


def _key(path: str, roots: Sequence[str], root: Path) -> str:
    if path[0] not in "/~." and "//" not in path and "/." not in path and path[-1] != "/":
        return path  # most are
    full = os.path.join(root, os.path.expanduser(path))  # noqa: PTH111, PTH118  # a million
    # What is above a link is another folder than the text says.
    full = os.path.realpath(full) if ".." in path.split("/") else os.path.normpath(full)
    for way in roots:
        if full.startswith(way):
            return full[len(way) :]
    return full
