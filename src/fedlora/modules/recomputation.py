"""Gradient checkpointing (arXiv 1604.06174): activations recomputed in the backward pass."""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import nn

from fedlora.errors import FedloraError


def set_gradient_checkpointing(model: nn.Module, enabled: bool) -> None:
    """Switch it in the outermost parts of a model that have it; active in training mode only.

    Raises:
        FedloraError: where no part of the model has it.
    """
    verb = "enable" if enabled else "disable"
    # The first name came during transformers 5, the second goes with version 6.
    names = (f"activation_checkpointing_{verb}", f"gradient_checkpointing_{verb}")
    parts = _outermost(model, names)
    if not parts:
        raise FedloraError(
            f"{type(model).__name__} has no gradient checkpointing: no part of it has the method "
            "gradient_checkpointing_enable, as transformers' models do. Leave it off, or use "
            "torch.utils.checkpoint in the model's forward()."
        )
    for part in parts:
        method: Any = next(m for name in names if (m := getattr(part, name, None)) is not None)
        # The re-entrant form needs inputs that require gradients; a frozen base has none. A class
        # of the user's own may have the method without options.
        takes_options = enabled and signature(method).parameters
        method(*([{"use_reentrant": False}] if takes_options else []))


def _outermost(module: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    if any(callable(getattr(module, name, None)) for name in names):
        supports: bool = getattr(module, "supports_gradient_checkpointing", True)
        return [module] if supports else []
    return [part for child in module.children() for part in _outermost(child, names)]
