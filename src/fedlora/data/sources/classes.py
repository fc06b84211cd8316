"""From what stands in the data (a folder's name, a value in a column) to labels and class names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.errors import FedloraError

# As a user gives them: in their order; or what the data says -> what prompts say; or not at all.
ClassNames = list[str] | dict[str, str] | None

_INTEGER = re.compile(r"-?\d+", re.ASCII)


def check_class_names(given: ClassNames) -> ClassNames:
    """Check what a user gives as class names, without looking at any data.

    Args:
        given: a list of names, a dict from what the data says to names, or None.

    Returns:
        A copy in Unicode's composed form (NFC).

    Raises:
        FedloraError: if it is something else or empty, a name is empty or no text, or two classes
            have the same name.
    """
    if given is None:
        return None
    if not isinstance(given, list | tuple | dict) or not given:
        raise FedloraError(
            "data.source.class_names must be a list of names, or a dict from what the data says "
            f"to names, got {given!r}. Write for example [cat, dog], or leave it out."
        )
    values = [_text(value) for value in given]
    _check_distinct(values)
    if not isinstance(given, dict):
        return values
    names = [_text(name) for name in given.values()]
    _check_distinct(names)
    return dict(zip(values, names, strict=True))


def label_rows(
    found: Sequence[str] | NDArray[np.str_], given: ClassNames, what: str
) -> tuple[NDArray[np.int64], list[str]]:
    """Turn what the data says of each picture into labels.

    Names are compared in Unicode's composed form (NFC), so that "é" written in one character and
    in two is the same. Where ``given`` is None the classes come in the order of their names, or by
    number where all are integers, and none may differ from another in case alone.

    Args:
        found: (n,), what the data says of each row.
        given: the user's ``class_names``: None for the values as they are; a list: these, in this
            order; a dict: from values to names, in this order.
        what: what a value is, for messages, one of them: "class folder", "value of column 'label'".

    Returns:
        (n,) int64, labels; and the class names in their order.

    Raises:
        FedloraError: if a value is not among the given ones or one of those is not found, there
            are fewer than two classes, a value is empty or not valid Unicode, or two differ in case
            alone and ``given`` is None.

    Example:
        >>> label_rows(["dog", "cat", "dog"], None, "folder")
        (array([1, 0, 1]), ['cat', 'dog'])
        >>> label_rows(["n02", "n01", "n02"], {"n02": "cat", "n01": "tench"}, "folder")
        (array([0, 1, 0]), ['cat', 'tench'])
    """
    given = check_class_names(given)
    # Not np.unique, which sorts: there are many rows and few classes.
    seen: dict[str, int] = {}
    rows = found.tolist() if isinstance(found, np.ndarray) else found
    codes = np.fromiter((seen.setdefault(row, len(seen)) for row in rows), np.int64, len(rows))
    values = [_class(value, what) for value in seen]
    if given is None:
        order = _sorted(set(values))
        names = order
        _check_case(order, what)
    else:
        order = list(given)
        names = list(given.values()) if isinstance(given, dict) else order
        _check_same(set(values), order, what)
    _check_several(names, what)
    positions = {value: i for i, value in enumerate(order)}
    return np.array([positions[value] for value in values], dtype=np.int64)[codes], names


def listed(names: Iterable[str], most: int = 6) -> str:
    """Names for a message: the first few, quoted, and how many more there are.

    Example:
        >>> listed(["a", "b", "c"], most=2)
        "'a', 'b' and 1 more"
    """
    quoted = [repr(name) for name in names]
    rest = len(quoted) - most
    return ", ".join(quoted[:most]) + (f" and {rest:,} more" if rest > 0 else "")


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """The end of a message, with the nearest candidate; empty where none is near.

    Example:
        >>> did_you_mean("trian", ["train", "test"])
        " Did you mean 'train'?"
    """
    near = get_close_matches(name, list(candidates), 1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _text(value: Any) -> str:
    if type(value) is int:  # how YAML reads "0: zero", and jsonargparse lets it pass
        return str(value)
    if not isinstance(value, str):
        raise FedloraError(
            f"data.source.class_names must hold text only, got {value!r}. Write it in quotes: "
            f"'{value}'."
        )
    if not value.strip():
        raise FedloraError(
            f"data.source.class_names must not hold empty names, got {value!r}. Give every class a "
            "name that a prompt can say."
        )
    return unicodedata.normalize("NFC", value)


def _check_distinct(names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise FedloraError(
                f"data.source.class_names must be distinct, got {name!r} twice. Prompts could not "
                "tell the two classes apart: rename one."
            )
        seen.add(name)


def _class(value: str, what: str) -> str:
    if not value.strip():
        raise FedloraError(f"a {what} is empty ({value!r}): every picture needs a class.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise FedloraError(
            f"a {what} is not valid Unicode, {value!r}: no prompt can say it. Rename it in UTF-8."
        ) from error
    return unicodedata.normalize("NFC", value)


def _sorted(values: set[str]) -> list[str]:
    if all(_INTEGER.fullmatch(value) for value in values):
        return sorted(values, key=lambda value: (int(value), value))
    return sorted(values)


def _check_case(names: list[str], what: str) -> None:
    """Refuse one class written in two ways, each of which would be a class of its own."""
    seen: dict[str, str] = {}
    for name in names:
        first = seen.setdefault(name.casefold(), name)
        if first != name:
            raise FedloraError(
                f"{first!r} and {name!r} (each {what} is a class) differ in case only, which "
                "prompts do not tell. If they are one class, write it in one way; if not, list all "
                "classes in data.source.class_names."
            )


def _check_same(found: set[str], given: list[str], what: str) -> None:
    for value in given:
        if value not in found:
            rest = _sorted(found - set(given)) or _sorted(found)
            instead = " Leave it out."
            if not found & set(given):
                instead = f" Write a dict from what there is to names, {{{rest[0]}: {value}, ...}}."
            raise FedloraError(
                f"data.source.class_names lists {value!r} but there is no {what} of that name, "
                f"found {listed(rest)}.{did_you_mean(value, rest) or instead}"
            )
    extra = _sorted(found - set(given))
    if extra:
        raise FedloraError(
            f"data.source.class_names must list every {what}, {listed(extra)} is missing. Add it, "
            "or take its pictures out of the data."
        )


def _check_several(names: list[str], what: str) -> None:
    if len(names) < 2:
        there_is = f"one class only, {names[0]!r}" if names else "no class"
        raise FedloraError(
            f"there is {there_is} (each {what} is a class): a classifier needs two or more. Look "
            "whether data.source points to the right place, or add pictures of another class."
        )
