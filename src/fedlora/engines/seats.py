"""How many clients share their forward and backward passes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from fedlora.errors import FedloraError
from fedlora.modules.lanes import LaneStack, why_not
from fedlora.state import Client

if TYPE_CHECKING:
    from fedlora.modules.classifier import CLIPLoRAClassifier
    from fedlora.modules.clip_wrapper import CLIPLoRAWrapper
    from fedlora.trainer import FederatedTrainer

MOST = 64  # that ``auto`` lets share a pass
SHARE = 0.5  # of a device's memory that ``auto`` lets their activations and adapters take
# Bytes that a pass keeps for the backward pass, up to which a CPU core spends much of its time on
# what does not grow with the batch: beyond, one client at a time is as quick.
ENOUGH_FOR_A_CPU = 64 * 2**20


def make_stack(trainer: FederatedTrainer, clients: Sequence[Client]) -> LaneStack | None:
    """Room for the adapters of ``trainer.lanes`` clients; None where each trains alone.

    Raises:
        FedloraError: for lanes that this run cannot have.
    """
    module, lanes = trainer.lightning_module, trainer.lanes
    lora = module.lora
    if lora is None or lanes == 1 or trainer.state.fn != TrainerFn.FITTING:
        return None
    if trainer.world.size > 1 and trainer.spread == "ddp":
        if lanes == "auto":
            return None
        raise FedloraError(
            f"trainer.lanes={lanes} lets clients share passes, and strategy=ddp lets processes "
            "share the passes of one client. Use strategy=clients, or lanes=1."
        )
    if lanes == "auto":
        rows = int(median(client.num_samples for client in clients))
        rows = max(1, min(rows, trainer.datamodule.batch_size))
        lanes = 1 if why_not(lora) or _own_optimizer(module) else that_pay(trainer, lora, rows)
    elif name := _own_optimizer(module):
        raise FedloraError(
            f"trainer.lanes must be 1 here: {type(module).__name__} has a {name}() of its own, "
            "which knows one client's parameters."
        )
    seats = min(int(lanes), trainer.clients_per_round or len(clients))
    return LaneStack(lora, seats, type(module.configure_optimizers())) if seats > 1 else None


def _own_optimizer(module: CLIPLoRAClassifier) -> str:
    """The method by which a class of the user's makes its optimizer; empty for ours."""
    kind, ours = type(module), _classifier()
    names = ("configure_optimizers", "optimizer_groups")
    return next((name for name in names if getattr(kind, name) is not getattr(ours, name)), "")


def _classifier() -> type[CLIPLoRAClassifier]:
    from fedlora.modules.classifier import CLIPLoRAClassifier

    return CLIPLoRAClassifier


def that_pay(trainer: FederatedTrainer, lora: CLIPLoRAWrapper, rows: int) -> int:
    """As many clients, with batches of so many rows, as fill a pass; the same in every run."""
    device = trainer.fabric.device
    activations = kept_for_backward(trainer, lora, rows)
    if device.type == "cpu":
        return max(1, min(MOST, ENOUGH_FOR_A_CPU // activations))
    # Adapter, gradient and two moments.
    adapter = 4 * sum(tensor.nbytes for tensor in lora.trainable().values())
    return max(1, min(MOST, int(SHARE * _memory(device)) // (activations + adapter)))


def kept_for_backward(trainer: FederatedTrainer, lora: CLIPLoRAWrapper, rows: int) -> int:
    """Bytes that the forward pass of a training batch keeps, parameters and buffers apart."""
    module, device = trainer.lightning_module, trainer.fabric.device
    size = module.preprocess.size
    batch = {
        "image": torch.zeros(rows, 3, size, size, dtype=torch.uint8, device=device),
        "label": torch.zeros(rows, dtype=torch.int64, device=device),
        "index": torch.zeros(rows, dtype=torch.int64, device=device),
    }
    own = {tensor.untyped_storage().data_ptr() for tensor in module.state_dict().values()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    module.train()
    lora.set_dropout_key(0)
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            with trainer.fabric.autocast():
                out = module.training_step(batch, 0)
            del out
    finally:
        lora.set_dropout_key(None)
    return max(1, sum(kept.values()))


def _memory(device: torch.device) -> int:
    """Bytes of a device's memory in all: what is free differs from run to run."""
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    return int(torch.cuda.get_device_properties(device).total_memory)
