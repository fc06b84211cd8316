from __future__ import annotations

import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
    roc_auc_score,
)
from torch import Tensor

from fedlora.errors import FedloraError
from fedlora.modules.metrics import (
    ClassScores,
    Scores,
    check_metrics,
    compute_metrics,
    make_metrics,
    update_metrics,
)

ALL = check_metrics(["macro_f1", "balanced_acc", "auroc", "per_class"])


def measure(logits: Tensor, label: Tensor, names=ALL, sizes=(7,)) -> Scores:
    """The figures, counted in batches of these sizes and a last one with the rest."""
    metrics = make_metrics(logits.shape[1], names)
    losses = torch.nn.functional.cross_entropy(logits, label, reduction="none")
    ends = [end for end in np.cumsum([0, *sizes]).tolist() if end < len(label)] + [len(label)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for start, end in pairwise(ends):
            rows = slice(start, end)
            step = {"logits": logits[rows], "label": label[rows], "losses": losses[rows]}
            update_metrics(metrics, step)
        return compute_metrics(metrics, names)


def draw(
    seed: int, rows: int, classes: int, occur: list[int], scale: float = 1, squash: bool = False
) -> tuple[Tensor, Tensor]:
    """Logits that lean to the right class, and labels among those that occur."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.tensor(occur)[torch.randint(0, len(occur), (rows,), generator=generator)]
    logits = torch.randn(rows, classes, generator=generator)
    logits[torch.arange(rows), label] += 0.7
    return (logits.sigmoid() if squash else scale * logits), label


def by_sklearn(logits: Tensor, label: Tensor) -> dict[str, float]:
    y, predicted = label.numpy(), logits.argmax(1).numpy()
    probs = softmax(logits.double().numpy(), 1)
    occur = np.unique(y)
    areas = [roc_auc_score(y == c, probs[:, c]) for c in occur if (y == c).sum() < len(y)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # y_pred contains classes not in y_true
        return {
            "acc": accuracy_score(y, predicted),
            "loss": log_loss(y, probs, labels=range(logits.shape[1])),  # cut off at 36
            "balanced_acc": balanced_accuracy_score(y, predicted),
            "macro_f1": f1_score(y, predicted, average="macro"),
            "auroc": np.mean(areas) if areas else None,
        }


CASES = {
    "all classes": draw(0, 200, 5, [0, 1, 2, 3, 4]),
    "two classes": draw(1, 60, 2, [0, 1]),
    "rare classes": draw(2, 300, 12, [0] * 40 + list(range(12))),
    "absent classes are predicted": draw(3, 50, 8, [1, 4, 5]),
    "logits between 0 and 1": draw(4, 80, 4, [0, 1, 2, 3], squash=True),
    "as sure as CLIP": draw(5, 400, 6, [0, 1, 2, 3, 4, 5], scale=5.0),
    "a single row per class": draw(6, 3, 5, [0, 2, 3]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sizes", [(7,), (1, 1, 30), (1000,)])
def test_the_figures_are_those_of_scikit_learn(case: str, sizes: tuple[int, ...]) -> None:
    logits, label = CASES[case]
    assert measure(logits, label, sizes=sizes).values == pytest.approx(
        by_sklearn(logits, label), rel=1e-5
    )


def test_where_all_classes_occur_auroc_is_sklearns_own_macro() -> None:
    logits, label = CASES["all classes"]
    expected = roc_auc_score(
        label, softmax(logits.double().numpy(), 1), multi_class="ovr", average="macro"
    )
    assert measure(logits, label).values["auroc"] == pytest.approx(expected, abs=1e-5)


def test_a_class_that_nobody_predicts() -> None:
    logits, label = CASES["all classes"]
    logits = logits.clone()
    logits[:, 2] -= 10
    scores = measure(logits, label)
    assert scores.values == pytest.approx(by_sklearn(logits, label), rel=1e-5)
    assert scores.classes[2].precision is None
    assert scores.classes[2].recall == scores.classes[2].f1 == 0


def test_one_class_only_has_no_auroc() -> None:
    logits, _ = draw(0, 20, 3, [0, 1, 2])
    label = torch.full((20,), 1)
    scores = measure(logits, label)
    assert scores.values["auroc"] is None
    others = {name: value for name, value in scores.values.items() if name != "auroc"}
    assert others == pytest.approx(
        {k: v for k, v in by_sklearn(logits, label).items() if k in others}
    )
    assert scores.classes[1].auroc is None
    assert scores.classes[0].recall is None  # predicted, but none there
    assert scores.classes[0].precision == scores.classes[0].f1 == 0


def test_by_hand() -> None:
    # Predicted 0, 0, 1, 1, 2; class 3 neither occurs nor is predicted, class 2 only predicted.
    probs = [
        [0.7, 0.1, 0.1, 0.1],
        [0.6, 0.2, 0.1, 0.1],
        [0.2, 0.5, 0.2, 0.1],
        [0.1, 0.8, 0.05, 0.05],
        [0.15, 0.25, 0.5, 0.1],
    ]
    scores = measure(torch.tensor(probs).log(), torch.tensor([0, 1, 1, 1, 0]))
    assert scores.values["acc"] == pytest.approx(3 / 5)
    assert scores.values["balanced_acc"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert scores.values["macro_f1"] == pytest.approx((1 / 2 + 4 / 5 + 0) / 3)
    # Class 0: 0.7 is above 0.6, 0.2 and 0.1, and 0.15 above 0.1: 4 of 6 pairs.
    # Class 1: 0.8 and 0.5 are above 0.1 and 0.25, and 0.2 above 0.1: 5 of 6 pairs.
    assert scores.values["auroc"] == pytest.approx((4 / 6 + 5 / 6) / 2)
    first, second, third, fourth = scores.classes
    assert first == ClassScores(2, 0.5, 0.5, 0.5, pytest.approx(4 / 6))
    assert second == ClassScores(3, 1.0, pytest.approx(2 / 3), 0.8, pytest.approx(5 / 6))
    assert third == ClassScores(0, 0.0, None, 0.0, None)
    assert fourth == ClassScores(0, None, None, None, None)


@pytest.mark.parametrize("case", CASES)
def test_each_class_is_as_in_scikit_learn(case: str) -> None:
    logits, label = CASES[case]
    y, predicted, classes = label.numpy(), logits.argmax(1).numpy(), range(logits.shape[1])
    columns = precision_recall_fscore_support(y, predicted, labels=classes, zero_division=np.nan)
    found = measure(logits, label).classes
    assert [one.samples for one in found] == columns[3].tolist()
    for name, expected in zip(("precision", "recall", "f1"), columns, strict=False):
        values = [math.nan if getattr(one, name) is None else getattr(one, name) for one in found]
        assert values == pytest.approx(expected.tolist(), nan_ok=True)
    for number, one in enumerate(found):
        hits = y == number
        assert (one.auroc is None) == (not hits.any() or hits.all())
        if one.auroc is not None:
            probs = softmax(logits.double().numpy(), 1)[:, number]
            assert one.auroc == pytest.approx(roc_auc_score(hits, probs), abs=1e-5)


def test_probabilities_near_1_are_told_apart() -> None:
    # In float32 all three are 1: ties, and an area of 1/2.
    logits = torch.tensor([[20.0, 0], [18, 0], [19, 0]])
    assert torch.equal(logits.softmax(1)[:, 0], torch.ones(3))
    assert measure(logits, torch.tensor([0, 1, 1])).values["auroc"] == 1


def test_auroc_of_values_that_are_no_numbers_is_not_defined() -> None:
    logits, label = (tensor.clone() for tensor in CASES["all classes"])
    logits[3, 2] = math.nan
    metrics = make_metrics(5, ["auroc"])["areas"]
    metrics.update(logits, label)
    assert metrics.compute().isnan().all()


def test_only_what_is_asked_for_is_counted() -> None:
    logits, label = CASES["all classes"]
    assert set(make_metrics(5)) == {"acc", "loss"}
    assert list(measure(logits, label, ()).values) == ["acc", "loss"]
    assert set(make_metrics(5, ["macro_f1"])) == {"acc", "loss", "counts"}
    auroc = measure(logits, label, ["auroc"])
    assert list(auroc.values) == ["acc", "loss", "auroc"]
    assert auroc.classes == ()
    alone = measure(logits, label, ["per_class"])
    assert list(alone.values) == ["acc", "loss"]
    assert alone.classes == measure(logits, label).classes


def test_nothing_of_a_size_of_classes_squared_is_made() -> None:
    # Where algorithms must be deterministic torchmetrics' multiclass counts take n * classes**2.
    logits, label = draw(7, 64, 3000, list(range(3000)))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        values = measure(logits, label, ["macro_f1", "balanced_acc"], sizes=(1000,)).values
    finally:
        torch.use_deterministic_algorithms(before)
    expected = by_sklearn(logits, label)
    assert values["macro_f1"] == pytest.approx(expected["macro_f1"])
    assert values["balanced_acc"] == pytest.approx(expected["balanced_acc"])


def test_names_are_kept_once_and_wrong_ones_refused() -> None:
    assert check_metrics(None) == ()
    assert check_metrics(["auroc", "macro_f1", "auroc"]) == ("macro_f1", "auroc")
    for wrong in (["auroc", "f1"], "f1"):
        with pytest.raises(FedloraError, match=r"model.metrics must be .* per_class, got 'f1' in"):
            check_metrics(wrong)
