"""What is refused before anything is divided: settings, labels, pictures that cannot be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from fedlora.data.cache.base import Pictures
from fedlora.data.sources.base import ImageTable
from fedlora.errors import FedloraError

LEAST = {
    "num_clients": 1,
    "batch_size": 1,
    "eval_batch_size": 1,
    "n_shots": 1,
    "cache_gb": 0,
    "seed": 0,
}
FRACTIONS = ("test_fraction", "val_fraction", "client_val_fraction", "client_test_fraction")


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse numbers that are out of range.

    Args:
        settings: of the data module, by name; others than its numbers are passed over.

    Raises:
        FedloraError: with the first such number.
    """
    for name, least in LEAST.items():
        value = settings[name]
        # NaN is not below anything.
        if value is not None and not value >= least:
            raise FedloraError(f"data.{name} must be at least {least}, got {value}.")
    for name in FRACTIONS:
        if not 0 <= settings[name] < 1:
            raise FedloraError(
                f"data.{name} must be at least 0 and less than 1, got {settings[name]}."
            )


def check_labels(table: ImageTable, num_classes: int) -> None:
    """Refuse a table without pictures, or with labels that have no class name.

    Raises:
        FedloraError: in both cases.
    """
    if not len(table):
        raise FedloraError("data.source has no pictures. Check where it points.")
    if not 0 <= table.labels.min() <= table.labels.max() < num_classes:
        raise FedloraError(
            f"labels must be between 0 and {num_classes - 1} (there are {num_classes} class "
            f"names), got {table.labels.min()} to {table.labels.max()}. Give one class name per "
            "label."
        )


def check_pictures(
    table: ImageTable, images: Pictures, on_bad_image: Literal["error", "skip"]
) -> None:
    """Refuse pictures that cannot be read.

    Args:
        table: how they are called.
        images: knows which cannot be read.
        on_bad_image: ``skip`` lets them pass, unless it is all of them.

    Raises:
        FedloraError: with the first such picture and their number.
    """
    if not images.bad:
        return
    row, why = min(images.bad.items())
    if len(images.bad) == len(table):
        raise FedloraError(
            f"none of the {len(table):,} pictures can be read; {table.keys[row]}: {why}. Check "
            "where data.source points."
        )
    if on_bad_image == "error":
        others = f" and {len(images.bad) - 1} more" if len(images.bad) > 1 else ""
        raise FedloraError(
            f"cannot read the picture {table.keys[row]}{others}: {why}. Mend or remove it, or "
            "set data.on_bad_image=skip."
        )
