"""What sources that are tables share: which column is which, and what its values mean."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.data.sources.classes import ClassNames, did_you_mean, label_rows, listed
from fedlora.data.sources.folder_layout import SPLIT_NAMES
from fedlora.errors import FedloraError

ONE_LABEL = "One label per picture: fedlora is for single-label classification."

# Longer text is no group to divide by, and as an array it would take this times four bytes a row.
_LONGEST_TEXT = 100

# What is written where a value is missing: nothing, or how pandas spells that as text.
_NO_VALUE = frozenset(["", "nan", "NaN", "<NA>", "NaT"])

_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
# Not what float() takes: "1_000" and "nan" are names, "007" is a code.
_NUMBER = re.compile(r"[+-]?(0|[1-9]\d*|(?=\.\d))(\.\d*)?([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True, eq=False)
class Column:
    """One column as text.

    Attributes:
        name: its name.
        values: (n,).
        where: from a position to what messages call it: "data.csv row 7".
    """

    name: str
    values: Sequence[str]
    where: Callable[[int], str]

    def error(self, position: int, what: str) -> FedloraError:
        """An error that names the row and the column."""
        return FedloraError(f"{self.where(position)}, column {self.name!r}: {what}")

    def check_filled(self, what: str, instead: str = "") -> None:
        """Refuse a missing value: an empty one, or "nan" and the like.

        Raises:
            FedloraError: names the first such row, ``what`` it lacks and what to do ``instead`` of
                filling it in.
        """
        if _NO_VALUE.isdisjoint(self.values):
            return
        position = next(i for i, value in enumerate(self.values) if value in _NO_VALUE)
        got = repr(self.values[position]) if self.values[position] else "empty"
        raise self.error(position, f"{got}, but every picture needs {what}. Fill it in{instead}.")


def find_column(name: str, present: Sequence[str], option: str, table: str) -> str:
    """A column by its name.

    Args:
        name: what the user or a default calls it.
        present: the columns there are.
        option: the setting that names it.
        table: what messages call the table.

    Raises:
        FedloraError: if there is no such column; lists those that there are.
    """
    if name in present:
        return name
    raise FedloraError(
        f"{table} has no column {name!r}, only {listed(present, 20)}. Set {option}."
        f"{did_you_mean(name, present)}"
    )


def find_optional(
    name: str | None, default: str, present: Sequence[str], option: str, table: str
) -> str | None:
    """A column that need not be there: ``default`` is taken if it is there, another if named.

    Raises:
        FedloraError: if a column is named that is not there.
    """
    if name is None:
        return default if default in present else None
    return find_column(name, present, option, table)


def labels_of(column: Column, given: ClassNames) -> tuple[NDArray[np.int64], list[str]]:
    """Labels and class names from the values of a column.

    Where all values are whole numbers and ``given`` is a list of names that are not numbers, a
    value is a position in that list, from 0; a class may then have no rows. Otherwise as
    :func:`~fedlora.data.sources.classes.label_rows`.

    Returns:
        (n,) int64, and the class names in their order.

    Raises:
        FedloraError: for a missing value, one that is out of range or one that could be a position
            as well as a name, with its row, and as ``label_rows``.
    """
    column.check_filled("a label")
    what = f"value of column {column.name!r}"
    if not isinstance(given, list) or all(map(_INTEGER.fullmatch, given)):
        return label_rows(column.values, given, what)
    found = set(column.values)
    if not all(map(_INTEGER.fullmatch, found)):
        return label_rows(column.values, given, what)
    _check_positions(column, found, given)
    _, names = label_rows(given, given, what)
    return np.array([int(value) for value in column.values], dtype=np.int64), names


def _check_positions(column: Column, found: Iterable[str], names: list[str]) -> None:
    """Refuse labels that are no positions in a list, or could be one of its names as well."""
    for value in found:
        position = int(value)
        if not 0 <= position < len(names):
            raise column.error(
                column.values.index(value),
                f"the label must be between 0 and {len(names) - 1}, a position in "
                f"data.source.class_names ({len(names)} names), got {value}. Add a name, or mend "
                "the label.",
            )
        if value in names and names[position] != value:
            raise column.error(
                column.values.index(value),
                f"the label {value} is a position in data.source.class_names, that of "
                f"{names[position]!r}, and one of the names in it, too. Write a dict there, "
                f"{{{value}: its name, ...}}.",
            )


def sites_of(column: Column) -> NDArray[np.str_]:
    """Who recorded each picture, (n,); "é" in one character and in two is the same (NFC).

    Raises:
        FedloraError: where a value is missing, with its row.
    """
    column.check_filled("a site", ", or set data.source.site_column to another column")
    names = {name: unicodedata.normalize("NFC", name) for name in set(column.values)}
    return np.array([names[name] for name in column.values], dtype=np.str_)


def splits_of(column: Column) -> NDArray[np.str_]:
    """The splits that a column tells, in any case, as "train", "val" and "test".

    Raises:
        FedloraError: for another word, with its row.
    """
    splits = {}
    for word in set(column.values):
        found = SPLIT_NAMES.get(word.lower())
        if found is None:
            got = f"got {word!r}" if word else "got nothing"
            raise column.error(
                column.values.index(word),
                f"the split must be one of {', '.join(SPLIT_NAMES)}, {got}. Mend it, or set "
                "data.source.split_column to another column."
                f"{did_you_mean(word.lower(), SPLIT_NAMES)}",
            )
        splits[word] = found
    return np.array([splits[word] for word in column.values], dtype=np.str_)


def further_columns(columns: Mapping[str, Sequence[str]]) -> dict[str, NDArray[Any]]:
    """Columns that partitioners may divide by, each by :func:`numbers_or_text`.

    Those with a text of more than 100 characters (captions, reports) are left out.
    """
    return {
        name: numbers_or_text(values)
        for name, values in columns.items()
        if max(map(len, values), default=0) <= _LONGEST_TEXT
    }


def numbers_or_text(values: Sequence[str]) -> NDArray[Any]:
    """Values as int64 where all are whole numbers, as float64 where all are numbers, else as text.

    Numbers are what a calculator shows: "7", "-0.5", "1e-3"; not "nan", "007" or "1_000".

    Example:
        >>> numbers_or_text(["2", "10"])
        array([ 2, 10])
        >>> numbers_or_text(["2", "0.5"])
        array([2. , 0.5])
        >>> numbers_or_text(["2", "007"])
        array(['2', '007'], dtype='<U3')
    """
    if not all(map(_NUMBER.fullmatch, values)):
        return np.array(values, dtype=np.str_)
    # 18 digits fit into 64 bits.
    if all(len(value) <= 18 and _INTEGER.fullmatch(value) for value in values):
        return np.array([int(value) for value in values], dtype=np.int64)
    return np.array([float(value) for value in values], dtype=np.float64)
