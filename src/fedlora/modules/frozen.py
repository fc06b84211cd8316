"""Frozen weights kept in bfloat16, half the memory, in a model that computes under autocast."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container

import torch
from torch import Tensor, nn

from fedlora.modules.beside import under_autocast
from fedlora.modules.layers import LaneLinear


class KeptLinear(LaneLinear):
    """A linear layer whose frozen weight is in bfloat16 in a float32 model."""


class KeptConv2d(nn.Conv2d):
    """A convolution whose frozen kernel is in bfloat16 in a float32 model."""

    def forward(self, x: Tensor) -> Tensor:
        """As in ``nn.Conv2d``: (n, in, H, W) -> (n, out, H', W')."""
        y: Tensor = self._conv_forward(x, *_seen_by(x, self.weight, self.bias))
        return y


def _seen_by(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias as ``x`` can be multiplied with them."""
    if under_autocast(x):  # which casts them itself, to what they are
        return weight, bias
    return weight.to(x.dtype), None if bias is None else bias.to(x.dtype)


# The layers whose weights autocast casts at each call. Exactly these: a class derived from one may
# read its weight in ways of its own (torch's attention does), or be somebody's own.
KEPT: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: KeptLinear,
    LaneLinear: LaneLinear,  # which takes 16 bits as it is
    nn.Conv2d: KeptConv2d,
}
PLAIN: dict[type[nn.Module], type[nn.Module]] = {kept: plain for plain, kept in KEPT.items()}


def keep_frozen_in(dtype: torch.dtype, model: nn.Module, learned: Container[int]) -> None:
    """Cast the frozen weights and biases of linear layers and 2-d convolutions, in place.

    In bfloat16 the layers change their class, to work outside of autocast too: there weights are
    cast at each call. Parameters stay the same objects.

    Args:
        dtype: ``torch.bfloat16``, or ``torch.float32`` to undo it; what was rounded stays rounded.
        model: the model, in float32.
        learned: ids of the parameters to leave alone; a layer with such a weight is left as it is,
            and so is one that shares its weight, with an embedding for example.
    """
    classes = KEPT if dtype == torch.bfloat16 else PLAIN
    held = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    for module in model.modules():
        chosen = classes.get(type(module))
        weight = module._parameters.get("weight")
        if chosen is None or weight is None or id(weight) in learned or held[id(weight)] > 1:
            continue
        module.__class__ = chosen
        for parameter in (weight, module._parameters.get("bias")):
            if parameter is not None and id(parameter) not in learned:
                parameter.data = parameter.data.to(dtype)
    if dtype == torch.bfloat16:
        _leave_the_file(model)


def _leave_the_file(model: nn.Module) -> None:
    """Copy what is not cast: a file that transformers maps stays in memory while any is in use."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.dtype != torch.bfloat16:
            parameter.data = parameter.data.clone()
