"""Tensors that lie end to end in one: their number is what takes time, not their size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

ALIGNED = 64  # bytes, at whose multiples the memory of torch's own tensors begins


def joined(tensors: Iterable[Tensor]) -> Tensor:
    """Tensors of one device end to end, as one vector; a copy.

    Example:
        >>> joined([torch.tensor([[1, 2]]), torch.tensor(3)])
        tensor([1, 2, 3])
    """
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def split(flat: Tensor, shapes: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """The inverse of :func:`joined`: parts of a vector of these shapes, mostly without copies."""
    parts = flat.split_with_sizes([math.prod(shape) for shape in shapes])
    for part, shape in zip(parts, shapes, strict=True):
        # Products of matrices may have other last bits where their memory is aligned otherwise.
        own = part if part.data_ptr() % ALIGNED == 0 else part.clone()
        yield own.view(shape)
