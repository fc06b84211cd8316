"""Ready models: in one line, or from the configuration that an existing project has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from fedlora.errors import FedloraError
from fedlora.files import expand
from fedlora.modules.clip import FederatedCLIPModel, Head
from fedlora.modules.clip_wrapper import CLIPLoRAWrapper
from fedlora.modules.config import LoRAConfig
from fedlora.modules.plain_config import from_plain


def quick_clip_lora(
    model_name: str = "openai/clip-vit-base-patch32",
    num_classes: int | None = None,
    lora_r: int = 16,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.1,
    target_components: Sequence[str] = ("encoder",),
    class_names: Sequence[str] | None = None,
    head: Head = "linear",
) -> FederatedCLIPModel:
    """A CLIP classifier with a LoRA adapter, used like any :class:`FederatedCLIPModel`.

    Args:
        model_name: ``tiny-clip``, a local folder in the Hugging Face layout, or a hub name.
        num_classes: number of classes; None takes it from ``class_names``.
        lora_r: the rank.
        lora_alpha: scaled by lora_alpha / lora_r; None means twice the rank, as in the presets.
        lora_dropout: dropout on the adapter's input.
        target_components: ``["encoder"]`` or ``["encoder", "classifier"]``.
        class_names: one per class; the linear head then starts as the zero-shot classifier.
        head: ``linear`` or ``text``.

    Returns:
        The model; its wrapper is ``model.lora_wrapper``.

    Raises:
        FedloraError: for a wrong setting, or a model that cannot be had.
    """
    config = LoRAConfig(
        r=lora_r,
        lora_alpha=_twice(lora_r) if lora_alpha is None else lora_alpha,
        lora_dropout=lora_dropout,
        target_components=list(target_components),
    )
    config.validate()  # before the model is loaded
    model = FederatedCLIPModel(model_name, num_classes, head=head, class_names=class_names)
    CLIPLoRAWrapper(model, config).apply_lora_to_federated_model()
    return model


def _twice(r: Any) -> Any:
    return 2 * r if isinstance(r, int) else r  # what is no rank is refused as such


def create_model(config: object) -> FederatedCLIPModel:
    """The model that a configuration describes, adapter included.

    Args:
        config: ``{"model": {"type", "model_name", "num_classes"}, "lora": {…}}`` as a mapping, an
            object with these attributes (at any level), or the path of a YAML file. ``type`` is
            ``clip`` (no adapter) or ``clip_lora``; ``lora`` takes the fields of LoRAConfig.

    Raises:
        FedloraError: for a type or key that does not exist, with the nearest that does; for a
            wrong value; for a file that cannot be read.
    """
    source = "the config"
    try:
        if isinstance(config, str | PathLike):
            source = str(config)
            config = _read(expand(config, "config"))
        plain = _as_mapping(config, source)
    except RecursionError as error:
        raise FedloraError(
            f"{source} has a section that contains itself or too many inside one another (a YAML "
            "anchor and its alias?). Write out the values."
        ) from error
    sections = from_plain(plain, source)["model"]
    lora = LoRAConfig(**sections.pop("lora"))
    lora.validate()
    if "num_classes" not in sections:
        raise FedloraError(
            f"{source}: model.num_classes is missing. Say how many classes there are."
        )
    model = FederatedCLIPModel(**sections)
    if lora.enabled:
        CLIPLoRAWrapper(model, lora).apply_lora_to_federated_model()
    return model


def _read(path: Path) -> object:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FedloraError(f"{path} cannot be read: {error.strerror}. Check the path.") from error
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise FedloraError(f"{path} cannot be read as YAML: {reason}") from error


def _as_mapping(config: object, where: str) -> dict[str, Any]:
    """Mappings, dataclasses and objects with attributes as plain dicts, at every level."""
    if is_dataclass(config) and not isinstance(config, type):
        config = asdict(config)
    elif not isinstance(config, Mapping) and hasattr(config, "__dict__"):
        config = {name: value for name, value in vars(config).items() if name[:1] != "_"}
    if not isinstance(config, Mapping):
        raise FedloraError(
            f"{where} must be a mapping with the sections model and lora, an object with these "
            f"attributes or the path of a YAML file, got {type(config).__name__}."
        )
    return {str(name): _plain(value, f"{where}: {name}") for name, value in config.items()}


def _plain(value: object, where: str) -> Any:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    return _as_mapping(value, where)
