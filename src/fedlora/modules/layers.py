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

    def spread(self, name: str, like: Tensor) -> Tensor | None:
        """A parameter of each lane beside its rows, (rows, 1, …, features); None without it."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        each = len(like) // sum(self.rows)
        # Not by an index, whose gradient is summed in no fixed order on a GPU.
        parts = [
            own.expand(rows * each, *own.shape) for own, rows in zip(tensor, self.rows, strict=True)
        ]
        return torch.cat(parts).view(len(like), *(1 for _ in like.shape[2:]), -1)


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
        own = None if self.lanes is None else self.lanes.spread("bias", y)
        bias = self.bias if own is None else own
        return y if bias is None else y + bias.to(y.dtype)

    def _in_full(self, x: Tensor, lanes: Bound) -> Tensor:
        biases = lanes.tensors.get("bias", [None] * len(lanes.rows))
        each = len(x) // sum(lanes.rows)
        parts = x.split_with_sizes([rows * each for rows in lanes.rows])
        products = zip(parts, lanes.tensors["weight"], biases, strict=True)
        return torch.cat([nn.functional.linear(*product) for product in products])


class LaneNorm(nn.LayerNorm):
    """Layer normalisation whose weight and bias lanes may have each their own of."""

    lanes: Bound | None = None

    def forward(self, x: Tensor) -> Tensor:
        """As in ``nn.LayerNorm``: (…, features)."""
        if self.lanes is None:
            return super().forward(x)
        own, rows = self.lanes.tensors, list(self.lanes.rows)
        each = len(x) // sum(rows)
        # What is not trained is common to all.
        weights, biases = (
            own.get(name, [getattr(self, name)] * len(rows)) for name in ("weight", "bias")
        )
        parts = zip(x.split_with_sizes([n * each for n in rows]), weights, biases, strict=True)
        norm = nn.functional.layer_norm
        return torch.cat(
            [norm(part, self.normalized_shape, w, b, self.eps) for part, w, b in parts]
        )


def is_quick(x: Tensor, weight: Tensor) -> bool:
    """Whether a product with ``weight`` may leave out what only trained weights need."""
    return not weight.requires_grad and weight.dtype == x.dtype and not under_autocast(x)


def frozen_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b``: (…, in) -> (…, out)."""
    product: Tensor = FrozenProduct.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return product
