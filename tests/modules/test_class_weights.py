from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from fedlora.errors import FedloraError
from fedlora.modules.class_weights import check_class_weights, make_class_weights


def test_balanced_is_that_of_scikit_learn() -> None:
    counts = [70, 5, 25, 1]
    label = np.repeat(range(4), counts)
    weights = make_class_weights("balanced", 4, counts)
    assert weights is not None
    assert weights.dtype == torch.float32
    expected = compute_class_weight("balanced", classes=np.arange(4), y=label)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6)
    assert float(weights.double()[label].mean()) == pytest.approx(1)


def test_a_class_without_rows_has_no_weight_and_does_not_count() -> None:
    # 12 rows of 3 classes: 12 / (3 n_c).
    weights = make_class_weights("balanced", 4, [8, 0, 2, 2])
    assert weights.tolist() == [0.5, 0, 2, 2]
    assert make_class_weights("balanced", 2, [0, 0]).tolist() == [0, 0]


def test_numbers_are_taken_as_they_are() -> None:
    assert make_class_weights(check_class_weights([1, 0.25]), 2, None).tolist() == [1, 0.25]
    assert check_class_weights(np.array([1, 0.25], dtype=np.float32)) == [1.0, 0.25]
    assert make_class_weights(check_class_weights(None), 2, [1, 1]) is None


WRONG: list[tuple[Any, str]] = [
    ("balancd", "must be balanced or a list with one number per class, got 'balancd'"),
    (3.0, r"must be balanced or a list with one number per class, got 3\.0"),
    ([1.0, 0.0], r"must be numbers above 0, got 0\.0 in it"),
    ([1.0, -2], "must be .*got -2 in it"),
    ([1.0, math.inf], "must be .*got inf in it"),
    ([1.0, math.nan], "must be .*got nan in it"),
    ([1.0, "2"], "must be .*got '2' in it"),
]


@pytest.mark.parametrize(("weights", "message"), WRONG)
def test_what_can_be_no_weights(weights: Any, message: str) -> None:
    with pytest.raises(FedloraError, match=rf"model\.class_weights {message}"):
        check_class_weights(weights)


def test_another_number_of_weights_or_counts() -> None:
    with pytest.raises(FedloraError, match=r"one number per class \(3\), got 2"):
        make_class_weights([1.0, 2.0], 3, None)
    with pytest.raises(FedloraError, match=r"class_counts must have one .* \(3\), got 2"):
        make_class_weights("balanced", 3, [1, 2])
    with pytest.raises(FedloraError, match="balanced needs the training rows of each class"):
        make_class_weights("balanced", 3, None)
