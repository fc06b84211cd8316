from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedlora.errors import FedloraError
from fedlora.modules.parameters import copy_of, differences, fill, part_like

ONE, TWO = torch.ones(2), torch.zeros(3, 2)


def own() -> dict[str, torch.Tensor]:
    return {"a": torch.zeros(2), "b": torch.zeros(3, dtype=torch.int64)}


def test_copies_are_copies() -> None:
    tensors = own()
    copies = copy_of(tensors)
    copies["a"].fill_(7)
    assert (tensors["a"] == 0).all()
    assert copies["b"].dtype == torch.int64


def test_filling_is_in_place() -> None:
    tensors = own()
    a = tensors["a"]
    fill(tensors, {"a": torch.ones(2), "b": torch.tensor([1, 2, 3])})
    assert tensors["a"] is a
    assert a.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"a": None}, "'a' is a NoneType, expected a tensor"),
        ({"a": np.ones(2)}, "'a' is a ndarray, expected a tensor"),
        ({"a": torch.ones(1)}, r"'a' has shape \(1,\), expected \(2,\)"),
        ({"a": torch.ones(2).double()}, r"'a' is torch\.float64, expected torch\.float32"),
        ({"a": torch.tensor([1, float("nan")])}, "'a' has values that are NaN or infinite"),
        ({"a": torch.tensor([1, float("inf")])}, "'a' has values that are NaN or infinite"),
        ({"x": torch.ones(2)}, "'x' is unknown here"),
        ({3: torch.ones(2)}, "3 is unknown here"),
    ],
)
def test_what_does_not_fit_changes_nothing(wrong: dict[Any, Any], message: str) -> None:
    tensors = own()
    good = {"b": torch.ones(3, dtype=torch.int64), "a": torch.ones(2)}
    with pytest.raises(FedloraError, match=message):
        fill(tensors, {**good, **wrong})
    assert (tensors["a"] == 0).all()
    assert (tensors["b"] == 0).all()


def test_a_missing_name_and_another_format() -> None:
    with pytest.raises(FedloraError, match=r"parameters do not fit .* 'b' is missing\."):
        fill(own(), {"a": torch.ones(2)})
    with pytest.raises(FedloraError, match=r"must be a dict of name -> tensor, .* got list"):
        fill(own(), [1])


@pytest.mark.parametrize(
    ("mine", "given", "faults"),
    [
        (ONE, ONE.double().numpy(), []),
        (ONE, [3, 4.5], []),  # as from JSON
        (ONE, torch.ones(1), ["'the whole' has shape (1,), expected (2,)"]),
        (ONE, None, ["'the whole' is a NoneType, expected a tensor or an array"]),
        (ONE, ["x"], ["'the whole' is a list, expected a tensor or an array"]),
        ([ONE, TWO], [ONE], ["there are 1 values, expected 2"]),
        ([ONE, 7], [ONE, "whatever"], []),
        ([ONE], {"a": ONE}, ["'the whole' is a dict, expected a list"]),
        ({"a": ONE, "n": 7}, {"a": ONE}, []),
        ({"a": ONE, "b": TWO}, {"a": ONE, "c": TWO}, ["'b' is missing", "'c' is unknown here"]),
        ({"a": {"b": ONE}}, {"a": {"b": TWO}}, ["'a.b' has shape (3, 2), expected (2,)"]),
    ],
)
def test_differences(mine: Any, given: Any, faults: list[str]) -> None:
    assert list(differences(mine, given)) == faults


STATE = {"a": ONE}


@pytest.mark.parametrize(
    ("mine", "given", "found"),
    [
        (STATE, {"a": TWO}, STATE),
        (([ONE, TWO], 12), [ONE], [ONE, TWO]),
        (([ONE, TWO], 12), ([ONE], 3), ([ONE, TWO], 12)),
        ({"state": STATE, "n": 3, "p": ONE}, {"a": TWO}, STATE),
        ({"state": STATE, "n": 3}, {"state": {}}, {"state": STATE, "n": 3}),
        ({"one": STATE, "two": {"b": ONE}}, {"c": ONE}, None),
        (STATE, "seven", None),
        (b"bytes", STATE, None),
    ],
)
def test_what_is_given_is_compared_with_its_like(mine: Any, given: Any, found: Any) -> None:
    part = part_like(mine, given)
    assert (part is None) is (found is None)
    assert repr(part) == repr(found)
