"""Which layers of a CLIP and of the head above it are adapted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from fedlora.errors import FedloraError
from fedlora.modules.anatomy import Anatomy
from fedlora.modules.config import LoRAConfig
from fedlora.modules.injection import Place, Target, matches, places_in

PLACEMENTS = {
    "mlp": ("mlp.fc1", "mlp.fc2"),
    "attention": tuple(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
}
PLACEMENTS["all"] = PLACEMENTS["mlp"] + PLACEMENTS["attention"]
# Only encoder blocks: a projection or an embedding of the same name elsewhere is not adapted. A
# vision model on its own has no prefix.
BLOCK = re.compile(r"^(?:(vision|text)_model\.)?encoder\.layers\.(\d+)\.(.+)$")
HEADS = ("classifier", "head", "fc")  # usual names, where there are several linear layers


def targets_in(clip: nn.Module, config: LoRAConfig, towers: Sequence[str]) -> list[str]:
    """Paths of the encoder layers to adapt.

    Full names: PEFT matches by ending, and a short one would adapt layers of the other tower too.

    Raises:
        FedloraError: when a name or a block number matches nothing.
    """
    blocks = [
        (match[1] or "vision", int(match[2]), match[3], name)
        for name, module in clip.named_modules()
        if isinstance(module, nn.Linear) and (match := BLOCK.match(name))
    ]
    blocks = [block for block in blocks if block[0] in towers]
    kinds = sorted({kind for _, _, kind, _ in blocks})
    names = config.target_modules
    wanted = list(PLACEMENTS[config.placement] if names is None else names)
    for target in wanted:
        if not any(matches(name, target) for *_, name in blocks):
            raise FedloraError(
                f"lora.target_modules: {target!r} matches no layer of the {' and '.join(towers)} "
                f"encoder blocks. There are: {', '.join(kinds)}."
            )
    depth = {tower: 1 + max(i for t, i, _, _ in blocks if t == tower) for tower, *_ in blocks}
    chosen = {tower: _indices(config.layers, depth[tower], tower) for tower in depth}
    targets = [
        name
        for tower, index, _, name in blocks
        if index in chosen[tower] and any(matches(name, target) for target in wanted)
    ]
    if not targets:
        raise FedloraError(
            f"lora.layers={config.layers} with {', '.join(wanted)} leaves no layer to adapt. "
            "Name blocks that hold them, or leave lora.layers out."
        )
    return targets


def _indices(layers: Sequence[int] | None, depth: int, tower: str) -> set[int]:
    if layers is None:
        return set(range(depth))
    for index in layers:
        if not -depth <= index < depth:
            raise FedloraError(
                f"lora.layers: there is no block {index} in the {tower} tower, which has {depth} "
                f"(0 to {depth - 1}, or -1 to -{depth} from the end)."
            )
    return {index % depth for index in layers}


def head_target(anatomy: Anatomy, config: LoRAConfig) -> Target:
    """The linear head of an object, adapted with the head's own preset beside the encoder.

    Raises:
        FedloraError: where there is none, or several and none has a usual name.
    """
    layers = anatomy.linear_outside()
    named = {n: m for n, m in layers.items() if n.rpartition(".")[2] in HEADS}
    found = layers if len(layers) == 1 else named
    if len(found) != 1:
        there = f"there are {', '.join(layers)}" if layers else "there is none (a text head?)"
        raise FedloraError(
            "lora.target_components: 'classifier' needs one linear layer beside the CLIP, "
            f"named {' or '.join(HEADS)} if there are several; {there}. Leave 'classifier' out."
        )
    ((name, head),) = found.items()
    alone = "encoder" not in config.target_components
    preset = config if alone else LoRAConfig.for_classification_head()
    return Target(name, head, tuple(_places(anatomy, head)), preset.r, preset.lora_alpha)


def _places(anatomy: Anatomy, head: nn.Module) -> list[Place]:
    places: list[Place] = []
    for path, module in anatomy.places:
        if module is head:
            *owners, attribute = path.split(".")
            owner: Any = anatomy.thing
            for name in owners:
                owner = getattr(owner, name, None)
            if getattr(owner, attribute, None) is not head:
                raise FedloraError(
                    f"the linear head is held in {path!r}, which is no attribute and so cannot be "
                    "replaced. Leave 'classifier' out of lora.target_components."
                )
            places.append((owner, attribute))
        else:
            places += places_in(module)[id(head)]
    # Modules inside others are looked through more than once.
    return list({(id(owner), name): (owner, name) for owner, name in places}.values())
