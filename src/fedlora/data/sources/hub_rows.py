"""The rows of several splits, one after the other, and what their labels mean."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora.data.sources.arrow_columns import as_text
from fedlora.data.sources.classes import ClassNames, label_rows
from fedlora.data.sources.hub_columns import names_of
from fedlora.data.sources.shards import Shards, is_text, starts
from fedlora.data.sources.table_columns import Column, labels_of
from fedlora.errors import FedloraError

if TYPE_CHECKING:
    import pyarrow as pa


class SplitRows:
    """The rows of some splits of a data set.

    Args:
        name: of the data set, for messages.
        parts: split, as the data set calls it -> its rows, in the order that they take here.

    Attributes:
        features: the columns that all parts have, and what they hold.
        begins: where each part does, and the end of the last.
    """

    def __init__(self, name: str, parts: Mapping[str, Shards]) -> None:
        self.name = name
        self.parts = dict(parts)
        self.begins = starts([len(part) for part in parts.values()])
        first, *others = (part.features for part in parts.values())
        self.features: dict[str, Any] = {
            column: feature
            for column, feature in first.items()
            if all(column in other for other in others)
        }

    def __len__(self) -> int:
        """The number of rows."""
        return int(self.begins[-1])

    def where(self, position: int) -> str:
        """What messages call a row: its split, and its number there from 0 as the hub shows it."""
        split, row = self.at(position)
        return f"{self.name} split {split!r} row {row}"

    def at(self, position: int) -> tuple[str, int]:
        """The split of a row, and its number in it."""
        number = int(np.searchsorted(self.begins, position, side="right")) - 1
        return list(self.parts)[number], position - int(self.begins[number])

    @cached_property
    def keys(self) -> NDArray[np.str_]:
        """``split/number`` of each row."""
        named = [f"{split}/{i:08d}" for split, part in self.parts.items() for i in range(len(part))]
        return np.array(named, dtype=np.str_)

    def column(self, name: str) -> Column:
        """A column of plain values as text; of a column of classes, their names."""
        names = self._names(name)
        if names is not None:
            codes = self._codes(name).tolist()
            known = range(len(names))
            return Column(name, [names[c] if c in known else "" for c in codes], self.where)
        values = [value for part in self.parts.values() for value in as_text(part.column(name))]
        return Column(name, values, self.where)

    def stamps(self, name: str) -> NDArray[np.str_]:
        """The stamps of all rows."""
        return np.concatenate([part.stamps(name) for part in self.parts.values()])

    def pictures(self, name: str, rows: Sequence[int]) -> list[tuple[Shards, Any]]:
        """What stands in the column of pictures, with the part that it is of, (n,)."""
        of = np.searchsorted(self.begins, rows, side="right") - 1
        wanted = np.asarray(rows, dtype=np.int64)
        found: list[Any] = [None] * len(rows)
        for number, part in enumerate(self.parts.values()):
            places = np.flatnonzero(of == number)
            if len(places):
                values = part.pictures(name, (wanted[places] - self.begins[number]).tolist())
                for place, value in zip(places.tolist(), values, strict=True):
                    found[place] = (part, value)
        return found

    def labels(self, name: str, given: ClassNames) -> tuple[NDArray[np.int64], list[str]]:
        """Labels and class names.

        Args:
            name: the column of the labels.
            given: the user's ``class_names``.

        Returns:
            (n,) int64, and the names in their order.

        Raises:
            FedloraError: if a row has no label, or the names do not fit.
        """
        names = self._names(name)
        if names is None:
            return labels_of(self.column(name), given)
        codes = self._codes(name)
        if len(codes) and not 0 <= codes.min() <= codes.max() < len(names):
            position = int(np.flatnonzero((codes < 0) | (codes >= len(names)))[0])
            raise self._unlabelled(name, position, int(codes[position]))
        of_class, names = _renamed(names, given, f"class of column {name!r}")
        return of_class[codes], names

    def _names(self, name: str) -> list[str] | None:
        """The names of a column of classes, the same in all parts; None for any other column."""
        names = names_of(self.features[name])
        for split, part in self.parts.items():
            if names_of(part.features[name]) != names:
                raise FedloraError(
                    f"{self.name}: column {name!r} has other classes in split {split!r} than in "
                    f"{next(iter(self.parts))!r}. Give all splits the same, in the same order."
                )
        return names

    def _codes(self, name: str) -> NDArray[np.int64]:
        """A column of classes as positions in their names; -1 where there is none."""
        names = names_of(self.features[name]) or []
        return np.concatenate(
            [_positions(part.column(name), names) for part in self.parts.values()]
        )

    def _unlabelled(self, name: str, position: int, code: int) -> FedloraError:
        split, row = self.at(position)
        others = ", ".join(f"{other}: {other}" for other in self.parts if other != split)
        instead = f"Leave it out: data.source.splits={{{others}}}." if others else "Add labels."
        return FedloraError(
            f"{self.name}: split {split!r} has rows without a label (row {row}, column {name!r}: "
            f"{code}). {instead}"
        )


def _positions(column: pa.ChunkedArray, names: list[str]) -> NDArray[np.int64]:
    """Positions in ``names``, (n,), however a file holds them: as numbers or as the names."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if is_text(column.type):
        known = {name: i for i, name in enumerate(names)}
        return np.array([known.get(value, -1) for value in as_text(column)], dtype=np.int64)
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    codes: NDArray[np.int64] = column.cast(pa.int64()).fill_null(-1).to_numpy()
    return codes


def _renamed(names: list[str], given: ClassNames, what: str) -> tuple[NDArray[np.int64], list[str]]:
    """From the data set's classes to those of the user: new positions, and their names."""
    names = [unicodedata.normalize("NFC", name) for name in names]
    if not isinstance(given, list) or set(given) == set(names):
        return label_rows(names, names if given is None else given, what)
    if len(given) != len(names):
        raise FedloraError(
            f"data.source.class_names must be one name for each of the {len(names)} classes of the "
            f"data set, in their order, got {len(given)}. They are {', '.join(names[:20])}."
        )
    for i, name in enumerate(given):
        if name in names and names.index(name) != i:
            raise FedloraError(
                f"data.source.class_names renames class {i}, {names[i]!r}, to {name!r}, which is "
                f"class {names.index(name)} of the data set. Write a dict, {{{names[i]}: new name, "
                "...}, or keep the order."
            )
    return label_rows(given, given, what)
