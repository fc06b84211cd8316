"""PEFT's adapted layer, quick where the base is frozen, and for many lanes."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from fedlora.modules.dropout import KeyedDropout
from fedlora.modules.injection import ADAPTER
from fedlora.modules.layers import Bound, LaneLinear, LaneNorm, is_quick
from fedlora.modules.products import AdaptedProduct


class AdaptedLinear(PeftLinear):
    """PEFT's adapted layer: the same parameters and result, with fewer passes, and for lanes."""

    lanes: Bound | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """W x + b + s B A x: (…, in_features) -> (…, out_features)."""
        dropout, mask, scale = self.lora_dropout[ADAPTER], None, 1.0
        known = isinstance(dropout, KeyedDropout | nn.Identity)
        if not known or not self._has_one_adapter() or args or kwargs:
            return super().forward(x, *args, **kwargs)
        base: Any = self.get_base_layer()
        A: Any = self.lora_A[ADAPTER].weight
        B: Any = self.lora_B[ADAPTER].weight
        if not isinstance(base, LaneLinear):
            return super().forward(x)
        if not is_quick(x, base.weight) or A.dtype != x.dtype:
            return super().forward(x) if self.lanes is None else self._by_parts(x, base, self.lanes)
        lanes = self.lanes or Bound({"A": A[None], "B": B[None]}, (1,), (self.scaling[ADAPTER],))
        if isinstance(dropout, KeyedDropout):
            mask = dropout.mask(x)
            scale = 1.0 if mask is None else dropout.scale
        bias = base.bias
        apart = bias is not None and (bias.requires_grad or base.lanes is not None)
        y: Tensor = AdaptedProduct.apply(  # type: ignore[no-untyped-call]
            x,
            base.weight,
            None if apart else bias,
            lanes.tensors["A"],
            lanes.tensors["B"],
            mask,
            [scale * each for each in lanes.scales],
            lanes.counts(x),
        )
        return base.with_bias(y) if apart else y

    def _has_one_adapter(self) -> bool:
        return not self.disable_adapters and not self.merged and self.active_adapters == [ADAPTER]

    def _by_parts(self, x: Tensor, base: LaneLinear, lanes: Bound) -> Tensor:
        """With operations that autograd and autocast know."""
        y, counts = base(x), lanes.counts(x)
        seen = self.lora_dropout[ADAPTER](self._cast_input_dtype(x, lanes.tensors["A"].dtype))
        flat = seen.reshape(-1, seen.shape[-1])
        A, B = lanes.tensors["A"], lanes.tensors["B"]
        if len(set(counts)) == 1:
            low = torch.bmm(flat.view(len(counts), counts[0], -1), A.transpose(1, 2))
            change = torch.bmm(low, B.transpose(1, 2))
            # As PEFT does it. Not as a tensor: a GPU would be waited for.
            change = torch.cat([own * s for own, s in zip(change, lanes.scales, strict=True)])
        else:
            parts = zip(flat.split_with_sizes(counts), A, B, lanes.scales, strict=True)
            linear = nn.functional.linear
            change = torch.cat([linear(linear(part, a), b) * s for part, a, b, s in parts])
        total: Tensor = y + change.view(*x.shape[:-1], -1)
        return total.to(y.dtype)


CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: LaneLinear,
    nn.LayerNorm: LaneNorm,
    PeftLinear: AdaptedLinear,
}


PLAIN = {own: plain for plain, own in CLASSES.items()}


def use_plain_layers(model: nn.Module) -> None:
    """Undo :func:`use_own_layers`, in place."""
    for module in model.modules():
        module.__class__ = PLAIN.get(type(module), type(module))


def use_own_layers(model: nn.Module) -> None:
    """Let linear and normalisation layers be of the classes here, in place, adapters included.

    Exactly torch's and PEFT's own classes are: what is derived from them may read its weights in
    ways of its own. Parameters and names stay.
    """
    inside = {
        id(factor)
        for layer in model.modules()
        if isinstance(layer, PeftLinear)
        for factor in (*layer.lora_A.values(), *layer.lora_B.values())
    }
    for module in model.modules():
        chosen = CLASSES.get(type(module))
        if chosen is not None and id(module) not in inside:
            module.__class__ = chosen
