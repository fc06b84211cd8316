"""Tensors that lie end to end in one: their number is what takes time, not their size."""

from __future__ import annotations

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


def split(flat: Tensor, shapes: Iterable[Sequence[int]]) -> Iterator[Tensor]:
    """The inverse of :func:`joined`: parts of a vector of these shapes, mostly without copies.

    Raises:
        ValueError: where they are of another size than the vector.
    """
    first = flat.storage_offset()
    last = first + len(flat)
    for shape in shapes:
        strides, size = [], 1
        for length in reversed(shape):
            strides.append(size)
            size *= length
        if first + size > last:
            raise ValueError(f"{len(flat)} entries are too few")
        part = flat.as_strided(shape, strides[::-1], first)
        first += size
        # Products of matrices may have other last bits where their memory is aligned otherwise.
        yield part.clone() if part.data_ptr() % ALIGNED else part
    if first != last:
        raise ValueError(f"{last - first} entries are left over")
