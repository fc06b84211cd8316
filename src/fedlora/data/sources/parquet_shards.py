"""Splits in parquet files, read where they are."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora.data.sources.files_on_disk import stamps
from fedlora.data.sources.shards import Shards, by_block, check_schemas, is_text, starts
from fedlora.errors import FedloraError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features

# Bytes of pictures in a row group, which is read as a whole. Beyond 2 GB pyarrow cannot.
_LARGEST_GROUP = 1_000_000_000
# Row groups in memory: threads that read next to each other need the same one or its neighbour.
_GROUPS = 2


class ParquetShards(Shards):
    """Parquet files, read a row group at a time and without a copy of them on disk.

    Args:
        files: in their order.
        features: their columns.
        folder: from which relative paths of pictures count.

    Raises:
        FedloraError: if a file's columns are others.
    """

    def __init__(self, files: Sequence[Path], features: Features, folder: Path) -> None:
        import pyarrow.parquet as pq

        super().__init__(features, folder)
        self._paths = files
        self._files = [pq.ParquetFile(path, memory_map=True) for path in files]
        check_schemas(files, [file.schema_arrow for file in self._files], features)
        self._groups = [
            (file, group) for file in self._files for group in range(file.metadata.num_row_groups)
        ]
        self._starts = starts([f.metadata.row_group(g).num_rows for f, g in self._groups])
        self._lock = Lock()
        self._newest: OrderedDict[tuple[str, int], pa.ChunkedArray] = OrderedDict()

    def __len__(self) -> int:
        """The number of rows."""
        return int(self._starts[-1])

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of all rows."""
        import pyarrow as pa

        parts = [file.read(columns=[name]).column(name) for file in self._files]
        kind = parts[0].type
        return pa.chunked_array([chunk for p in parts for chunk in p.cast(kind).chunks], kind)

    def pictures(self, name: str, rows: Sequence[int]) -> list[Any]:
        """What stands in the column of pictures."""
        return by_block(lambda group: self._group(name, group), self._starts, rows)

    def check(self, name: str) -> None:
        """Refuse row groups that are too large.

        Raises:
            FedloraError: says what to do.
        """
        for path, file in zip(self._paths, self._files, strict=True):
            for group in range(file.metadata.num_row_groups):
                size = sum(leaf.total_uncompressed_size for leaf in _leaves(file, group, name))
                if size > _LARGEST_GROUP:
                    raise FedloraError(
                        f"{path} has {size / 1e9:.1f} GB of pictures in one row group, which is "
                        f"read as a whole: at most {_LARGEST_GROUP / 1e9:g} GB. Write it anew with "
                        "smaller ones, in pandas for example with df.to_parquet(path, "
                        "row_group_size=1000)."
                    )

    def _group(self, name: str, number: int) -> pa.ChunkedArray:
        # One at a time: threads that wait for the same group then find it.
        with self._lock:
            found = self._newest.pop((name, number), None)
            if found is None:
                file, group = self._groups[number]
                found = file.read_row_group(group, columns=[name]).column(name)
            self._newest[name, number] = found
            while len(self._newest) > _GROUPS:
                self._newest.popitem(last=False)
            return found

    def _marks(self) -> NDArray[np.str_]:
        lengths = [file.metadata.num_rows for file in self._files]
        # With where a file begins: another one before it moves all of its rows to other numbers.
        marks = zip(stamps(self._paths).tolist(), starts(lengths).tolist(), strict=False)
        return np.repeat(np.array([f"{mark}@{begin}" for mark, begin in marks]), lengths)

    def _lone_paths(self, name: str) -> list[str | None]:
        kind = self._files[0].schema_arrow.field(name).type
        if is_text(kind):
            return list(self.column(name).to_pylist())
        leaves = [leaf for file, group in self._groups for leaf in _leaves(file, group, name)]
        data = [leaf for leaf in leaves if leaf.path_in_schema == f"{name}.bytes"]
        # Whether a row has its bytes would only show by reading all: the statistics must say it.
        full = all(leaf.is_stats_set and leaf.statistics.null_count == 0 for leaf in data)
        if full or not any(leaf.path_in_schema == f"{name}.path" for leaf in leaves):
            return []
        columns = [file.read(columns=[f"{name}.path"]).column(name) for file in self._files]
        return [row and row["path"] for column in columns for row in column.to_pylist()]


def _leaves(file: Any, group: int, name: str) -> list[Any]:
    """What the metadata says of a column in a row group, of each of its parts if it is nested."""
    found = file.metadata.row_group(group)
    columns = [found.column(i) for i in range(found.num_columns)]
    return [column for column in columns if f"{column.path_in_schema}.".startswith(f"{name}.")]
