"""Named tensors: copied out, and put back only if every one of them fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, ValuesView
from typing import Any

import torch
from torch import Tensor

from fedlora.errors import FedloraError

SHOWN = 5  # faults that a message spells out


def copy_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, in their own types."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], given: object) -> None:
    """Overwrite ``tensors`` in place with the values of the same names.

    Args:
        tensors: what is to be set.
        given: a tensor of the same shape and type for each of them, on any device.

    Raises:
        FedloraError: names every value that is missing, unknown, of another shape or type or not
            finite; nothing is changed then.
    """
    if not isinstance(given, Mapping):
        raise FedloraError(
            "parameters must be a dict of name -> tensor, as get_parameters gives it, got "
            f"{type(given).__name__}."
        )
    refuse(list(_faults(tensors, given)), "parameters")
    for name, tensor in tensors.items():
        tensor.copy_(given[name])


def refuse(faults: list[str], what: str) -> None:
    """Raise one line for a list of faults; nothing where it is empty.

    Raises:
        FedloraError: with the first few faults and the number of the others.
    """
    if faults:
        more = f" (and {len(faults) - SHOWN} more)" if len(faults) > SHOWN else ""
        raise FedloraError(
            f"{what} do not fit this model, nothing was changed: {'; '.join(faults[:SHOWN])}{more}."
        )


def _faults(tensors: Mapping[str, Tensor], given: Mapping[object, object]) -> Iterator[str]:
    for name in tensors:
        if name not in given:
            yield f"{name!r} is missing"
    for key, value in given.items():
        if not isinstance(key, str) or key not in tensors:
            yield f"{key!r} is unknown here"
        elif not isinstance(value, Tensor):
            yield f"{key!r} is a {type(value).__name__}, expected a tensor"
        else:
            yield from mismatch(key, tensors[key], value)


def mismatch(name: str, want: Tensor, got: Tensor) -> Iterator[str]:
    """What keeps ``got`` from taking the place of ``want``: shape, type, values."""
    if got.shape != want.shape:
        yield f"{name!r} has shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    elif got.dtype != want.dtype:
        yield f"{name!r} is {got.dtype}, expected {want.dtype}"
    elif not bool(got.isfinite().all()):
        yield f"{name!r} has values that are NaN or infinite"


# Values in a format that is not ours: nested dicts and lists of tensors and arrays.


def as_tensor(value: object) -> Tensor | None:
    """A tensor or an array of numbers as a tensor; None for anything else."""
    if isinstance(value, Tensor):
        return value.detach()
    if type(value).__module__ != "numpy" or not hasattr(value, "dtype"):
        return None
    array: Any = value
    try:
        # A copy, for torch takes none that is read-only or reversed.
        return torch.as_tensor(array.copy())
    except TypeError:  # words, objects
        return None


def opened(value: object) -> object:
    """Views and arrays of objects as lists."""
    array: Any = value
    is_array = type(value).__module__ == "numpy" and hasattr(value, "dtype")
    if isinstance(value, ValuesView) or (is_array and array.dtype.kind == "O" and array.ndim):
        return list(array)
    return value


def part_like(own: object, given: object) -> object | None:
    """``own``, or the one part of it that has the form of ``given``; None if none is."""
    if "other" in (_kind(own), _kind(given)):
        return None
    parts = [item for item in _items(own) if _kind(item) in ("dict", "list")]
    for option in (own, *parts):
        if _alike(option, given):
            return option
    return (parts or [own])[0] if len(parts) < 2 else None


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        return "dict"
    if isinstance(value, list | tuple):
        return "list"
    return "other" if as_tensor(value) is None else "tensor"


def _items(value: object) -> list[object]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []


def _alike(one: Any, two: Any) -> bool:
    kind = _kind(one)
    if kind != _kind(two):
        return False
    if kind == "dict":
        return bool(one.keys() & two.keys())
    nested = [_kind(v) in ("dict", "list") for value in (one, two) for v in _items(value)[:1]]
    return kind == "tensor" or (len(nested) == 2 and nested[0] == nested[1])


def differences(own: Any, given: Any, name: str = "") -> Iterator[str]:
    """What keeps ``given`` from taking the place of ``own``: names, numbers, shapes, values.

    Another type is none: averages come back in one now and then, and are converted.
    """
    kind = _kind(own)
    if kind == "other":
        return
    value = _converted(given)
    foreign = not isinstance(given, str | bytes | Mapping | list | tuple | None)
    if kind == "tensor" and (foreign or value is not None):
        mine = as_tensor(own)
        if mine is not None and value is not None:
            yield from mismatch(name or "the whole", mine.to(value.dtype), value)
    elif kind != _kind(given):
        want = {"dict": "a dict", "list": "a list"}.get(kind, "a tensor or an array")
        yield f"{name or 'the whole'!r} is a {type(given).__name__}, expected {want}"
    elif kind == "list":
        if len(own) != len(given):
            # zip() would stop at the shorter one.
            yield f"there are {len(given)} values, expected {len(own)}"
        for index, (mine, value) in enumerate(zip(own, given, strict=False)):
            yield from differences(mine, value, f"{name} value {index}".strip())
    else:
        yield from _different_names(own, given, name)


def _converted(value: object) -> Tensor | None:
    """Nested lists of numbers too, as JSON gives them."""
    first = value
    while isinstance(first, list | tuple) and first:
        first = first[0]
    if not isinstance(first, int | float):  # a list of arrays is none itself
        return as_tensor(value)
    try:
        return torch.tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _different_names(own: Any, given: Any, name: str) -> Iterator[str]:
    for key in own:
        if key in given:
            yield from differences(own[key], given[key], f"{name}.{key}".lstrip("."))
        elif _kind(own[key]) != "other":
            yield f"{key!r} is missing"
    for key in given:
        if key not in own and _kind(given[key]) != "other":
            yield f"{key!r} is unknown here"
