"""The layers of a CLIP that trains adapters: quick where weights are frozen, and for many lanes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedlora.modules.beside import under_autocast
from fedlora.modules.products import FrozenProduct


@dataclass(frozen=True)
class Bound:
    """What lanes have in the place of a layer's own parameters, while they share a step.

    Attributes:
        tensors: parameter -> one for each lane, (lanes, …): ``A``, ``B``, ``weight``, ``bias``.
        rows: rows of each lane in what the layer sees, one lane after the other.
        scales: of the adapter in each lane.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Sequence[int] = ()
    scales: Sequence[float] = ()

    def counts(self, x: Tensor) -> list[int]:
        """Rows of each lane, the dimensions of x (…, features) before the last flattened."""
        each = x.numel() // x.shape[-1] // sum(self.rows)
        return [rows * each for rows in self.rows]

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """The rows of x of each lane, the first dimension."""
        each = len(x) // sum(self.rows)
        return x.split_with_sizes([rows * each for rows in self.rows])

    def of_lanes(self, name: str, common: Tensor | None) -> Sequence[Tensor | None]:
        """A parameter of each lane; of what is not trained the common one."""
        own = self.tensors.get(name)
        return [common] * len(self.rows) if own is None else list(own)


class LaneLinear(nn.Linear):
    """A linear layer of a CLIP: frozen, in 16 bits beside float32, or trained in full by lanes."""

    lanes: Bound | None = None

    def forward(self, x: Tensor) -> Tensor:
        """As in ``nn.Linear``: (…, in_features) -> (…, out_features)."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if self.lanes is not None and "weight" in self.lanes.tensors:
            return self._in_full(x, self.lanes)
        if is_quick(x, weight):
            if bias is None or not (bias.requires_grad or self.lanes):
                return frozen_product(x, weight, bias)
            return self.with_bias(frozen_product(x, weight, None))
        if not under_autocast(x):  # which casts them itself, to what they are
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        if self.lanes is None:
            return nn.functional.linear(x, weight, bias)
        return self.with_bias(nn.functional.linear(x, weight))

    def with_bias(self, y: Tensor) -> Tensor:
        """``y`` (…, out_features) with the bias added, that of each lane where they differ."""
        if self.bias is None:
            return y
        if self.lanes is None:
            return y + self.bias.to(y.dtype)
        # Part by part: so gradients are the same sums as without other lanes.
        parts = zip(self.lanes.split(y), self.lanes.of_lanes("bias", self.bias), strict=True)
        return torch.cat([part + bias.to(y.dtype) for part, bias in parts if bias is not None])

    def _in_full(self, x: Tensor, lanes: Bound) -> Tensor:
        factors = (lanes.of_lanes(name, getattr(self, name)) for name in ("weight", "bias"))
        parts = zip(lanes.split(x), *factors, strict=True)
        return torch.cat([nn.functional.linear(*part) for part in parts])


class LaneNorm(nn.LayerNorm):
    """Layer normalisation whose weight and bias lanes may have each their own of."""

    lanes: Bound | None = None

    def forward(self, x: Tensor) -> Tensor:
        """As in ``nn.LayerNorm``: (…, features)."""
        if self.lanes is None:
            return super().forward(x)
        factors = (self.lanes.of_lanes(name, getattr(self, name)) for name in ("weight", "bias"))
        norm, shape = nn.functional.layer_norm, self.normalized_shape
        parts = zip(self.lanes.split(x), *factors, strict=True)
        return torch.cat([norm(part, shape, w, b, self.eps) for part, w, b in parts])


def is_quick(x: Tensor, weight: Tensor) -> bool:
    """Whether a product with ``weight`` may leave out what only trained weights need."""
    return not weight.requires_grad and weight.dtype == x.dtype and not under_autocast(x)


def frozen_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b``: (…, in) -> (…, out)."""
    product: Tensor = FrozenProduct.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return product
