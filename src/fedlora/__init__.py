"""Federated LoRA fine-tuning of CLIP on PyTorch Lightning and Fabric."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Public name -> module; imported when first used, so that `import fedlora` stays cheap.
_NAMES = {
    "AdapterAveraging": "fedlora.callbacks.averaging",
    "CLIPLoRAClassifier": "fedlora.modules.classifier",
    "CLIPLoRAWrapper": "fedlora.modules.clip_wrapper",
    "Ditto": "fedlora.callbacks.ditto",
    "FedProx": "fedlora.callbacks.proximal",
    "FederatedCLIPModel": "fedlora.modules.clip",
    "FederatedDataModule": "fedlora.data.datamodule",
    "FederatedTrainer": "fedlora.trainer",
    "FedloraError": "fedlora.errors",
    "LoRAConfig": "fedlora.modules.config",
    "LoRAConfigManager": "fedlora.store",
    "LoRAModelManager": "fedlora.store",
    "LoRAWrapper": "fedlora.modules.lora",
    "Objective": "fedlora.callbacks.objective",
    "ParameterReport": "fedlora.modules.report",
    "RoundCheckpoint": "fedlora.callbacks.checkpoint",
    "RoundLR": "fedlora.round_lr",
    "SCAFFOLD": "fedlora.callbacks.scaffold",
    "Sampling": "fedlora.sampling",
    "create_model": "fedlora.modules.factory",
    "load_adapter": "fedlora.modules.saved",
    "quick_clip_lora": "fedlora.modules.factory",
}
__all__ = ["__version__", *sorted(_NAMES)]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("fedlora")
    if name not in _NAMES:
        raise AttributeError(f"module 'fedlora' has no attribute {name!r}")
    if name != "FedloraError":  # all others need the packages underneath
        from fedlora.dependencies import check

        check()
    return getattr(import_module(_NAMES[name]), name)


def __dir__() -> list[str]:
    return __all__
