"""Tables of text in files: CSV, TSV and parquet, with rows as a reader of the file counts them."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.data.sources.arrow_columns import as_text, is_plain
from fedlora.data.sources.table_columns import ONE_LABEL, Column
from fedlora.errors import FedloraError

if TYPE_CHECKING:
    import pyarrow as pa

_DELIMITERS = (",", ";", "\t")
# What Excel writes and reads before the header.
_TOLD = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)
# Rows that are turned into columns at a time: so few that they are gone again before Python's
# garbage collector looks through them, which costs ten times more than to read them.
_CHUNK = 200
_SIGNATURES = {
    b"PK\x03\x04": "a zip archive or an Excel workbook",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook",
    b"\x1f\x8b": "compressed with gzip",
    b"ARROW1": "an Arrow file",
}
_SAVE_AS = "Save it as CSV in UTF-8, or as parquet"


@dataclass(frozen=True, eq=False)
class TextTable:
    """A table in which every value is text.

    Attributes:
        path: the file.
        columns: by name, (n,) each.
        rows: (n,), the number of each row in the file: the header of a CSV file is row 1, a record
            with line breaks in it is one row, an empty line is one too (but not in here).
    """

    path: Path
    columns: dict[str, Sequence[str]]
    rows: Sequence[int]

    def column(self, name: str) -> Column:
        """One column, with the names of its rows."""
        return Column(name, self.columns[name], self.where)

    def where(self, position: int) -> str:
        """What messages call a row."""
        return _where(self.path, self.rows, position)


def _where(path: Path, rows: Sequence[int], position: int) -> str:
    return f"{path} row {rows[position]:,}"


def read_table(path: Path, wanted: Sequence[str]) -> TextTable:
    """Read a file.

    Args:
        path: CSV with commas, semicolons or tabs, in UTF-8; or parquet, told by its first bytes.
        wanted: columns that ought to be there: they tell the delimiter.

    Raises:
        FedloraError: if it is no such file, has no rows, or a row is broken; names the row.
    """
    try:
        with path.open("rb") as file:
            head = file.read(8)
        if not head:
            raise FedloraError(f"data.source.path: {path} is empty. Check how it was made.")
        if head.startswith(b"PAR1"):
            table = _read_parquet(path, wanted)
        else:
            _check_signature(path, head)
            table = _read_csv(path, wanted)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not table.rows:
        raise FedloraError(f"data.source.path: {path} has a header but no rows: no pictures.")
    return table


def _unreadable(path: Path, error: OSError) -> FedloraError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return FedloraError(
            f"data.source.path must be a file, got {path}, which does not exist. Mend the path; a "
            "relative one counts from the folder in which fedlora is started."
        )
    if isinstance(error, IsADirectoryError):
        return FedloraError(
            f"data.source.path must be a file, got the folder {path}. Name the CSV or parquet file "
            "that lists the pictures; for pictures in folders use ImageFolder, for a data set of "
            "the Hugging Face hub HuggingFaceImages."
        )
    return FedloraError(f"data.source.path: {path} cannot be read: {error.strerror or error}.")


def _check_signature(path: Path, head: bytes) -> None:
    for signature, kind in _SIGNATURES.items():
        if head.startswith(signature):
            raise FedloraError(f"data.source.path: {path} is {kind}, not text. {_SAVE_AS}.")
    if path.suffix.lower() in (".parquet", ".pq"):
        raise FedloraError(f"data.source.path: {path} is not a parquet file. Make it anew.")


def _read_csv(path: Path, wanted: Sequence[str]) -> TextTable:
    # What is no UTF-8 becomes lone surrogates, which are found later together with their row.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        told = _TOLD.fullmatch(file.readline())
        file.seek(0)
        delimiter = told[1] if told else _delimiter(file, wanted)
        file.seek(0)
        records = csv.reader(file, delimiter=delimiter, strict=True, skipinitialspace=True)
        numbered = enumerate(_clear(records, path), 1)
        if told:
            next(numbered)
        header = _header(path, next((row for row in numbered if any(row[1])), (1, [])))
        columns: list[list[str]] = [[] for _ in header]
        rows: list[int] = []
        filled = _whole(numbered, len(header), path)
        while chunk := list(islice(filled, _CHUNK)):
            numbers, parts = zip(*chunk, strict=True)
            rows += numbers
            for name, column, part in zip(header, columns, zip(*parts, strict=True), strict=True):
                _check_text(Column(name, part, partial(_where, path, numbers)))
                column += map(str.strip, part)
    named = dict(zip(header, columns, strict=True))
    # A column without a name is the index that pandas writes, or a delimiter at the end of lines.
    return TextTable(path, {name: named[name] for name in named if name}, rows)


def _delimiter(lines: Iterable[str], wanted: Sequence[str]) -> str:
    """The delimiter that finds most of the wanted columns in the header, or else most columns."""
    first = list(islice(lines, 20))

    def found(delimiter: str) -> tuple[int, int]:
        try:
            reader = csv.reader(first, delimiter=delimiter, skipinitialspace=True)
            header = [name.strip() for name in next(filter(any, reader), [])]
        except csv.Error:
            return 0, 0
        return len(set(wanted) & set(header)), len(header)

    return max(_DELIMITERS, key=found)


def _clear(records: Iterator[list[str]], path: Path) -> Iterator[list[str]]:
    """The records; what is wrong with one in one line that names its row."""
    row = 0
    try:
        for record in records:
            row += 1
            yield record
    except csv.Error as error:
        hint = {
            "unexpected end of data": "a quote is opened and never closed",
            "field larger than field limit (131072)": "a quote is opened and never closed",
        }.get(str(error), f"{error}: a quote inside a quoted field must be doubled")
        raise FedloraError(f"{path} row {row + 1:,}: {hint}. Mend the row.") from error


def _header(path: Path, first: tuple[int, list[str]]) -> list[str]:
    row, record = first
    if not record:
        raise FedloraError(f"data.source.path: {path} is empty. Check how it was made.")
    names = [name.strip() for name in record]
    _check_text(Column("header", names, partial(_where, path, [row] * len(names))))
    _check_distinct(path, names)
    return names


def _check_distinct(path: Path, names: Sequence[str]) -> None:
    for i, name in enumerate(names):
        if name and name in names[:i]:
            raise FedloraError(
                f"{path} has two columns called {name!r} (columns {names.index(name) + 1} and "
                f"{i + 1}). Rename one."
            )


def _whole(
    records: Iterable[tuple[int, list[str]]], width: int, path: Path
) -> Iterator[tuple[int, list[str]]]:
    """Rows that hold something, each with as many fields as the header."""
    for row, record in records:
        if len(record) != width:
            if not any(record):
                continue
            raise FedloraError(
                f"{path} row {row:,} has {len(record)} fields, the header has {width}: "
                f"{_shortened(record)}. Put a value that has the delimiter in it into quotes."
            )
        if any(record):
            yield row, record


def _shortened(record: list[str]) -> str:
    text = repr(record)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _check_text(column: Column) -> None:
    """Refuse what no text may hold."""
    joined = "".join(column.values)
    if joined.isascii() and "\0" not in joined:
        return
    for i, value in enumerate(column.values):
        if "\0" in value:
            raise column.error(i, f"there is a NUL byte in it, {value[:40]!r}. {_SAVE_AS}.")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise column.error(i, f"this is not UTF-8, {value[:40]!r}. {_SAVE_AS}.") from None


def _read_parquet(path: Path, wanted: Sequence[str]) -> TextTable:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        _check_distinct(path, schema.names)
        for name in set(wanted) & set(schema.names):
            _check_type(path, name, schema.field(name).type)
        names = [field.name for field in schema if is_plain(field.type)]
        table = file.read(columns=names)
        columns = {name: as_text(table[name]) for name in names}
    except pa.ArrowException as error:
        why = str(error).splitlines()[0]
        raise FedloraError(
            f"data.source.path: {path} cannot be read: {why}. Make it anew."
        ) from error
    return TextTable(path, columns, range(1, table.num_rows + 1))


def _check_type(path: Path, name: str, kind: pa.DataType) -> None:
    import pyarrow as pa

    if is_plain(kind):
        return
    hint = (
        "Name a column of text or numbers; if the pictures are in the file itself, use "
        "HuggingFaceImages."
    )
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        hint = ONE_LABEL
    raise FedloraError(f"{path}, column {name!r} has a {kind} in each row. {hint}")
