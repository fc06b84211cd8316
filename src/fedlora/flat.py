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
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def as_one(tensors: Sequence[Tensor]) -> Tensor:
    """Likewise, but no copy where they lie end to end already, as those of :func:`split` do."""
    if not _lie_end_to_end(tensors):
        return joined(tensors)
    size = sum(tensor.numel() for tensor in tensors)
    return tensors[0].detach().as_strided((size,), (1,))


def split(flat: Tensor, shapes: Iterable[Sequence[int]]) -> Iterator[Tensor]:
    """The inverse of :func:`joined`: parts of a vector of these shapes, mostly without copies.

    Raises:
        ValueError: where they are of another size than the vector.
    """
    shapes = [*shapes]
    sizes = [math.prod(shape) for shape in shapes]
    if (size := sum(sizes)) != len(flat):
        raise ValueError(f"{len(flat)} entries were to be parted into {size}")
    for part, shape in zip(flat.split_with_sizes(sizes), shapes, strict=True):
        own = part.view(shape)
        # Products of matrices may have other last bits where their memory is aligned otherwise.
        yield own.clone() if own.data_ptr() % ALIGNED else own


def _lie_end_to_end(tensors: Sequence[Tensor]) -> bool:
    first, last = tensors[0], tensors[-1]
    place, dtype = first.data_ptr(), first.dtype
    for tensor in tensors:
        if tensor.data_ptr() != place or tensor.dtype != dtype or not tensor.is_contiguous():
            return False
        place += tensor.nbytes
    # Not just by chance: what is between these two is theirs.
    return first.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
