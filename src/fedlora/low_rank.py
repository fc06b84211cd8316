"""Singular values of changes that are kept as thin factors, without forming the matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlora.state import Residual, pad


def svd(change: Residual) -> tuple[Tensor, Tensor, Tensor]:
    """The thin singular value decomposition of a change.

    Of a thin one, ``U @ V`` with k columns: QR of U and of V transposed, then the decomposition of
    the k x k core between them, so the cost grows with k^2 and not with the matrix.

    Args:
        change: (out_features, in_features).

    Returns:
        Left vectors (out_features, k), singular values (k,), falling, and right vectors (k,
        in_features), in float64; k is at most the smaller side.
    """
    wide = change.to(torch.float64)
    if wide.V is None:
        left, values, right = torch.linalg.svd(wide.U, full_matrices=False)
        return left, values, right
    before, upper = torch.linalg.qr(wide.U)
    after, lower = torch.linalg.qr(wide.V.T)
    left, values, right = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return before @ left, values, right @ after.T


def truncate(
    change: Residual, dtype: torch.dtype, rank: int | None = None, beside: float = 0.0
) -> Residual:
    """The nearest change of at most this rank, in the smaller form.

    Args:
        change: (out_features, in_features).
        dtype: of the result.
        rank: largest rank; None leaves out only what is below the rounding of ``dtype``.
        beside: largest singular value of what it is served beside. A difference of products that
            nearly cancel holds their rounding, which is below that of this value.
    """
    if change.V is None and rank is None:
        return change.to(dtype)
    left, values, right = svd(change)
    # A sum of products has at most the rank of its terms; what is left of the others is noise.
    noise = torch.finfo(dtype).eps * values[:1].clamp(min=beside)
    kept = int((values > noise).sum())
    kept = kept if rank is None else min(kept, rank)
    return smaller(Residual(left[:, :kept] * values[:kept], right[:kept])).to(dtype)


def smaller(change: Residual) -> Residual:
    """The same change, dense where that takes no more numbers than the thin form."""
    out_features, in_features = change.shape
    numbers = change.U.shape[1] * (out_features + in_features)
    return change if numbers < out_features * in_features else Residual(change.dense())


def factors(
    left: Tensor, values: Tensor, right: Tensor, rank: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """A and B of this rank with ``scaling * B A`` nearest to a matrix, from its decomposition.

    A (rank, in_features) has orthonormal rows and B (out_features, rank) the singular values; slots
    that the matrix is too small for are zero in both.
    """
    B = left[:, :rank] * (values[:rank] / scaling)
    return pad(right[:rank], rank, 0), pad(B, rank, 1)
