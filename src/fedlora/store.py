"""Named configs and adapters on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from fedlora.errors import FedloraError
from fedlora.files import write_text
from fedlora.modules.config import LoRAConfig
from fedlora.modules.plain_config import refuse_unknown
from fedlora.named_folder import NamedFolder


class LoRAConfigManager(NamedFolder):
    """Keeps adapter settings under names, as YAML.

    Args:
        folder: where; they are in its subfolder ``configs``. None means the user's data folder.

    Example:
        >>> import tempfile
        >>> manager = LoRAConfigManager(tempfile.mkdtemp())
        >>> file = manager.save_config(LoRAConfig.for_clip_model(r=8, lora_alpha=16), "clip_small")
        >>> manager.load_config("clip_small").r
        8
    """

    kind = "config"
    subfolder = "configs"
    suffix = ".yaml"

    def save_config(self, config: LoRAConfig, name: str, overwrite: bool = False) -> Path:
        """Save settings; returns the file.

        Raises:
            FedloraError: for wrong settings or a wrong name, and where the name is taken.
        """
        self.path(name)
        if not isinstance(config, LoRAConfig):
            raise FedloraError(f"config must be a LoRAConfig, got {type(config).__name__}.")
        config.validate()
        # In JSON numpy's floats, which YAML refuses, are like Python's.
        plain = json.loads(json.dumps(config.to_dict()))
        with self.writing():
            path = self.make_room(name, overwrite)
            write_text(path, yaml.safe_dump(plain, sort_keys=False))
        return path

    def load_config(self, name: str) -> LoRAConfig:
        """The settings of this name.

        Raises:
            FedloraError: where there are none (with the nearest name), and for a file with unknown
                keys or wrong values.
        """
        path = self.find(name)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise FedloraError(f"{path} cannot be read: {reason}. Save the config anew.") from error
        if not isinstance(content, dict):
            raise FedloraError(f"{path} must hold settings (key: value), got {content!r}.")
        refuse_unknown(content, [field.name for field in fields(LoRAConfig)], str(path))
        config = LoRAConfig(**content)
        try:
            config.validate()
        except FedloraError as error:
            raise FedloraError(f"{path}: {error}") from error
        config.target_components = tuple(config.target_components)
        return config

    def list_configs(self) -> list[str]:
        """The names that there are, sorted."""
        return self.names()

    def delete_config(self, name: str) -> None:
        """Forget settings.

        Raises:
            FedloraError: where there are none of this name.
        """
        self.delete(name)


class LoRAModelManager(NamedFolder):
    """Keeps adapters under names: each a folder that PEFT loads too.

    Args:
        folder: where; they are in its subfolder ``models``. None means the user's data folder.
    """

    kind = "model"
    subfolder = "models"

    def save_model(
        self,
        wrapper_or_model: Any,
        name: str,
        overwrite: bool = False,
        metrics: Mapping[str, float] | None = None,
    ) -> Path:
        """Save an adapter; returns its folder.

        Args:
            wrapper_or_model: a LoRAWrapper or an object that a CLIPLoRAWrapper wraps.
            name: what to call it.
            overwrite: replace one of this name.
            metrics: figures to keep with it: name -> number.

        Raises:
            FedloraError: for a wrong name or one that is taken, for metrics that are no finite
                numbers, and where the adapter is not on.
        """
        from fedlora.export import export_adapter
        from fedlora.modules.saved import wrapper_of

        self.path(name)
        lora = wrapper_of(wrapper_or_model)
        if not lora.config.enabled:
            raise FedloraError(
                "there is no adapter to save: LoRA is off (lora.enabled=false), all weights are "
                "trained. Save the model itself, with its save_pretrained or its state_dict()."
            )
        about = {"name": name, "created": datetime.now(UTC).isoformat(timespec="seconds")}
        figures = _numbers(metrics or {})
        with self.writing():
            path = self.make_room(name, overwrite)
            export_adapter(path, lora, lora.state(), {**about, "metrics": figures})
        return path

    def load_model(self, name: str, wrapper_or_model: Any) -> None:
        """Put a saved adapter into a model.

        Args:
            name: what it is called.
            wrapper_or_model: as in :meth:`save_model`; with the settings that it was trained with.

        Raises:
            FedloraError: where there is none of this name (with the nearest), it is damaged, or it
                does not fit, naming each difference; nothing is changed then.
        """
        from fedlora.modules.saved import load_adapter, wrapper_of

        lora = wrapper_of(wrapper_or_model)  # before the folder is looked for
        with self.reading():
            load_adapter(self.find(name), lora)

    def list_models(self) -> list[str]:
        """The names that there are, sorted."""
        return self.names()

    def is_one(self, path: Path) -> bool:
        """Whether it is a folder."""
        return path.is_dir()

    def delete_model(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            FedloraError: where there is none of this name.
        """
        self.delete(name)

    def get_model_info(self, name: str) -> dict[str, Any]:
        """What is known of a saved adapter.

        Returns:
            ``name``, ``base_model``, ``config`` (the LoRAConfig's fields), ``counts`` (parameters:
            total, adapter, full, exchanged), ``bytes`` (of one exchange), ``created`` (ISO 8601,
            UTC), ``metrics``, ``version`` (of fedlora).

        Raises:
            FedloraError: where there is none of this name, or it is damaged.
        """
        from fedlora.modules.peft_files import read_json
        from fedlora.modules.saved import ABOUT

        with self.reading():
            told = read_json(self.find(name) / ABOUT)
        names = {"config": "lora", "version": "fedlora"}
        asked = ("base_model", "config", "counts", "bytes", "created", "metrics", "version")
        return {"name": name, **{key: told.get(names.get(key, key)) for key in asked}}


def _numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    try:
        plain = {str(n): v if isinstance(v, int) else float(v) for n, v in metrics.items()}
        json.dumps(plain, allow_nan=False)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise FedloraError(
            f"metrics must be a dict of name -> finite number, got {metrics!r}. Leave out what is "
            "none."
        ) from error
    return plain
