"""Which parameters of the adapted model itself are trained in full beside the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fedlora.errors import FedloraError
from fedlora.modules.config import LoRAConfig
from fedlora.modules.injection import Slot

NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)
# transformers writes some of its own, which are of no class of torch.
ENDINGS = ("RMSNorm", "LayerNorm")


def in_full(config: LoRAConfig, model: nn.Module, slots: Sequence[Slot]) -> dict[str, nn.Parameter]:
    """What ``config.bias`` and ``config.train_norm`` want trained, by path without the adapter.

    Args:
        config: the adapter's settings.
        model: the model, before the adapter hangs in it.
        slots: the adapted layers, also those of a head beside the model.

    Returns:
        Path -> parameter; each parameter once, whoever shares it and whichever setting names it.

    Raises:
        FedloraError: where normalisation layers are to be trained and there is none.
    """
    found = biases(config, model, slots)
    if config.train_norm:
        layers = norms(model)
        if not layers:
            raise FedloraError(
                f"lora.train_norm is true, and {type(model).__name__} has no normalisation layer "
                "with weights to train. Leave it out."
            )
        found |= layers
    once = {id(parameter): name for name, parameter in reversed(found.items())}
    return {name: p for name, p in found.items() if once[id(p)] == name}


def biases(config: LoRAConfig, model: nn.Module, slots: Sequence[Slot]) -> dict[str, nn.Parameter]:
    """The biases that ``config.bias`` wants trained, by their path without the adapter."""
    if config.bias == "none":
        return {}
    # Also those of a head beside the model.
    own = {f"{slot.target.name}.bias": slot.target.base.bias for slot in slots}
    found: dict[str, Any] = {name: bias for name, bias in own.items() if bias is not None}
    if config.bias == "all":
        found |= {name: p for name, p in model.named_parameters() if name.endswith("bias")}
    return found


def norms(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights and biases of a model's normalisation layers, by path.

    Layer, group, batch, instance and RMS normalisation of torch and what is derived from them, and
    those of transformers whose class is named like one. A layer without weights has none.
    """
    return {
        f"{path}.{name}" if path else name: parameter
        for path, module in model.named_modules()
        if _is_norm(module)
        for name, parameter in module.named_parameters()
    }


def _is_norm(module: nn.Module) -> bool:
    if isinstance(module, NORMS):
        return True
    theirs = any(
        kind.__module__.startswith("transformers.") and kind.__name__.endswith(ENDINGS)
        for kind in type(module).__mro__
    )
    return theirs and isinstance(getattr(module, "weight", None), Tensor)
