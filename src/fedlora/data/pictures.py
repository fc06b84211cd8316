"""Pictures and labels in whatever form a user has them, brought to what a model's step takes."""

from __future__ import annotations

import os
import reprlib
import sys
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.data.decode import to_rgb
from fedlora.data.preprocess import ImagePreprocess
from fedlora.errors import FedloraError

if TYPE_CHECKING:
    from PIL.Image import Image

_ALLOWED = (
    "uint8 pictures (a torch tensor (n, C, H, W) or (C, H, W), a numpy array (n, H, W, 3), "
    "(H, W, 3), (n, H, W) or (H, W), a PIL image, or a list of these, of any sizes) or floating "
    "point pixel_values as the model's processor makes them"
)
_SAY_HOW = (
    "Give channels first as a torch tensor (n, C, H, W), channels last as a numpy array "
    "(n, H, W, 3), C being 1 or 3; for grey pictures or four channels use a list of PIL images"
)


def to_pixels(data: object, preprocess: ImagePreprocess) -> Tensor:
    """Bring pictures of any common form to a model's size.

    Pixels that are resized come out the same to the bit, whichever form they came in. Colours are
    RGB; what OpenCV reads is BGR, which no shape tells: turn it round with ``x[..., ::-1]`` first.
    Transparency is laid over white, as transformers' ``convert_to_rgb`` does.

    Args:
        data: uint8 or floating point.

            - uint8 torch tensor: channels first, (n, C, H, W) or (C, H, W), C 1 or 3;
            - uint8 numpy array: channels last, (n, H, W, 3) or (H, W, 3), grey (n, H, W) or
              (H, W); also (n, C, H, W) where only one reading leads to 1 or 3 channels;
            - PIL image of any mode but 16-bit or 32-bit grey;
            - a list or tuple of these, of any sizes, in this order;
            - floating point tensor or array: taken for pixel_values, already resized and
              normalised, (n, 3, size, size); in a list also (3, size, size).
        preprocess: the model's size and filter.

    Returns:
        (n, 3, size, size), uint8 on the CPU; or floats as they came, on the device they were on.
        May share memory with ``data``.

    Raises:
        FedloraError: if ``data`` is empty, of another type or shape, or its shape can be read in
            two ways.
    """
    if not isinstance(data, list | tuple):
        return _pixels(data, preprocess, "images")
    if not data:
        raise FedloraError(f"images must be at least one picture, got an empty {_kind(data)}.")
    parts = [_pixels(_batched(entry), preprocess, f"images[{i}]") for i, entry in enumerate(data)]
    kinds = sorted({f"{part.dtype} on {part.device}" for part in parts})
    if len(kinds) > 1:
        raise FedloraError(
            "images must be all uint8 or PIL, or all floating point of one type on one device, "
            f"got a {_kind(data)} of {', '.join(kinds)}. Give uint8 or PIL to have them resized."
        )
    return torch.cat(parts)


def to_labels(labels: object, count: int, num_classes: int) -> Tensor:
    """Bring labels of any common form to what a loss takes.

    Args:
        labels: whole numbers: a list or tuple, a numpy array or tensor (n,) of any integer type,
            or a single number for one picture.
        count: n, the number of pictures.
        num_classes: labels are from 0 to this, exclusive.

    Returns:
        (n,), int64, on the CPU.

    Raises:
        FedloraError: if a label is no whole number or out of range, or there are not ``count``.
    """
    values = _integers(labels)
    if len(values) != count:
        raise FedloraError(
            f"labels must be one per picture, got {len(values)} for {count} picture(s)."
        )
    for value in values:
        if not 0 <= value < num_classes:
            raise FedloraError(
                f"labels must be between 0 and {num_classes - 1} (there are {num_classes} "
                f"classes), got {value}."
            )
    return torch.tensor(values, dtype=torch.int64)


def _pixels(data: object, preprocess: ImagePreprocess, name: str) -> Tensor:
    """``to_pixels`` of what is no list."""
    if isinstance(data, Tensor):
        pictures = data
    elif isinstance(data, np.ndarray):
        pictures = _from_array(data, name)
    elif _is_pil(data):
        pictures = _from_pil(data, name)
    else:
        opened = " Open files with PIL.Image.open." if isinstance(data, str | os.PathLike) else ""
        raise FedloraError(f"{name} must be {_ALLOWED}, got {_kind(data)}.{opened}")
    if pictures.is_floating_point():
        return _checked(pictures, preprocess.size, name)
    return _resized(pictures, preprocess, name)


def _batched(entry: object) -> object:
    """One float picture in a list as a batch of one, so that a list of them is stacked."""
    if isinstance(entry, Tensor):
        alone = entry.is_floating_point() and entry.ndim == 3
    else:
        alone = isinstance(entry, np.ndarray) and entry.dtype.kind == "f" and entry.ndim == 3
    return entry[None] if alone else entry  # type: ignore[index]


def _checked(pictures: Tensor, size: int, name: str) -> Tensor:
    if pictures.ndim != 4 or pictures.shape[1:] != (3, size, size) or not len(pictures):
        raise FedloraError(
            f"{name} of floating point must be (n, 3, {size}, {size}), n at least 1, normalised as "
            f"the model's processor does it, got {_kind(pictures)}. Give uint8 or PIL pictures to "
            "have them resized and normalised."
        )
    return pictures


def _resized(pictures: Tensor, preprocess: ImagePreprocess, name: str) -> Tensor:
    shape = pictures.shape
    if pictures.dtype != torch.uint8:
        raise FedloraError(f"{name} must be {_ALLOWED}, got {_kind(pictures)}.")
    if len(shape) not in (3, 4) or shape[-3] not in (1, 3) or not pictures.numel():
        raise FedloraError(
            f"{name} as uint8 must be (n, C, H, W) or (C, H, W), channels first, C 1 or 3, nothing "
            f"of length 0, got {_kind(pictures)}. Four channels: give PIL images."
        )
    # The CPU's filter is the one that agrees with PIL.
    return preprocess.resize(pictures.cpu().reshape(-1, *shape[-3:]))


def _from_array(array: NDArray[Any], name: str) -> Tensor:
    """The same values as a tensor; uint8 with the channels brought first."""
    if array.dtype.kind == "f" and array.dtype.itemsize <= 8:
        return _to_tensor(array)
    if array.dtype != np.uint8:
        deep = " Bring 16 bits to 8 first: (x // 256).astype('uint8')."
        raise FedloraError(
            f"{name} must be {_ALLOWED}, got {_kind(array)}."
            + (deep if array.dtype == np.uint16 else "")
        )
    return _to_tensor(_channels_first(array, name))


def _to_tensor(array: NDArray[Any]) -> Tensor:
    # torch takes neither flipped axes nor a foreign byte order, and warns of what is read-only.
    native = array.dtype.newbyteorder("=")
    return torch.from_numpy(np.require(array, dtype=native, requirements=["C", "W"]))


def _channels_first(array: NDArray[Any], name: str) -> NDArray[Any]:
    """(n, C, H, W), C 1 or 3; refuses what can be read in two ways."""
    if array.ndim == 2 and array.size:
        return array[None, None]
    if array.ndim in (3, 4) and array.size:
        first, last = array.shape[-3], array.shape[-1]
        if last in (1, 3) and first not in (1, 3):
            channels_last = array if array.ndim == 4 else array[None]
            return np.moveaxis(channels_last, -1, 1)
        # Three at the front of three axes are colours or grey pictures; one is the same either way.
        if first in (1, 3) and last not in (1, 3) and (array.ndim == 4 or first == 1):
            return array if array.ndim == 4 else array[None]
        # Two or four at the end are more likely channels, one of them transparency, than a width.
        if array.ndim == 3 and first not in (1, 3) and last not in (1, 2, 3, 4):
            return array[:, None]
    raise FedloraError(
        f"{name} must be pictures whose shape can be read in one way, got {_kind(array)}. "
        f"{_SAY_HOW}."
    )


def _is_pil(data: object) -> TypeGuard[Image]:
    # Whoever holds a PIL image has imported PIL: no need to import it to find out.
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(data, module.Image)


def _from_pil(image: Image, name: str) -> Tensor:
    """(1, 3, H, W), uint8."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise FedloraError(
            f"{name} must be a PIL image of 8 bits per channel, got {_kind(image)}, whose white "
            "nobody knows. Scale it yourself, for 16 bits so: "
            "PIL.Image.fromarray((numpy.asarray(image) // 256).astype('uint8'))."
        )
    try:
        pixels = np.array(to_rgb(image))
    except (OSError, SyntaxError, ValueError) as error:  # also what PIL raises on broken files
        raise FedloraError(
            f"{name} cannot be read or brought to RGB, got {_kind(image)}: {error}."
        ) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def _integers(labels: object) -> list[int]:
    if isinstance(labels, Tensor | np.ndarray):
        if labels.ndim > 1 or not _whole(labels):
            raise FedloraError(
                f"labels must be whole numbers of shape (n,), got {_kind(labels)}. Give class "
                "indices, not scores or one-hot rows."
            )
        found: list[int] = labels.reshape(-1).tolist()
        return found
    entries = labels if isinstance(labels, list | tuple) else [labels]
    return [_integer(entry) for entry in entries]


def _integer(entry: object) -> int:
    if isinstance(entry, Tensor | np.ndarray):
        usable = entry.ndim == 0 and _whole(entry)
    else:
        usable = isinstance(entry, int | np.integer) and not isinstance(entry, bool)
    if usable:
        return int(entry)  # type: ignore[call-overload, no-any-return]
    raise FedloraError(
        "labels must be whole numbers, one per picture (a list, a numpy array or a tensor), got "
        f"{_kind(entry)}."
    )


def _whole(values: Tensor | NDArray[Any]) -> bool:
    if isinstance(values, Tensor):
        return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
    return values.dtype.kind in "iu"


def _kind(data: object) -> str:
    """What something is, in a few words: its type, and its shape or the like."""
    if isinstance(data, Tensor):
        return f"{data.dtype} of shape {tuple(data.shape)}"
    if isinstance(data, np.ndarray):
        return f"a numpy array of {data.dtype} of shape {data.shape}"
    if _is_pil(data):
        return f"a PIL image of mode {data.mode}, {data.width} x {data.height} pixels"
    text = type(data).__name__
    # Only what is sure to be short and plain.
    return f"{text} {reprlib.repr(data)}" if isinstance(data, int | float | str) else text
