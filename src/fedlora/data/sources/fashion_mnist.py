"""Fashion-MNIST, and MNIST's other likes, from the four files that they come in."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.data.sources.base import ImageSource, ImageTable
from fedlora.data.sources.classes import check_class_names
from fedlora.data.sources.files_on_disk import MISSING, existing_folder, full_path, printable, stamp
from fedlora.data.sources.idx_file import IdxFile
from fedlora.data.templates import DEFAULT_TEMPLATES
from fedlora.errors import FedloraError

# Split -> how its files' names begin.
_PREFIXES = {"train": "train", "test": "t10k"}
# Where they lie below the root; the last two are torchvision's.
_FOLDERS = (".", "raw", "FashionMNIST/raw")

_CLASS_NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_TEMPLATES = (
    "a photo of a {}, a type of clothing.",
    "a black and white photo of a {}.",
    "a low resolution photo of a {}.",
    "a product photo of a {} on a black background.",
)


@dataclass(frozen=True, eq=False)
class _Found:
    """What is on the disk: the files of the pictures by split, train first, and the table."""

    images: list[IdxFile]
    table: ImageTable


class FashionMNIST(ImageSource):
    """Fashion-MNIST: 70,000 grey pictures of 28 x 28 pixels, ten kinds of clothing.

    .. code-block:: yaml

        data:
          source:
            class_path: fedlora.data.FashionMNIST
            init_args:
              root: /usr/share/datasets/fashion-mnist

    Nothing is downloaded. The folder has the four files of the data set, as they come (.gz) or
    unpacked: ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-images-idx3-ubyte``
    and ``t10k-labels-idx1-ubyte``. Debian's package ``dataset-fashion-mnist`` puts them into
    ``/usr/share/datasets/fashion-mnist``; where torchvision fetched them, ``root`` is what was its
    ``root``. The test split is the one published.

    MNIST, KMNIST and others in the same files work as well, with ``class_names`` of their own and
    the folder of the files as ``root``; pictures may have any size.

    The pictures stay in memory, 55 MB, once the first is read.

    Args:
        root: the folder, or torchvision's above it; ``~`` is the home folder.
        class_names: one per label, from label 0 on; None for those of Fashion-MNIST.
        templates: prompts with one ``{}`` each; None for a few about clothing, or, with
            ``class_names``, for "a photo of a {}.".

    Raises:
        FedloraError: if an argument is not usable by itself; the disk is looked at in
            :meth:`prepare`.
    """

    # Of the class: a lock in an instance would keep it from being copied to another process.
    _looking: ClassVar[threading.RLock] = threading.RLock()

    def __init__(
        self, root: str, class_names: list[str] | None = None, templates: list[str] | None = None
    ) -> None:
        if not str(root).strip():
            raise FedloraError("data.source.root must be a folder, got an empty name. Name one.")
        names = check_class_names(class_names)
        if names is not None and (isinstance(names, dict) or len(names) < 2):
            raise FedloraError(
                "data.source.class_names must be a list of two names or more, one per label from "
                f"label 0 on, got {class_names!r}."
            )
        self.root = root
        self._class_names = _CLASS_NAMES if names is None else tuple(names)
        self._seen: _Found | None = None
        self._images: Tensor | None = None
        default = _TEMPLATES if names is None else DEFAULT_TEMPLATES
        super().__init__(default if templates is None else templates)

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of the labels."""
        return list(self._class_names)

    @property
    def place(self) -> str:
        """The full path of the folder."""
        return printable(str(full_path(self.root)))

    def prepare(self) -> None:
        """Check the files, all but the pixels; anew if it was done before.

        Raises:
            FedloraError: if a file is missing or broken, files do not fit together, or a label has
                no class name.
        """
        with self._looking:
            self._seen, self._images = self._look(), None

    def load(self) -> ImageTable:
        """The training pictures in their files' order, then those for testing.

        Raises:
            FedloraError: as :meth:`prepare`.
        """
        return self._found.table

    def read(self, rows: Sequence[int]) -> Tensor:
        """Pictures (n, 1, 28, 28), uint8.

        Raises:
            FedloraError: as :meth:`prepare`, or if the pixels' files are cut short or broken.
        """
        return self._pixels[torch.as_tensor(list(rows), dtype=torch.int64)]

    @property
    def _found(self) -> _Found:
        with self._looking:
            if self._seen is None:
                self._seen = self._look()
            return self._seen

    @property
    def _pixels(self) -> Tensor:
        """All pictures, (n, 1, H, W)."""
        # Whoever comes second waits, instead of unpacking a second time.
        with self._looking:
            if self._images is None:
                files = self._found.images
                counts = [file.shape[0] for file in files]
                pixels = np.empty((sum(counts), *files[0].shape[1:]), dtype=np.uint8)
                for file, part in zip(files, np.split(pixels, np.cumsum(counts)[:-1]), strict=True):
                    file.read_into(part)
                self._images = torch.from_numpy(pixels).unsqueeze(1)
            return self._images

    def _look(self) -> _Found:
        folder = _folder_of_files(existing_folder(self.root))
        self._check_names(folder)
        images, labels, split, keys, stamps = [], [], [], [], []
        for name, prefix in _PREFIXES.items():
            file = IdxFile.open(_existing(folder, f"{prefix}-images-idx3-ubyte"), 3)
            count = file.shape[0]
            images.append(file)
            labels.append(self._labels(_existing(folder, f"{prefix}-labels-idx1-ubyte"), file))
            split += [name] * count
            keys += [f"{name}/{i:05}" for i in range(count)]
            stamps += [stamp(file.path) or MISSING] * count
        sizes = [" x ".join(map(str, file.shape[1:])) for file in images]
        if sizes[0] != sizes[1]:
            raise FedloraError(
                f"pictures for training and testing must have one size, got {sizes[0]} and "
                f"{sizes[1]} pixels in {printable(str(folder))}. Take all files from one data set."
            )
        table = ImageTable(
            labels=np.concatenate(labels),
            split=np.array(split),
            keys=np.array(keys),
            stamps=np.array(stamps),
        )
        return _Found(images, table)

    def _check_names(self, folder: Path) -> None:
        """Refuse to call digits clothes, where torchvision's name of the folder tells."""
        other = {"MNIST", "EMNIST", "KMNIST", "QMNIST"} & {folder.name, folder.parent.name}
        if other and self._class_names == _CLASS_NAMES:
            raise FedloraError(
                f"data.source.root holds {other.pop()}, not Fashion-MNIST: "
                f"{printable(str(folder))}. Give data.source.class_names, one per label, or name "
                "another folder."
            )

    def _labels(self, path: Path, images: IdxFile) -> NDArray[np.int64]:
        file = IdxFile.open(path, 1)
        if file.shape != images.shape[:1] or 0 in images.shape:
            raise FedloraError(
                f"{printable(str(path))} has {file.shape[0]:,} labels for {images.shape[0]:,} "
                f"pictures of {images.shape[1]} x {images.shape[2]} pixels in {images.path.name}. "
                "Take both files from one data set."
            )
        labels = np.empty(file.shape, dtype=np.uint8)
        file.read_into(labels)
        if labels.max() >= len(self._class_names):
            raise FedloraError(
                f"{printable(str(path))} has labels up to {labels.max()}, and there are "
                f"{len(self._class_names)} class names, for 0 to {len(self._class_names) - 1}. "
                "Give data.source.class_names one name per label."
            )
        return labels.astype(np.int64)


def _folder_of_files(root: Path) -> Path:
    """Where below the root the files are; the root itself if nowhere."""
    for below in _FOLDERS:
        for prefix in _PREFIXES.values():
            if _find(root / below, f"{prefix}-images-idx3-ubyte"):
                return root / below
    return root


def _find(folder: Path, name: str) -> Path | None:
    # torchvision leaves both: the unpacked file is quicker.
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _existing(folder: Path, name: str) -> Path:
    found = _find(folder, name)
    if found is None:
        raise FedloraError(
            f"data.source.root must have a file {name} or {name}.gz, there is none in "
            f"{printable(str(folder))} (nor in {' or '.join(_FOLDERS[1:])} below it). Get the four "
            "files of https://github.com/zalandoresearch/fashion-mnist, or Debian's package "
            "dataset-fashion-mnist."
        )
    return found
