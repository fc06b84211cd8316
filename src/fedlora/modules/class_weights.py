"""How much the samples of each class count in the training loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from fedlora.errors import FedloraError

ClassWeights = Literal["balanced"] | list[float] | None


def check_class_weights(weights: ClassWeights) -> ClassWeights:
    """The weights in plain numbers; refuses what can be none, whatever the classes are.

    Raises:
        FedloraError: names the first that is wrong.
    """
    if weights is None or (isinstance(weights, str) and weights == "balanced"):
        return weights
    if isinstance(weights, str) or not isinstance(weights, Iterable):
        raise FedloraError(
            "model.class_weights must be balanced or a list with one number per class, got "
            f"{weights!r}."
        )
    given = list(weights)
    for weight in given:
        if not isinstance(weight, Real) or not 0 < weight < math.inf:
            raise FedloraError(
                f"model.class_weights must be numbers above 0, got {weight!r} in it. Leave out the "
                "rows of a class that is not to count."
            )
    return [float(weight) for weight in given]


def make_class_weights(
    weights: ClassWeights, num_classes: int, counts: Sequence[int] | None
) -> Tensor | None:
    """The weight of each class: (num_classes,), float32; None where all count the same.

    Args:
        weights: as given. ``balanced``: n / (k * n_c) for n samples of k classes, n_c of them of
            this one, as scikit-learn's ``compute_class_weight``; their mean over the samples is 1.
            A class without samples gets 0 and does not count in k.
        num_classes: number of classes.
        counts: training samples of each class, which ``balanced`` needs.

    Raises:
        FedloraError: for another number of weights or counts, or no counts.
    """
    if weights is None:
        return None
    if weights != "balanced":
        if len(weights) != num_classes:
            raise FedloraError(
                f"model.class_weights must have one number per class ({num_classes}), got "
                f"{len(weights)}."
            )
        return torch.tensor(weights, dtype=torch.float32)
    if counts is None:
        raise FedloraError(
            "model.class_weights=balanced needs the training rows of each class, which a "
            "FederatedDataModule counts. Use one, give build() class_counts, or give a list."
        )
    if len(counts) != num_classes:
        raise FedloraError(
            f"class_counts must have one number per class ({num_classes}), got {len(counts)}."
        )
    found = torch.tensor(counts, dtype=torch.float64)
    balanced = found.sum() / ((found > 0).sum() * found)
    return torch.where(found > 0, balanced, 0.0).float()
