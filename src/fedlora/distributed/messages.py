"""What processes tell each other, as bytes of which nothing is ever executed."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

HEAD = 8  # bytes that say how long the text before the tensors is
PLAIN = (type(None), bool, int, float, str)
GROUPS: dict[str, type] = {"list": list, "tuple": tuple, "set": set}


def encode(value: Any) -> Tensor:
    """A value as one tensor of bytes: JSON that says where in the rest each tensor is.

    Args:
        value: None, numbers, strings, bytes, tensors, and lists, tuples, sets and dicts of these.

    Returns:
        (n,) uint8 on the CPU.

    Raises:
        TypeError: for anything else.

    Example:
        >>> decode(encode({"round": 3, "A": torch.ones(2)}))
        {'round': 3, 'A': tensor([1., 1.])}
    """
    parts: list[Tensor] = []
    text = json.dumps(_described(value, parts)).encode()
    head = bytearray(len(text).to_bytes(HEAD, "little") + text)
    return torch.cat([torch.frombuffer(head, dtype=torch.uint8), *parts])


def decode(message: Tensor) -> Any:
    """The inverse of :func:`encode`; tensors are on the CPU, to the bit and with their strides.

    Raises:
        ValueError: for a text that no message has.
    """
    size = int.from_bytes(message[:HEAD].numpy().tobytes(), "little")
    text = message[HEAD : HEAD + size].numpy().tobytes()
    body = message[HEAD + size :]
    sizes: list[int] = []
    described = json.loads(text, object_hook=lambda found: _noted(found, sizes))
    parts = iter(body.split_with_sizes(sizes))
    return _value(described, parts)


def _noted(found: dict[str, Any], sizes: list[int]) -> dict[str, Any]:
    """As it is; the bytes of a tensor are noted, in the order of the text."""
    if "tensor" in found:
        sizes.append(found["bytes"])
    return found


def _described(value: Any, parts: list[Tensor]) -> Any:
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        parts.append(flat)
        stride = list(value.stride())
        if 0 in stride:  # expanded: what is there once is written out
            stride = list(value.contiguous().stride())
        layout = [str(value.dtype).removeprefix("torch."), list(value.shape), stride]
        return {"tensor": layout, "bytes": len(flat)}
    if isinstance(value, dict):
        pairs = value.items()
        return {"dict": [[_described(k, parts), _described(v, parts)] for k, v in pairs]}
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    for name, kind in GROUPS.items():
        if isinstance(value, kind):
            items: Any = value
            return {name: [_described(item, parts) for item in items]}
    raise TypeError(f"processes tell each other plain data and tensors, not {type(value).__name__}")


def _value(described: Any, parts: Any) -> Any:
    if isinstance(described, PLAIN):
        return described
    ((name, content), *_) = described.items()
    if name == "tensor":
        return _tensor(content, next(parts))
    if name == "dict":
        return {_value(k, parts): _value(v, parts) for k, v in content}
    if name == "hex":
        return bytes.fromhex(content)
    if name not in GROUPS:
        raise ValueError(f"no message says {name!r}")
    return GROUPS[name](_value(item, parts) for item in content)


def _tensor(layout: list[Any], part: Tensor) -> Tensor:
    dtype, shape, stride = layout
    # A copy, in its own memory: a part of the message would keep all of it.
    own = part.clone().view(getattr(torch, dtype)).view(shape)
    if list(own.stride()) == stride:
        return own
    # A product of matrices has other last bits with other strides.
    return torch.empty_strided(shape, stride, dtype=own.dtype).copy_(own)
