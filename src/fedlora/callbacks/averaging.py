"""The callback that averages adapters and sets up checkpointing and mixed precision."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, get_args

from fedlora.aggregation import Aggregator, FedAvg
from fedlora.callbacks.base import FederatedCallback
from fedlora.errors import FedloraError
from fedlora.state import AdapterState, ClientUpdate, Round

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from fedlora.modules.config import LoRAConfig
    from fedlora.modules.learned import LearnedParts

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
BaseDtype = Literal["float32", "bfloat16"]


class AdapterAveraging(FederatedCallback):
    """Averages the adapter state at the end of each round.

    Args:
        aggregator: the rule; None means :class:`~fedlora.aggregation.FedAvg`.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        precision: of the forward and backward pass; parameters and averages stay float32.
        base_dtype: what the frozen weights of linear layers and convolutions are kept in while a
            call of the trainer lasts. With bfloat16, which needs precision=bf16-mixed, they take
            half the memory; what is learned stays float32, a residual beside the weights too.
        export_rank: the largest rank that PEFT's files of a run's ``adapter/`` may have. A rule
            with a residual can serve more than that: the files then hold the best approximation of
            this rank, and ``fedlora.json`` says how far it is off. None: whatever it takes to be
            exact. What fedlora itself loads is exact in any case.
        export_personal: write ``adapters/<client>/`` at the end where clients have models of their
            own; they stay in ``clients/`` in any case.

    Raises:
        FedloraError: for a precision or base_dtype that does not exist, a base_dtype that does not
            go with the precision, and an export_rank below 1.
    """

    def __init__(
        self,
        aggregator: Aggregator | None = None,
        gradient_checkpointing: bool = False,
        precision: Precision = "32-true",
        base_dtype: BaseDtype = "float32",
        export_rank: int | None = None,
        export_personal: bool = True,
    ) -> None:
        _check_one_of("precision", precision, get_args(Precision))
        _check_one_of("base_dtype", base_dtype, get_args(BaseDtype))
        if base_dtype == "bfloat16" and precision != "bf16-mixed":
            raise FedloraError(
                "averaging.base_dtype=bfloat16 needs averaging.precision=bf16-mixed, got "
                f"{precision}: only there the frozen weights are multiplied in bfloat16 anyway. "
                "Set precision=bf16-mixed, or leave base_dtype out."
            )
        if export_rank is not None and export_rank < 1:
            raise FedloraError(
                f"averaging.export_rank must be at least model.lora.r, got {export_rank}. Leave it "
                "out for an exact export."
            )
        self.aggregator = FedAvg() if aggregator is None else aggregator
        self.gradient_checkpointing = gradient_checkpointing
        self.precision: Precision = precision
        self.base_dtype: BaseDtype = base_dtype
        self.export_rank = export_rank
        self.export_personal = export_personal

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
        """Switch gradient checkpointing in the model on or off, and cast its frozen base.

        Raises:
            FedloraError: for an export_rank that the adapter itself does not fit in, and a
                base_dtype for a model without a frozen base.
        """
        lora = getattr(pl_module, "lora", None)
        if lora is None:
            return
        self._check_export(lora.config)
        if self.gradient_checkpointing:
            lora.enable_gradient_checkpointing()
        else:
            lora.disable_gradient_checkpointing()
        self._set_base_dtype(lora)

    def _set_base_dtype(self, lora: LearnedParts) -> None:
        if self.base_dtype == "float32" and lora.rounded:
            raise FedloraError(
                "averaging.base_dtype=float32, but an earlier run rounded this model's frozen "
                "weights to bfloat16. Make a new CLIPLoRAClassifier."
            )
        if self.base_dtype == "bfloat16":
            if not lora.config.enabled:
                raise FedloraError(
                    "averaging.base_dtype=bfloat16 is about the frozen base, and without LoRA "
                    "(lora.enabled=false) nothing is frozen. Leave it out."
                )
            import torch

            lora.set_base_dtype(torch.bfloat16)

    def teardown(self, trainer: object, pl_module: LightningModule, stage: str) -> None:
        """Give the model back in float32: merged into 16 bits an adapter would be rounded away."""
        lora = getattr(pl_module, "lora", None)
        if lora is not None and self.base_dtype == "bfloat16":
            import torch

            lora.set_base_dtype(torch.float32)

    def _check_export(self, config: LoRAConfig) -> None:
        if self.export_rank is None:
            return
        if not config.enabled:
            raise FedloraError(
                "averaging.export_rank is about LoRA, which is off here (lora.enabled=false). "
                "Leave it out."
            )
        if self.export_rank < config.r:
            raise FedloraError(
                f"averaging.export_rank must be at least model.lora.r={config.r}, got "
                f"{self.export_rank}. Raise it, or leave it out for an exact export."
            )

    def average(
        self, server: AdapterState, updates: Iterable[ClientUpdate], rnd: Round
    ) -> AdapterState:
        """The next global adapter: what ``aggregator`` makes of the updates."""
        return self.aggregator.aggregate(server, updates, rnd)


def _check_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise FedloraError(
            f"averaging.{name} should be one of {', '.join(allowed)} but got {value!r}."
        )
