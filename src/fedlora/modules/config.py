"""LoRA's settings."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fedlora.errors import FedloraError

Placement = Literal["mlp", "attention", "all"]
Bias = Literal["none", "all", "lora_only"]


@dataclass
class LoRAConfig:
    """How an adapter is made; checked when it is used, since its fields may be assigned.

    Args:
        enabled: train an adapter; False trains and exchanges the full model.
        r: the rank.
        lora_alpha: the adapter is scaled by lora_alpha / r.
        lora_dropout: dropout on the adapter's input, in [0, 1).
        target_modules: module names; None infers them from the model and ``placement``.
        bias: which biases are trained too, as in PEFT.
        save_only_trainable: exchange and save only what is trained.
        placement: which linear layers of a block are adapted: "mlp" (fc1, fc2), "attention"
            (q, k, v, out) or "all" six.
        layers: which blocks are adapted, from 0, negative from the end; None means all.
        use_rslora: scale by lora_alpha / sqrt(r) (rank-stabilised LoRA, arXiv 2312.03732).
        target_components: parts of the classifier that are adapted.
    """

    enabled: bool = True
    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.1
    target_modules: list[str] | None = None
    bias: Bias = "none"
    save_only_trainable: bool = True
    placement: Placement = "mlp"
    layers: list[int] | None = None
    use_rslora: bool = False
    target_components: tuple[str, ...] | list[str] = ("encoder",)

    @classmethod
    def for_clip_model(cls, r: int = 16, lora_alpha: float = 32) -> LoRAConfig:
        """The preset for CLIP: the MLP layers of every block."""
        return cls(r=r, lora_alpha=lora_alpha)

    @property
    def scaling(self) -> float:
        """What the product B A is multiplied with."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def validate(self) -> None:
        """Check every field.

        Raises:
            FedloraError: names the field, the value and what is allowed.
        """
        if not isinstance(self.r, int) or self.r < 1:
            raise FedloraError(f"lora.r must be a whole number from 1, got {self.r!r}.")
        if not self.lora_alpha > 0:
            raise FedloraError(f"lora.lora_alpha must be above 0, got {self.lora_alpha!r}.")
        if not 0 <= self.lora_dropout < 1:
            raise FedloraError(f"lora.lora_dropout must be in [0, 1), got {self.lora_dropout!r}.")
        for name, allowed in (
            ("placement", ("mlp", "attention", "all")),
            ("bias", ("none", "all", "lora_only")),
        ):
            if getattr(self, name) not in allowed:
                raise FedloraError(
                    f"lora.{name} should be one of {', '.join(allowed)} but got "
                    f"{getattr(self, name)!r}."
                )
        if list(self.target_components) != ["encoder"]:
            raise FedloraError(
                "lora.target_components should be ['encoder'] but got "
                f"{list(self.target_components)}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Every field, for JSON or YAML."""
        return {**asdict(self), "target_components": list(self.target_components)}
