"""How many clients share their forward and backward passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedlora.errors import FedloraError
from fedlora.modules.lanes import LaneStack, why_not
from fedlora.state import Client

if TYPE_CHECKING:
    from fedlora.modules.clip_wrapper import CLIPLoRAWrapper
    from fedlora.trainer import FederatedTrainer


def make_stack(trainer: FederatedTrainer, clients: Sequence[Client]) -> LaneStack | None:
    """Room for the adapters of ``trainer.lanes`` clients; None where each trains alone.

    Raises:
        FedloraError: for lanes that this run cannot have.
    """
    lora = trainer.lightning_module.lora
    if lora is None or trainer.lanes == 1:
        return None
    spread = trainer.world.size > 1 and trainer.spread == "ddp"
    if trainer.lanes == "auto":
        lanes = 1 if spread or why_not(lora) else _that_pay(trainer, lora)
    elif spread:
        raise FedloraError(
            f"trainer.lanes={trainer.lanes} lets clients share steps, and strategy=ddp lets "
            "processes share the steps of one client. Use strategy=clients, or lanes=1."
        )
    else:
        lanes = trainer.lanes
    lanes = min(lanes, trainer.clients_per_round or len(clients))
    return LaneStack(lora, lanes) if lanes > 1 else None


def _that_pay(trainer: FederatedTrainer, lora: CLIPLoRAWrapper) -> int:
    return 1
