"""The callback that averages adapters and sets up checkpointing and mixed precision."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from fedlora.aggregation import Aggregator, FedAvg
from fedlora.callbacks.base import FederatedCallback
from fedlora.errors import FedloraError
from fedlora.state import AdapterState, ClientUpdate, Round

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


class AdapterAveraging(FederatedCallback):
    """Averages the adapter state at the end of each round.

    Args:
        aggregator: the rule; None means :class:`~fedlora.aggregation.FedAvg`.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        precision: of the forward and backward pass; parameters and averages stay float32.

    Raises:
        FedloraError: for a precision that does not exist.
    """

    def __init__(
        self,
        aggregator: Aggregator | None = None,
        gradient_checkpointing: bool = False,
        precision: Precision = "32-true",
    ) -> None:
        allowed = ("32-true", "bf16-mixed", "16-mixed")
        if precision not in allowed:
            raise FedloraError(
                f"averaging.precision should be one of {', '.join(allowed)} but got {precision!r}."
            )
        self.aggregator = FedAvg() if aggregator is None else aggregator
        self.gradient_checkpointing = gradient_checkpointing
        self.precision: Precision = precision

    def check_device(self, device_type: str) -> None:
        """Refuse a precision that the device lacks; called before Fabric is built from it.

        Raises:
            FedloraError: names the device and what it can do.
        """
        import torch

        # Fabric would turn 16-mixed into bf16-mixed on a CPU without an error.
        if self.precision == "16-mixed" and device_type != "cuda":
            raise FedloraError(
                f"averaging.precision=16-mixed needs a GPU, this run is on {device_type}. Use "
                "bf16-mixed or 32-true."
            )
        lacking = device_type == "cuda" and not torch.cuda.is_bf16_supported(False)
        if self.precision == "bf16-mixed" and lacking:
            raise FedloraError(
                "averaging.precision=bf16-mixed is not supported by this GPU. Use 16-mixed or "
                "32-true."
            )

    def setup(self, trainer: object, pl_module: LightningModule, stage: str) -> None:
        """Switch gradient checkpointing in the model on or off."""
        lora = getattr(pl_module, "lora", None)
        if lora is not None and self.gradient_checkpointing:
            lora.enable_gradient_checkpointing()
        elif lora is not None:
            lora.disable_gradient_checkpointing()

    def average(
        self, server: AdapterState, updates: Iterable[ClientUpdate], rnd: Round
    ) -> AdapterState:
        """The next global adapter: what ``aggregator`` makes of the updates."""
        return self.aggregator.aggregate(server, updates, rnd)
