"""What makes the training of an adapter quick, switched on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fedlora.modules.clip import FederatedCLIPModel

FUSED_ON = ("cpu", "cuda")


def make_quick(model: FederatedCLIPModel) -> None:
    """Let a model that was built here leave out what training an adapter does not need."""
    # Both bring libraries along that the command line's help can do without.
    from fedlora.modules.adapted import use_own_layers
    from fedlora.modules.tower import leave_out_unread

    leave_out_unread(model.clip)
    use_own_layers(model)


def make_plain(model: FederatedCLIPModel) -> None:
    """Undo :func:`make_quick`, once the adapter is out: each layer is of its own class again."""
    from fedlora.modules.adapted import use_plain_layers
    from fedlora.modules.tower import compute_all

    compute_all(model.clip)
    use_plain_layers(model)


def fuse(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Let an optimizer of torch that can, and was not told how, update all tensors in one call."""
    if not type(optimizer).__module__.startswith("torch.optim."):
        return optimizer  # a step() of its own may know nothing of it
    for group in optimizer.param_groups:
        undecided = "fused" in group and group["fused"] is None and group.get("foreach") is None
        special = group.get("differentiable") or group.get("capturable")
        able = all(p.device.type in FUSED_ON and p.is_floating_point() for p in group["params"])
        # Some make their state when they are built, as it has to be for what they were told then.
        if undecided and not special and able and not optimizer.state:
            group["fused"] = True
    return optimizer
