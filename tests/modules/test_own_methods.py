from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlora.errors import FedloraError
from fedlora.modules.own_methods import arguments_for, count, refuse_blind, refuse_difference


def test_what_a_method_is_called_with() -> None:
    assert arguments_for(lambda: 0) == ()
    assert arguments_for(lambda config: 0) == ({},)
    assert arguments_for(lambda config=None: 0) == ()
    assert arguments_for(lambda a, b: 0) is None


def test_counting() -> None:
    assert count({"a": [np.ones(3), torch.ones(2, 2)], "n": 12}) == 7
    assert count(([np.ones(3)], 5, {"x": None})) == 3
    assert count([b"bytes"]) is None
    assert count(object()) is None


@pytest.mark.parametrize(
    ("found", "fine"), [(12, True), (20, True), (2, False), (0, False), (500, False)]
)
def test_who_does_not_see_the_adapter(found: int, fine: bool) -> None:
    given = [np.ones(found)]
    if fine:
        refuse_blind(given, 10, 2, 500, "get")
        return
    with pytest.raises(
        FedloraError, match=rf"get\(\) gives {found} numbers where the adapter has 10"
    ):
        refuse_blind(given, 10, 2, 500, "get")


def test_differences_are_named() -> None:
    own = [np.ones(2), np.ones(3)]
    refuse_difference(own, own, "x")
    with pytest.raises(
        FedloraError, match=r"x do not fit .*'value 1' has shape \(1,\), expected \(3,\)"
    ):
        refuse_difference((own, 7), [np.ones(2), np.ones(1)], "x")
    refuse_difference(own, "left to its own method", "x")
