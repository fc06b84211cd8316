"""Plain data as bytes, so that nothing that arrives is ever executed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

ALIGN = 16  # bytes: a tensor's numbers start at a multiple of this
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}


def encode(value: Any) -> Tensor:
    """Plain data as one tensor of bytes.

    Args:
        value: None, numbers, strings, tensors, and lists, tuples and dicts of these. A tuple
            arrives as a list.

    Returns:
        (n,) uint8 on the CPU.

    Raises:
        TypeError: for anything else.

    Example:
        >>> decode(encode({"round": 3, "A": torch.ones(2)}))
        {'round': 3, 'A': tensor([1., 1.])}
    """
    tensors: list[Tensor] = []
    head = json.dumps(_plain(value, tensors)).encode()
    # The length of the head, the head, and the tensors' bytes, each padded.
    parts = [torch.tensor([len(head)]).view(torch.uint8), _bytes(head)]
    size = 8 + len(head)
    for tensor in tensors:
        flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        parts += [torch.zeros(-size % ALIGN, dtype=torch.uint8), flat]
        size += -size % ALIGN + len(flat)
    return torch.cat(parts)


def decode(message: Tensor) -> Any:
    """The inverse of :func:`encode`; tensors are on the CPU and share no memory."""
    length = int(message[:8].clone().view(torch.int64))
    place = 8 + length

    def build(plain: Any) -> Any:
        nonlocal place
        if not isinstance(plain, list):
            return plain
        kind, content = plain[0], plain[1:]
        if kind == "list":
            return [build(item) for item in content]
        if kind == "dict":
            return {build(key): build(item) for key, item in content}
        dtype, shape = _DTYPES[content[0]], content[1]
        place += -place % ALIGN
        size = dtype.itemsize * torch.Size(shape).numel()
        flat = message[place : place + size].clone()
        place += size
        return flat.view(dtype).reshape(shape)

    return build(json.loads(bytes(message[8 : 8 + length].numpy())))


def _plain(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return ["tensor", str(value.dtype).removeprefix("torch."), list(value.shape)]
    if isinstance(value, Mapping):
        pairs = ([_plain(key, tensors), _plain(item, tensors)] for key, item in value.items())
        return ["dict", *pairs]
    if isinstance(value, list | tuple):
        return ["list", *(_plain(item, tensors) for item in value)]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"{type(value).__name__} is no plain data that processes could exchange")


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
