"""Federated LoRA fine-tuning of CLIP on PyTorch Lightning and Fabric."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

# Public name -> module; imported when first used, so that `import fedlora` stays cheap.
_NAMES = {
    "AdapterAveraging": "fedlora.callbacks.averaging",
    "CLIPLoRAClassifier": "fedlora.modules.classifier",
    "CLIPLoRAWrapper": "fedlora.modules.clip_wrapper",
    "FederatedCLIPModel": "fedlora.modules.clip",
    "FederatedDataModule": "fedlora.data.datamodule",
    "FederatedTrainer": "fedlora.trainer",
    "FedloraError": "fedlora.errors",
    "LoRAConfig": "fedlora.modules.config",
    "RoundCheckpoint": "fedlora.callbacks.checkpoint",
}
__all__ = ["__version__", *sorted(_NAMES)]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("fedlora")
    if name not in _NAMES:
        raise AttributeError(f"module 'fedlora' has no attribute {name!r}")
    return getattr(import_module(_NAMES[name]), name)


def __dir__() -> list[str]:
    return __all__
