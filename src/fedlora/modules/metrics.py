"""What an evaluation measures: every sample counts once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MultilabelStatScores
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities import dim_zero_cat

from fedlora.errors import FedloraError

MetricName = Literal["macro_f1", "balanced_acc", "auroc", "per_class"]


@dataclass(frozen=True)
class ClassScores:
    """How well one class is told from the others; None where there is nothing to divide by.

    Attributes:
        samples: samples of this class.
        precision: part that is of this class of the samples predicted to be.
        recall: part that is predicted to be of this class of its samples.
        f1: harmonic mean of the two; 0 where no sample is hit.
        auroc: area under the ROC curve, this class against all others.
    """

    samples: int
    precision: float | None
    recall: float | None
    f1: float | None
    auroc: float | None


@dataclass(frozen=True)
class Scores:
    """What an evaluation found.

    Attributes:
        values: figures over all samples by name; None where one is not defined, empty where there
            were no samples.
        classes: figures of each class, in the order of the labels; empty unless asked for.
    """

    values: Mapping[str, float | None]
    classes: Sequence[ClassScores] = ()

    def defined(self) -> dict[str, float]:
        """The figures that are defined."""
        return {name: value for name, value in self.values.items() if value is not None}


class ClassAUROC(Metric):
    """Area under the ROC curve of each class against all others: (classes,), NaN where undefined.

    Samples are ranked by the softmax probability, in float64: a confident model's would be ties in
    float32. ``MulticlassAUROC`` keeps float32 and warns of every class that does not occur.

    The logits of all samples are kept until then: n * classes * 4 bytes, twice that for a moment.
    """

    full_state_update = False
    logits: list[Tensor]
    label: list[Tensor]
    log_sum: list[Tensor]

    def __init__(self, sync_on_compute: bool = False) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        for name in ("logits", "label", "log_sum"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, label: Tensor) -> None:
        """Keep a batch: ``logits`` (n, classes), ``label`` (n,)."""
        self.logits.append(logits.detach())
        self.label.append(label)
        self.log_sum.append(logits.detach().double().logsumexp(1))

    def compute(self) -> Tensor:
        """One value per class, float64; NaN for a class of no or of all samples."""
        logits, label, log_sum = map(dim_zero_cat, (self.logits, self.label, self.log_sum))
        areas = torch.full((logits.shape[1],), math.nan, dtype=torch.float64)
        if not bool(log_sum.isfinite().all()):
            return areas
        for number in sorted(set(label.tolist())):
            positive = (label == number).long()
            if int(positive.sum()) < len(label):
                # One class at a time: all probabilities would take twice the logits' memory.
                score = (logits[:, number].double() - log_sum).exp().clamp(max=1)
                areas[number] = binary_auroc(score, positive, validate_args=False)
        return areas


def check_metrics(names: Iterable[str] | None) -> tuple[MetricName, ...]:
    """The names in ``model.metrics``, each once.

    Raises:
        FedloraError: for a name that does not exist.
    """
    known: tuple[MetricName, ...] = get_args(MetricName)
    given = [names] if isinstance(names, str) else list(names or ())
    for name in given:
        if name not in known:
            raise FedloraError(
                f"model.metrics must be a list of {', '.join(known)}, got {name!r} in it."
            )
    return tuple(name for name in known if name in given)


def make_metrics(
    num_classes: int, names: Sequence[MetricName] = (), sync: bool = False
) -> MetricCollection:
    """Fresh ``acc`` and ``loss`` and what ``names`` needs, updated by :func:`update_metrics`.

    Args:
        num_classes: number of classes.
        names: what :func:`compute_metrics` is to give besides.
        sync: add up over ranks; elsewhere the trainer does, which counts each sample once.
    """
    metrics: dict[str, Metric | MetricCollection] = {
        "acc": MulticlassAccuracy(num_classes=num_classes, average="micro", sync_on_compute=sync),
        "loss": MeanMetric(sync_on_compute=sync).set_dtype(torch.float64),
    }
    if {"macro_f1", "balanced_acc", "per_class"} & set(names):
        # One label per class: the multiclass one fills a matrix of classes * classes with each
        # batch, and one of n * classes * classes where algorithms must be deterministic.
        metrics["counts"] = MultilabelStatScores(
            num_classes, average="none", validate_args=False, sync_on_compute=sync
        )
    if {"auroc", "per_class"} & set(names):
        metrics["areas"] = ClassAUROC(sync)
    return MetricCollection(metrics, compute_groups=False)


def update_metrics(metrics: MetricCollection, step: Mapping[str, Tensor]) -> None:
    """Count a batch: ``logits`` (n, classes), ``label`` (n,), ``losses`` (n,)."""
    logits, label = step["logits"], step["label"]
    metrics["acc"].update(logits, label)
    metrics["loss"].update(step["losses"].double())
    if "counts" in metrics:
        classes = torch.arange(logits.shape[1], device=logits.device)
        predicted = logits.argmax(1, keepdim=True) == classes
        metrics["counts"].update(predicted.long(), (label[:, None] == classes).long())
    if "areas" in metrics:
        metrics["areas"].update(logits, label)


def compute_metrics(metrics: MetricCollection, names: Sequence[MetricName] = ()) -> Scores:
    """Figures of all samples counted, as scikit-learn defines them.

    ``acc`` and ``loss``; ``macro_f1``: ``f1_score(average="macro")``, over the classes that occur
    or are predicted; ``balanced_acc``: ``balanced_accuracy_score``, the mean recall of the classes
    that occur; ``auroc``: ``roc_auc_score``, the mean of one class against the others, over the
    classes that occur (not defined where only one does).

    Args:
        metrics: from :func:`make_metrics` with the same names, updated at least once.
        names: what to give besides ``acc`` and ``loss``; ``per_class`` gives ``classes``.
    """
    found = metrics.compute()
    values: dict[str, float | None] = {name: float(found[name]) for name in ("acc", "loss")}
    columns: dict[str, Tensor] = {}
    if "counts" in found:
        hits, wrong, _, missed, samples = found["counts"].cpu().double().unbind(1)
        # 0 / 0 is NaN: not defined, and no part of a mean.
        columns = {
            "samples": samples,
            "precision": hits / (hits + wrong),
            "recall": hits / samples,
            "f1": 2 * hits / (2 * hits + wrong + missed),
        }
    if "areas" in found:
        columns["auroc"] = found["areas"].cpu()
    means = {"macro_f1": "f1", "balanced_acc": "recall", "auroc": "auroc"}
    values |= {name: _defined(columns[means[name]].nanmean()) for name in names if name in means}
    if "per_class" not in names:
        return Scores(values)
    rows = zip(*columns.values(), strict=True)
    return Scores(values, [ClassScores(int(row[0]), *map(_defined, row[1:])) for row in rows])


def _defined(value: Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)
