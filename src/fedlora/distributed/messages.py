"""What processes tell each other, as bytes of which nothing is ever executed."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor


def encode(value: Any) -> Tensor:
    """A value as one tensor of bytes.

    Args:
        value: what ``torch.load(weights_only=True)`` reads: None, numbers, strings, tensors, and
            lists, tuples, sets and dicts of these.

    Returns:
        (n,) uint8 on the CPU.

    Example:
        >>> decode(encode({"round": 3, "A": torch.ones(2)}))
        {'round': 3, 'A': tensor([1., 1.])}
    """
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def decode(message: Tensor) -> Any:
    """The inverse of :func:`encode`; tensors are on the CPU, to the bit and with their strides.

    Raises:
        pickle.UnpicklingError: for anything else in it.
    """
    buffer = io.BytesIO(message.numpy().tobytes())
    return torch.load(buffer, map_location="cpu", weights_only=True)
