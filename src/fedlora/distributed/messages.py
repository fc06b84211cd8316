"""What processes tell each other, as bytes of which nothing is ever executed."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from fedlora.flat import as_one, split

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
    return _value(json.loads(text), Body(body))


class Body:
    """The tensors of a message, one after the other.

    Args:
        content: their bytes.
    """

    def __init__(self, content: Tensor) -> None:
        self.content = content
        self.begin = 0

    def take(self, size: int, dtype: str) -> Tensor:
        """The next bytes as a vector in its own memory: a part of the message would keep it all."""
        part = self.content[self.begin : self.begin + size]
        self.begin += size
        return part.clone().view(getattr(torch, dtype))


def _described(value: Any, parts: list[Tensor]) -> Any:
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Tensor):
        return _described_tensor(value, parts)
    if isinstance(value, dict):
        return _described_dict(value, parts)
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    for name, kind in GROUPS.items():
        if isinstance(value, kind):
            items: Any = value
            return {name: [_described(item, parts) for item in items]}
    raise TypeError(f"processes tell each other plain data and tensors, not {type(value).__name__}")


def _described_tensor(value: Tensor, parts: list[Tensor]) -> dict[str, Any]:
    flat = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
    parts.append(flat)
    stride = list(value.stride())
    if 0 in stride:  # expanded: what is there once is written out
        stride = list(value.contiguous().stride())
    return {"tensor": [_dtype(value), list(value.shape), stride], "bytes": len(flat)}


def _described_dict(value: dict[Any, Any], parts: list[Tensor]) -> dict[str, Any]:
    if _lie_alike(value):
        return _described_as_one(value, parts)
    if all(isinstance(k, str) and isinstance(v, PLAIN) for k, v in value.items()):
        return {"plain": value}
    pairs = value.items()
    return {"dict": [[_described(k, parts), _described(v, parts)] for k, v in pairs]}


def _described_as_one(tensors: dict[str, Tensor], parts: list[Tensor]) -> dict[str, Any]:
    """An adapter has many small ones, of which each would take its time."""
    flat = as_one([*tensors.values()])
    parts.append(flat.cpu().view(torch.uint8))
    shapes = [list(tensor.shape) for tensor in tensors.values()]
    return {"tensors": [list(tensors), _dtype(flat), shapes], "bytes": len(parts[-1])}


def _lie_alike(tensors: dict[Any, Any]) -> bool:
    """Whether these are named tensors of one type, each without gaps and in the usual order."""
    first = next(iter(tensors.values()), None)
    return isinstance(first, Tensor) and all(
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and (tensor.dtype, tensor.device) == (first.dtype, first.device)
        and tensor.is_contiguous()
        for name, tensor in tensors.items()
    )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _value(described: Any, body: Body) -> Any:
    if isinstance(described, PLAIN):
        return described
    ((name, content), *_) = described.items()
    if name == "plain":
        return content
    if name == "tensors":
        names, dtype, shapes = content
        own = split(body.take(described["bytes"], dtype), shapes)
        return dict(zip(names, own, strict=True))
    if name == "tensor":
        dtype, shape, stride = content
        return _tensor(body.take(described["bytes"], dtype).view(shape), stride)
    if name == "dict":
        return {_value(k, body): _value(v, body) for k, v in content}
    if name == "hex":
        return bytes.fromhex(content)
    if name not in GROUPS:
        raise ValueError(f"no message says {name!r}")
    return GROUPS[name](_value(item, body) for item in content)


def _tensor(own: Tensor, stride: list[int]) -> Tensor:
    if list(own.stride()) == stride:
        return own
    # A product of matrices has other last bits with other strides.
    return torch.empty_strided(own.shape, stride, dtype=own.dtype).copy_(own)
