"""Accuracy and loss of an evaluation: every sample counts once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy


def make_metrics(num_classes: int) -> MetricCollection:
    """Fresh ``acc`` and ``loss``, updated by :func:`update_metrics`."""
    # Ranks are summed by the trainer, which counts each sample once.
    accuracy = MulticlassAccuracy(num_classes=num_classes, average="micro", sync_on_compute=False)
    return MetricCollection(
        {"acc": accuracy, "loss": MeanMetric(sync_on_compute=False).set_dtype(torch.float64)},
        compute_groups=False,
    )


def update_metrics(metrics: MetricCollection, step: Mapping[str, Tensor]) -> None:
    """Count a batch: ``logits`` (n, classes), ``label`` (n,), ``losses`` (n,)."""
    metrics["acc"].update(step["logits"], step["label"])
    metrics["loss"].update(step["losses"].double())
