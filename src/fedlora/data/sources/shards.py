"""The rows of one split: columns as a whole, pictures by rows; in Arrow files here."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora.data.decode import BadImageError
from fedlora.data.sources.classes import listed
from fedlora.data.sources.files_on_disk import stamp, stamps
from fedlora.data.sources.hub_columns import names_of
from fedlora.errors import FedloraError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features


class Shards(ABC):
    """One split of a data set, in one file or several.

    Attributes:
        features: the columns and what they hold, as ``datasets`` describes them.
        folder: from which relative paths of pictures count.
    """

    def __init__(self, features: Features, folder: Path) -> None:
        self.features = features
        self.folder = folder

    @abstractmethod
    def __len__(self) -> int:
        """The number of rows."""

    @abstractmethod
    def column(self, name: str) -> pa.ChunkedArray:
        """A column of all rows; not that of the pictures, which is too large."""

    @abstractmethod
    def pictures(self, name: str, rows: Sequence[int]) -> list[Any]:
        """What stands in the column of pictures, (n,): bytes, a path, a dict of both, or None.

        A BadImageError (returned, not raised) stands in the place of what cannot be read.
        From several threads at once.
        """

    @abstractmethod
    def check(self, name: str) -> None:
        """Refuse a column of pictures that cannot be read in bounded memory.

        Raises:
            FedloraError: says what to do.
        """

    def stamps(self, name: str) -> NDArray[np.str_]:
        """(n,), what changes whenever the pictures in a column do, and not from run to run.

        The stamp of the row's file, with that of the picture's own file where it has one.
        """
        marks, paths = self._marks(), self._lone_paths(name)
        if not paths:
            return marks
        own = [path and stamp(self.folder / path) for path in paths]
        both = zip(marks.tolist(), own, strict=True)
        return np.array([f"{mark}/{file}" if file else mark for mark, file in both], dtype=np.str_)

    @abstractmethod
    def _marks(self) -> NDArray[np.str_]:
        """Stamps of the files that hold the rows, (n,)."""

    @abstractmethod
    def _lone_paths(self, name: str) -> list[str | None]:
        """Paths of pictures whose bytes are not in the column, (n,); or empty: all are."""


class ArrowShards(Shards):
    """Arrow files, mapped into memory: rows are read from the disk when they are asked for.

    Args:
        table: what was mapped.
        features: its columns.
        files: where it lies.
        folder: from which relative paths of pictures count.
    """

    def __init__(
        self, table: pa.Table, features: Features, files: Sequence[Path], folder: Path
    ) -> None:
        super().__init__(features, folder)
        self._table = table
        self._files = files

    def __len__(self) -> int:
        """The number of rows."""
        return int(self._table.num_rows)

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of all rows."""
        return self._table.column(name)

    def pictures(self, name: str, rows: Sequence[int]) -> list[Any]:
        """What stands in the column of pictures."""
        # Chunk by chunk: taking rows of a chunked array joins all of its chunks first.
        chunks = self._table.column(name).chunks
        return by_block(chunks.__getitem__, starts([len(chunk) for chunk in chunks]), rows)

    def check(self, name: str) -> None:
        """Any can be read."""

    def _marks(self) -> NDArray[np.str_]:
        marks = stamps(self._files).tolist()
        mark = marks[0] if len(marks) == 1 else hashlib.sha256("|".join(marks).encode()).hexdigest()
        return np.full(len(self), mark)

    def _lone_paths(self, name: str) -> list[str | None]:
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self._table.column(name)
        if not pa.types.is_struct(column.type):
            return list(column.to_pylist()) if is_text(column.type) else []
        if column.type.get_field_index("path") < 0:
            return []
        path = pc.struct_field(column, "path")
        lacks = pc.is_null(pc.struct_field(column, "bytes"))
        return list(pc.if_else(lacks, path, None).to_pylist()) if pc.any(lacks).as_py() else []


def starts(lengths: Sequence[int]) -> NDArray[np.int64]:
    """Where blocks begin, and the end of the last: (n + 1,)."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def by_block(
    block: Callable[[int], pa.Array], begins: NDArray[np.int64], rows: Sequence[int]
) -> list[Any]:
    """Values of rows that lie in blocks, each of which is asked for once.

    Where a block cannot be read an error stands in the place of each of its values.

    Args:
        block: from its number to its values.
        begins: :func:`starts` of the blocks.
        rows: in any order.
    """
    import pyarrow as pa

    wanted = np.asarray(rows, dtype=np.int64)
    of = np.searchsorted(begins, wanted, side="right") - 1
    values: list[Any] = [None] * len(wanted)
    for number in np.unique(of).tolist():
        places = np.flatnonzero(of == number)
        taken: list[Any]
        try:
            taken = block(number).take(wanted[places] - begins[number]).to_pylist()
        except (pa.ArrowException, OSError) as error:
            why = BadImageError(f"the data set cannot be read here: {str(error).splitlines()[0]}")
            taken = [why] * len(places)
        for place, value in zip(places.tolist(), taken, strict=True):
            values[place] = value
    return values


def check_schemas(paths: Sequence[Path], schemas: Sequence[pa.Schema], features: Features) -> None:
    """Refuse files whose columns do not fit together.

    Args:
        paths: of the files.
        schemas: of each.
        features: the columns that all must have.

    Raises:
        FedloraError: for a column that is missing or there twice, and where numbers stand for other
            classes in one file than in another.
    """
    classes: dict[str, list[str]] = {}
    for path, schema in zip(paths, schemas, strict=True):
        own = _noted(schema)
        for name in features:
            count = schema.names.count(name)
            if count != 1:
                has = f"{count} columns called" if count else "no column"
                raise FedloraError(
                    f"{path} has {has} {name!r}, unlike the data set's first file or what its "
                    "README.md says. Give all files the same columns."
                )
            names = names_of(own.get(name))
            if names and names != classes.setdefault(name, names):
                raise FedloraError(
                    f"{path}: column {name!r} has the classes {listed(names)}, other files have "
                    f"{listed(classes[name])}. Give all files the same, in the same order."
                )


def _noted(schema: pa.Schema) -> Mapping[str, Any]:
    """The columns of a file as ``datasets`` noted them in it; empty where others wrote it."""
    from datasets import Features

    is_noted = b"huggingface" in (schema.metadata or {})
    return Features.from_arrow_schema(schema) if is_noted else {}


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds text: of pictures, their paths."""
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
