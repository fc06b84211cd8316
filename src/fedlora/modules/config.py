"""LoRA's settings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fedlora.errors import FedloraError

Placement = Literal["mlp", "attention", "all"]
Bias = Literal["none", "all", "lora_only"]
COMPONENTS = ("encoder", "classifier")


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
        save_only_trainable: exchange and save only what is trained; False means everything.
        placement: which linear layers of a CLIP block are adapted: "mlp" (fc1, fc2), "attention"
            (q, k, v, out) or "all" six.
        layers: which blocks are adapted, from 0, negative from the end; None means all.
        use_rslora: scale by lora_alpha / sqrt(r) (rank-stabilised LoRA, arXiv 2312.03732).
        target_components: what of a CLIP classifier is adapted: "encoder" (its blocks) and
            "classifier" (a linear head; beside the encoder with the head's own preset). A linear
            head that is not adapted is trained in full.
        train_norm: train the normalisation layers of the adapted model in full, weights and biases,
            beside the adapter (as LongLoRA does, arXiv 2309.12307); a bias counts once, whatever
            ``bias`` says.
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
    train_norm: bool = False

    @classmethod
    def for_clip_model(cls, r: int = 16, lora_alpha: float = 32) -> LoRAConfig:
        """The preset for CLIP: the MLP layers of every block."""
        return cls(r=r, lora_alpha=lora_alpha)

    @classmethod
    def small(cls) -> LoRAConfig:
        """Rank 8, alpha 16."""
        return cls.for_clip_model(8, 16)

    @classmethod
    def medium(cls) -> LoRAConfig:
        """Rank 16, alpha 32."""
        return cls.for_clip_model(16, 32)

    @classmethod
    def large(cls) -> LoRAConfig:
        """Rank 32, alpha 64."""
        return cls.for_clip_model(32, 64)

    @classmethod
    def for_classification_head(cls, r: int = 8, lora_alpha: float = 16) -> LoRAConfig:
        """The preset for a linear head alone."""
        return cls(r=r, lora_alpha=lora_alpha, target_components=("classifier",))

    def validate(self) -> None:
        """Check every field.

        Raises:
            FedloraError: names the first wrong field, its value and what is allowed.
        """
        for name, allowed in self._faults():
            raise FedloraError(f"lora.{name} {allowed} got {getattr(self, name)!r}.")

    def _faults(self) -> Iterator[tuple[str, str]]:
        chosen = self.target_components
        known = _is_list(chosen, str) and set(chosen) <= set(COMPONENTS)
        checks = {
            "r": (_is_whole(self.r) and self.r >= 1, "must be a whole number from 1,"),
            # Written so that NaN, which compares as neither, is refused.
            "lora_alpha": (
                _is_number(self.lora_alpha) and 0 < self.lora_alpha < math.inf,
                "must be above 0,",
            ),
            "lora_dropout": (
                _is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1,
                "must be in [0, 1),",
            ),
            "target_modules": (
                self.target_modules is None
                or (_is_list(self.target_modules, str) and len(self.target_modules) > 0),
                "must be a list of names, or null for the inferred ones,",
            ),
            "layers": (
                self.layers is None or _is_list(self.layers, int),
                "must be a list of whole numbers or null,",
            ),
            "target_components": (
                known and 0 < len(chosen) == len(set(chosen)),
                "should be a list of 'encoder', 'classifier' or both but",
            ),
            "placement": (
                self.target_modules is None or self.placement == "mlp",
                "is for inferred layers; leave it out beside target_modules,",
            )
            if self.placement in ("mlp", "attention", "all")
            else _one_of(self.placement, "mlp", "attention", "all"),
            "bias": _one_of(self.bias, "none", "all", "lora_only"),
        }
        for name in ("enabled", "save_only_trainable", "use_rslora", "train_norm"):
            checks[name] = (isinstance(getattr(self, name), bool), "must be true or false,")
        yield from ((name, allowed) for name, (fits, allowed) in checks.items() if not fits)

    def to_dict(self) -> dict[str, Any]:
        """Every field, for JSON or YAML."""
        return {**asdict(self), "target_components": list(self.target_components)}


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(item, kind) and not isinstance(item, bool) for item in value
    )


def _one_of(value: object, *allowed: str) -> tuple[bool, str]:
    return value in allowed, f"should be one of {', '.join(allowed)} but"


def checked(config: object) -> LoRAConfig:
    """A copy of the settings; the default ones for None.

    Raises:
        FedloraError: for something else, or a wrong setting.
    """
    found = LoRAConfig() if config is None else config
    if not isinstance(found, LoRAConfig):
        raise FedloraError(
            f"the config must be a LoRAConfig, got {type(config).__name__}. Write LoRAConfig(r=…)."
        )
    found.validate()
    return deepcopy(found)
