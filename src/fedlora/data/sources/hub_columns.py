"""Which column of a data set holds the pictures and which the labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.data.sources.classes import listed
from fedlora.data.sources.table_columns import ONE_LABEL, find_column
from fedlora.errors import FedloraError

_PICTURES = ("image", "img", "picture", "jpg", "jpeg", "png", "webp")
_LABELS = ("label", "labels", "class", "category", "target", "fine_label", "cls")


def picture_column(features: Mapping[str, Any], given: str | None, name: str) -> str:
    """The column of the pictures.

    Args:
        features: column -> what it holds.
        given: as the user named it; None to find it.
        name: of the data set, for messages.

    Raises:
        FedloraError: if it is not there or holds no pictures, or several columns may be meant.
    """
    if given is not None:
        found = find_column(given, list(features), "data.source.image_column", name)
        if not (_holds_pictures(features[found]) or _kind(features[found]) in _TEXT):
            raise FedloraError(
                f"{name}, column {found!r} holds no pictures but {features[found]}. Name one of "
                f"{listed(features, 20)} in data.source.image_column."
            )
        return found
    declared = [column for column, feature in features.items() if _is(feature, "Image")]
    held = [column for column, feature in features.items() if _holds_pictures(feature)]
    # A column of text may hold paths, but only its name can say so.
    paths = [column for column in _PICTURES if _kind(features.get(column)) in _TEXT]
    return _one(declared or held or paths, _PICTURES, features, "pictures", "image_column", name)


def label_column(features: Mapping[str, Any], given: str | None, name: str) -> str:
    """The column of the labels; as :func:`picture_column`.

    Raises:
        FedloraError: if it is not there or holds several labels a row, or several columns may be
            meant.
    """
    if given is not None:
        found = find_column(given, list(features), "data.source.label_column", name)
    else:
        declared = [column for column, feature in features.items() if _is(feature, "ClassLabel")]
        usual = [column for column in features if column.lower() in _LABELS]
        found = _one(declared or usual, _LABELS, features, "labels", "label_column", name)
    if not _is(features[found], "ClassLabel", "Value"):
        lists = _is(features[found], "List", "LargeList", "Sequence")
        raise FedloraError(
            f"{name}, column {found!r} holds {'lists' if lists else features[found]} instead of "
            f"single values. {ONE_LABEL} Set data.source.label_column to another column."
        )
    return found


def scalar_columns(features: Mapping[str, Any]) -> list[str]:
    """Columns of text, numbers and classes."""
    return [
        column
        for column, feature in features.items()
        if _is(feature, "ClassLabel") or (_kind(feature) and "binary" not in _kind(feature))
    ]


def names_of(feature: Any) -> list[str] | None:
    """The names of a column of classes; None for any other column."""
    return list(feature.names) if _is(feature, "ClassLabel") else None


_TEXT = ("string", "large_string")


def _is(feature: Any, *types: str) -> bool:
    # By name: datasets takes a second to import, and only those who opened a data set need it.
    return type(feature).__name__ in types


def _kind(feature: Any) -> str:
    """The type of a plain column; empty for any other."""
    return str(feature.dtype) if _is(feature, "Value") else ""


def _holds_pictures(feature: Any) -> bool:
    if isinstance(feature, Mapping):  # as Image is written by others
        return "bytes" in feature
    return _is(feature, "Image") or "binary" in _kind(feature)


def _one(
    candidates: Sequence[str],
    usual: Sequence[str],
    features: Mapping[str, Any],
    what: str,
    option: str,
    name: str,
) -> str:
    """The only candidate, or the only one with a usual name."""
    likely = [column for column in candidates if column.lower() in usual]
    for found in (candidates, likely):
        if len(found) == 1:
            return found[0]
    several = f"several columns may hold the {what}: {listed(candidates, 20)}"
    none = f"no column can be told to hold the {what} among {listed(features, 20)}"
    raise FedloraError(
        f"{name}: {several if candidates else none}. Set data.source.{option} to the one that does."
    )
