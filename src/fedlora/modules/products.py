"""Products with frozen weights and with LoRA's factors, without work that nobody asked for.

What autograd does with PEFT's own forward is the same algebra with more passes over large tensors:
the adapter's output is scaled and added in two passes of their own, and so are their gradients.
Here the scale goes to the small side (rank r), sums are made in place, and the gradient of B, which
BLAS is slow at as G^T H, is computed as (H^T G)^T.

On x86 CPUs float32 products go to oneDNN, which comes with torch. torch itself sends them to MKL,
which was half as fast on an AMD processor with AVX-512 (``benchmarks/limit.py``).
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

X86 = platform.machine().lower() in ("x86_64", "amd64")
ONEDNN = X86 and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
FEW = 2**18  # multiplications, up to which what oneDNN takes for a call is most of it
SMALL = 500_000  # entries of a sum that is quicker made in place, though by slower products
TINY = 400  # multiplications, below which torch's batched products have a kernel of their own


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` without gradients: (m, in), (out, in), (out,) -> (m, out)."""
    if _is_for_onednn(x, weight):
        # What torch.compile takes for the same purpose, with any layout of the weight.
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return torch.nn.functional.linear(x, weight, bias)


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    fits = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel() > 0
    return fits and ONEDNN and torch._C._get_mkldnn_enabled()  # torch.backends.mkldnn.enabled


def _of_a_lane(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T`` of one lane's rows: by shapes alone, so the same whoever shares the pass.

    A frozen product's rows grow with the lanes, so its kernel must not depend on them.
    """
    if x.numel() * len(weight) <= FEW:
        return torch.nn.functional.linear(x, weight)
    return matmul(x, weight)


class FrozenProduct(torch.autograd.Function):
    """``x W^T + b`` with a frozen W and b; x (…, in), W (out, in), b (out,) or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(…, out)."""
        ctx.save_for_backward(weight)
        y = matmul(x.reshape(-1, x.shape[-1]), weight, bias)
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of x."""
        (weight,) = ctx.saved_tensors
        flat = matmul(grad.reshape(-1, grad.shape[-1]), weight.t())
        return flat.view(*grad.shape[:-1], weight.shape[1]), None, None


class AdaptedProduct(torch.autograd.Function):
    """``x W^T + b + s (m x) A^T B^T``, with a frozen W and b, for one adapter or one per lane.

    x is (…, in), A (lanes, r, in) and B (lanes, out, r), of which ``counts[k]`` rows use the k-th;
    ``scales[k]`` is s of lane k, times what a dropout's mask m, of x's shape or None, is scaled by.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        mask: Tensor | None,
        scales: Sequence[float],
        counts: Sequence[int],
    ) -> Tensor:
        """(…, out)."""
        flat = x.reshape(-1, x.shape[-1])
        y = matmul(flat, weight, bias)
        seen = flat if mask is None else flat * mask.view_as(flat).to(flat.dtype)
        # The scale on the small side.
        low = scaled(times(seen, A, counts), scales, counts)
        add_times(y, low, B.transpose(1, 2), counts)
        ctx.save_for_backward(weight, A, B, mask, seen, low)
        ctx.scales, ctx.counts = scales, counts
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, A and B, as far as they are wanted."""
        weight, A, B, mask, seen, low = ctx.saved_tensors
        wants_x, _, _, wants_A, wants_B = ctx.needs_input_grad[:5]
        counts, flat = ctx.counts, grad.reshape(-1, grad.shape[-1])
        of_x = of_A = of_B = None
        if wants_B:
            of_B = outer(low, flat, counts).transpose(1, 2)
        if wants_A or wants_x:
            of_low = scaled(times(flat, B.transpose(1, 2), counts), ctx.scales, counts)
        if wants_A:
            of_A = outer(of_low, seen, counts)
        if wants_x:
            of_x = matmul(flat, weight.t())
            if mask is None:
                add_times(of_x, of_low, A, counts)
            else:
                through = times(of_low, A.transpose(1, 2), counts)
                of_x.addcmul_(through, mask.view_as(through).to(through.dtype))
            of_x = of_x.view(*grad.shape[:-1], weight.shape[1])
        return of_x, None, None, of_A, of_B, None, None, None


# The products of lanes: rows (m, …) of which counts[k] are of lane k, and a factor for each.


def _runs(counts: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """Lanes in a row that have as many rows: first lane, lanes, first row, rows of each."""
    lane = row = 0
    for size, run in groupby(counts):
        lanes = sum(1 for _ in run)
        yield lane, lanes, row, size
        lane, row = lane + lanes, row + lanes * size


def _by_lane(rows: Tensor, first: int, lanes: int, size: int) -> Tensor:
    """Some rows (m, width) as (lanes, size, width)."""
    return rows[first : first + lanes * size].view(lanes, size, rows.shape[1])


def _together(lanes: int, device: torch.device, size: int) -> bool:
    """Whether one batched product takes several lanes, of ``size`` multiplications each.

    On a CPU only where that is small: there it saves the calls and gives the same bits as each lane
    alone, which larger ones, that go to oneDNN, have no batched form of.
    """
    return lanes > 1 and (device.type != "cpu" or TINY <= size <= FEW)


def times(rows: Tensor, factor: Tensor, counts: Sequence[int]) -> Tensor:
    """``rows_k F_k^T`` of each lane: (m, in), (lanes, out, in) -> (m, out)."""
    if len(counts) == 1:
        return _of_a_lane(rows, factor[0])
    found = []
    for lane, lanes, row, size in _runs(counts):
        own, part = factor[lane : lane + lanes], _by_lane(rows, row, lanes, size)
        if _together(lanes, rows.device, size * own[0].numel()):
            found.append(torch.bmm(part, own.transpose(1, 2)).flatten(0, 1))
        else:
            parts = zip(part, own, strict=True)
            found += [_of_a_lane(each, of_lane) for each, of_lane in parts]
    return torch.cat(found)


def add_times(total: Tensor, rows: Tensor, factor: Tensor, counts: Sequence[int]) -> None:
    """Add ``rows_k F_k`` of each lane to (m, out) in place: (m, r), (lanes, r, out)."""
    for lane, lanes, row, size in _runs(counts):
        own = factor[lane : lane + lanes]
        into, part = (_by_lane(x, row, lanes, size) for x in (total, rows))
        if _together(lanes, rows.device, size * own[0].numel()):
            into.baddbmm_(part, own)
            continue
        for sum_, each, of_lane in zip(into, part, own, strict=True):
            if _is_for_onednn(each, of_lane) and sum_.numel() > SMALL:
                sum_.add_(matmul(each, of_lane.t()))
            else:
                sum_.addmm_(each, of_lane)


def outer(one: Tensor, other: Tensor, counts: Sequence[int]) -> Tensor:
    """``one_k^T other_k`` of each lane: (m, p), (m, q) -> (lanes, p, q)."""
    found = []
    for _, lanes, row, size in _runs(counts):
        left, right = (_by_lane(x, row, lanes, size) for x in (one, other))
        if _together(lanes, one.device, size * one.shape[1] * other.shape[1]):
            found.append(torch.bmm(left.transpose(1, 2), right))
        else:
            parts = zip(left, right, strict=True)
            found += [_of_a_lane(a.t(), b.t())[None] for a, b in parts]
    return found[0] if len(found) == 1 else torch.cat(found)


def scaled(rows: Tensor, scales: Sequence[float], counts: Sequence[int]) -> Tensor:
    """``s_k rows_k`` in place."""
    if len(set(scales)) == 1:
        return rows.mul_(scales[0])
    for part, scale in zip(rows.split_with_sizes(list(counts)), scales, strict=True):
        part.mul_(scale)
    return rows
