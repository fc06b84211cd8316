"""The plain form that existing CLIP projects keep their config in, mapped onto ours.

model: {type: clip_lora, model_name: …, num_classes: 10}
lora: {enabled: true, r: 16, lora_alpha: 32, target_components: [encoder]}
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from fedlora.errors import FedloraError
from fedlora.modules.config import LoRAConfig

TYPES = ("clip", "clip_lora")
MODEL_KEYS = ("type", "model_name", "num_classes")


def is_plain(config: object) -> bool:
    """Whether a parsed config is in the plain form: ``lora`` at the top, or ``model.type``."""
    if not isinstance(config, Mapping):
        return False
    model = config.get("model")
    return "lora" in config or (isinstance(model, Mapping) and "type" in model)


def from_plain(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Our sections from a config in the plain form; all else is left to its default.

    Args:
        config: the parsed config.
        source: how messages name it.

    Returns:
        ``{"model": {"model_name": …, "num_classes": …, "lora": {…}}}``.

    Raises:
        FedloraError: for a key or a type that does not exist, with the nearest one that does.
    """
    refuse_unknown(config, ("model", "lora"), source)
    model, lora = (_section(config, name, source) for name in ("model", "lora"))
    refuse_unknown(model, MODEL_KEYS, f"{source}: model")
    refuse_unknown(lora, [field.name for field in fields(LoRAConfig)], f"{source}: lora")
    kind = model.pop("type", "clip_lora" if "lora" in config else None)
    if kind not in TYPES:
        raise FedloraError(
            f"{source}: model.type should be one of {', '.join(TYPES)} but got {kind!r}"
            f"{_nearest(str(kind), TYPES)}."
        )
    if kind == "clip":
        if lora and lora.get("enabled", True):
            raise FedloraError(
                f"{source}: model.type is clip, which has no adapter, but there is a lora section. "
                "Set model.type to clip_lora, or lora.enabled to false."
            )
        lora["enabled"] = False
    return {"model": {**model, "lora": lora}}


def _section(config: Mapping[str, Any], name: str, source: str) -> dict[str, Any]:
    section = config.get(name) or {}
    if not isinstance(section, Mapping):
        raise FedloraError(f"{source}: {name} must be a section with keys, got {section!r}.")
    return dict(section)


def refuse_unknown(config: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Refuse keys that do not exist.

    Raises:
        FedloraError: names the first one and the nearest that exists.
    """
    names = list(known)
    for key in config:
        if key not in names:
            raise FedloraError(
                f"{where}: there is no key {key!r}{_nearest(str(key), names)}. There are: "
                f"{', '.join(names)}."
            )


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
