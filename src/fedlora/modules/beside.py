"""The residual of a 16-bit weight: computed beside the weight, which could not hold the sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedlora.state import Residual

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
CONVOLUTION: dict[int, Any] = {
    1: nn.functional.conv1d,
    2: nn.functional.conv2d,
    3: nn.functional.conv3d,
}


class Beside:
    """A forward hook of an adapted layer: adds R x to what the layer gives.

    R stays in float32. Under autocast it is multiplied as the adapter's factors are, and the sum is
    given in float32: W0 x is on the grid of 16 bits already, where a small R x would not move it.
    Elsewhere R x is computed in float32, and the sum rounded to the type that the layer gives: a
    model wholly in 16 bits takes no other.

    Args:
        change: the residual R of the layer, thin or dense.
        weight: the layer's frozen weight, (out_features, in_features) or with a kernel; it says
            how R is laid out and where it lies.
    """

    def __init__(self, change: Residual, weight: Tensor) -> None:
        exact = change.to(torch.float32)
        self.first: Tensor  # what x meets first
        self.second: Tensor | None = None
        if exact.V is None or not len(exact.V):  # no convolution has no channels
            self.first = exact.dense().reshape(weight.shape)
        else:
            kernel = weight.shape[1:]
            self.first = exact.V.reshape(-1, *kernel)
            self.second = exact.U.reshape(*exact.U.shape, *(1 for _ in kernel[1:]))
        self._move(weight.device)

    def _move(self, device: torch.device) -> None:
        self.first = self.first.to(device)
        self.second = None if self.second is None else self.second.to(device)

    def __call__(self, layer: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The output with R x added.

        Args:
            layer: PEFT's layer.
            args: what it was called with, x first.
            output: what it gave.
        """
        x: Tensor = args[0]
        if self.first.device != x.device:  # the model was moved meanwhile
            self._move(x.device)
        first, second, autocast = self.first, self.second, under_autocast(x)
        exact = torch.promote_types(output.dtype, torch.float32)
        if not autocast:
            x, first = x.to(exact), first.to(exact)
            second = None if second is None else second.to(exact)
        base = layer.get_base_layer()
        if isinstance(base, nn.Linear):
            change = nn.functional.linear(x, first)
            change = change if second is None else nn.functional.linear(change, second)
        else:
            change = base._conv_forward(x, first, None)
            change = change if second is None else CONVOLUTION[second.dim() - 2](change, second)
        total = output.to(exact) + change
        return total if autocast else total.to(output.dtype)


def under_autocast(x: Tensor) -> bool:
    """Whether a product with ``x`` is computed in the type that autocast chooses."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
