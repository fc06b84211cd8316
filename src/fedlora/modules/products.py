"""Products with frozen weights and with LoRA's factors, without work that nobody asked for.

What autograd does with PEFT's own forward is the same algebra with more passes over large tensors:
the adapter's output is scaled and added in two passes of their own, and so are their gradients.
Here the scale goes to the small side (rank r), sums are made in place, and the gradient of B, which
BLAS is slow at as G^T H, is computed as (H^T G)^T.

On x86 CPUs float32 products go to oneDNN, which comes with torch. torch itself sends them to MKL,
and that leaves AVX-512 alone on processors of other makers than its own.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

X86 = platform.machine().lower() in ("x86_64", "amd64")
ONEDNN = X86 and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
FEW = 2**17  # multiplications, up to which what oneDNN takes for a call is most of it


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


def _together(counts: Sequence[int], device: torch.device, size: int) -> bool:
    """Whether one batched product of ``size`` multiplications takes them all.

    On a CPU only where each lane's is small: there it saves the calls and gives the same bits as
    each lane alone, which larger ones, that go to oneDNN, have no batched form of.
    """
    alike = len(counts) > 1 and len(set(counts)) == 1
    return alike and (device.type != "cpu" or size <= FEW * len(counts))


def times(rows: Tensor, factor: Tensor, counts: Sequence[int]) -> Tensor:
    """``rows_k F_k^T`` of each lane: (m, in), (lanes, out, in) -> (m, out)."""
    if len(counts) == 1:
        return _of_a_lane(rows, factor[0])
    if _together(counts, rows.device, rows.numel() * factor.shape[1]):
        batched = rows.view(len(counts), counts[0], -1)
        return torch.bmm(batched, factor.transpose(1, 2)).flatten(0, 1)
    parts = zip(rows.split_with_sizes(list(counts)), factor, strict=True)
    return torch.cat([_of_a_lane(part, own) for part, own in parts])


def add_times(total: Tensor, rows: Tensor, factor: Tensor, counts: Sequence[int]) -> None:
    """Add ``rows_k F_k`` of each lane to (m, out) in place: (m, r), (lanes, r, out)."""
    if _together(counts, rows.device, rows.numel() * factor.shape[2]):
        shape = (len(counts), counts[0], -1)
        total.view(shape).baddbmm_(rows.view(shape), factor)
        return
    parts = zip(
        total.split_with_sizes(list(counts)),
        rows.split_with_sizes(list(counts)),
        factor,
        strict=True,
    )
    for part, own, of_lane in parts:
        if _is_for_onednn(own, of_lane) and part.numel() > SMALL:
            part.add_(matmul(own, of_lane.t()))
        else:
            part.addmm_(own, of_lane)


SMALL = 500_000  # entries of a sum that is quicker made in place, though by slower products


def outer(one: Tensor, other: Tensor, counts: Sequence[int]) -> Tensor:
    """``one_k^T other_k`` of each lane: (m, p), (m, q) -> (lanes, p, q)."""
    if _together(counts, one.device, one.numel() * other.shape[1]):
        shape = (len(counts), counts[0], -1)
        return torch.bmm(one.view(shape).transpose(1, 2), other.view(shape))
    parts = zip(
        one.split_with_sizes(list(counts)), other.split_with_sizes(list(counts)), strict=True
    )
    return torch.stack([_of_a_lane(a.t(), b.t()) for a, b in parts])


def scaled(rows: Tensor, scales: Sequence[float], counts: Sequence[int]) -> Tensor:
    """``s_k rows_k`` in place."""
    if len(set(scales)) == 1:
        return rows.mul_(scales[0])
    for part, scale in zip(rows.split_with_sizes(list(counts)), scales, strict=True):
        part.mul_(scale)
    return rows
