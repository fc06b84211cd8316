"""LoRA in a CLIP classifier: which layers, and what travels beside the adapter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from torch import nn

from fedlora.errors import FedloraError
from fedlora.modules.clip import FederatedCLIPModel
from fedlora.modules.config import LoRAConfig
from fedlora.modules.lora import LoRAWrapper

Towers = Literal["vision", "both"]
PLACEMENTS = {
    "mlp": ("mlp.fc1", "mlp.fc2"),
    "attention": tuple(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
}
PLACEMENTS["all"] = PLACEMENTS["mlp"] + PLACEMENTS["attention"]
# Only encoder blocks: a projection or an embedding of the same name elsewhere is not adapted.
BLOCK = re.compile(r"^(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)$")


class CLIPLoRAWrapper(LoRAWrapper):
    """Adapts the encoder blocks of a :class:`FederatedCLIPModel`.

    A linear head is trained in full and travels along.

    Args:
        federated_clip_model: the classifier to adapt; changed in place.
        lora_config: the adapter's settings.
        target_components: replaces ``lora_config.target_components`` where given.
        towers: which towers are adapted (trained, where LoRA is off).

    Raises:
        FedloraError: for wrong settings, or targets that match nothing, with the names that exist.
    """

    def __init__(
        self,
        federated_clip_model: FederatedCLIPModel,
        lora_config: LoRAConfig,
        target_components: Sequence[str] | None = None,
        towers: Towers = "both",
    ) -> None:
        if target_components is not None:
            lora_config.target_components = list(target_components)
        lora_config.validate()
        self.classifier = federated_clip_model
        self.towers: Towers = towers
        head = federated_clip_model.classifier
        other = {} if head is None else {f"classifier.{n}": p for n, p in head.named_parameters()}
        clip = federated_clip_model.clip
        prefixes = ("vision",) if towers == "vision" else ("vision", "text")
        targets = targets_in(clip, lora_config, prefixes) if lora_config.enabled else []
        super().__init__(clip, lora_config, targets, other)
        if not lora_config.enabled and towers == "vision":
            self._keep_vision_only()
        adapted_text = any(name.startswith("text_model.") for name in self.layers)
        trained_text = any(name.startswith("text_model.") for name in self.parameters["other"])
        federated_clip_model.text_frozen = not (adapted_text or trained_text)

    def _keep_vision_only(self) -> None:
        """Freeze and forget what the vision tower does not use."""
        used = ("vision_model.", "visual_projection.", "classifier.")
        for name, parameter in list(self.parameters["other"].items()):
            if not name.startswith(used):
                parameter.requires_grad_(False)
                del self.parameters["other"][name]


def targets_in(clip: nn.Module, config: LoRAConfig, towers: Sequence[str]) -> list[str]:
    """Paths of the layers to adapt.

    Full names: PEFT matches by ending, and a short one would adapt layers of the other tower too.

    Raises:
        FedloraError: when a name or a block number matches nothing.
    """
    blocks = [
        (match[1], int(match[2]), match[3], name)
        for name, module in clip.named_modules()
        if isinstance(module, nn.Linear) and (match := BLOCK.match(name)) and match[1] in towers
    ]
    kinds = sorted({kind for _, _, kind, _ in blocks})
    wanted = list(config.target_modules or PLACEMENTS[config.placement])
    for target in wanted:
        if not any(_matches(name, target) for *_, name in blocks):
            raise FedloraError(
                f"lora.target_modules: {target!r} matches no layer of the {' and '.join(towers)} "
                f"encoder blocks. There are: {', '.join(kinds)}."
            )
    depth = {tower: 1 + max(i for t, i, _, _ in blocks if t == tower) for tower, *_ in blocks}
    chosen = {tower: _indices(config.layers, depth[tower], tower) for tower in depth}
    targets = [
        name
        for tower, index, _, name in blocks
        if index in chosen[tower] and any(_matches(name, target) for target in wanted)
    ]
    if not targets:
        raise FedloraError(
            f"lora.layers={config.layers} with {', '.join(wanted)} leaves no layer to adapt. "
            "Name blocks that hold them, or leave lora.layers out."
        )
    return targets


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _indices(layers: list[int] | None, depth: int, tower: str) -> set[int]:
    if layers is None:
        return set(range(depth))
    for index in layers:
        if not -depth <= index < depth:
            raise FedloraError(
                f"lora.layers: there is no block {index} in the {tower} tower, which has {depth} "
                f"(0 to {depth - 1}, or -1 to -{depth} from the end)."
            )
    return {index % depth for index in layers}
