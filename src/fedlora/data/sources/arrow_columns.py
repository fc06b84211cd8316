"""Columns of Arrow tables as text."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa


def is_plain(kind: pa.DataType) -> bool:
    """Whether values of a type are text, numbers or the like: neither nested nor binary."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return is_plain(kind.value_type)
    # Extensions (a UUID, say) are bytes to most who write them.
    other = pa.types.is_nested(kind) or isinstance(kind, pa.BaseExtensionType)
    return not (other or "binary" in str(kind))


def as_text(column: pa.ChunkedArray) -> Sequence[str]:
    """The values of a plain column, (n,), without spaces around them; null and nan are empty."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
        # Whole numbers become floats in pandas where one is missing.
        with suppress(pa.ArrowInvalid):
            column = column.cast(pa.int64())
    text = column.cast(pa.large_string()).fill_null("").to_pylist()
    return [value.strip() for value in text]
