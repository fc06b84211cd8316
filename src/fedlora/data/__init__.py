"""Pictures and who holds them: sources, preprocessing, partitions, the data module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedlora.data.augment import Augmentation
from fedlora.data.decode import BadImageError
from fedlora.data.preprocess import ImagePreprocess
from fedlora.data.sources.base import ImageSource, ImageTable
from fedlora.data.sources.digits import Digits
from fedlora.data.sources.fashion_mnist import FashionMNIST
from fedlora.data.sources.hugging_face import HuggingFaceImages
from fedlora.data.sources.image_folder import ImageFolder
from fedlora.data.sources.manifest import Manifest

if TYPE_CHECKING:
    from fedlora.data.datamodule import FederatedDataModule

__all__ = [
    "Augmentation",
    "BadImageError",
    "Digits",
    "FashionMNIST",
    "FederatedDataModule",
    "HuggingFaceImages",
    "ImageFolder",
    "ImagePreprocess",
    "ImageSource",
    "ImageTable",
    "Manifest",
]


def __getattr__(name: str) -> Any:
    # Lightning takes seconds to import; models and tools that need a size or a mean do not need it.
    if name == "FederatedDataModule":
        from fedlora.data.datamodule import FederatedDataModule

        return FederatedDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
