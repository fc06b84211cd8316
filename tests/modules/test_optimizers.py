from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fedlora.errors import FedloraError
from fedlora.modules.optimizers import Optimizers, undone_on_error


def parameters(number: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2)) for _ in range(number)]


def held(*optimizers: torch.optim.Optimizer) -> list[list[nn.Parameter]]:
    return [group["params"] for o in optimizers for group in o.param_groups]


def same(one: list[Any], two: list[Any]) -> bool:
    return [list(map(id, group)) for group in one] == [list(map(id, group)) for group in two]


def test_there_and_back() -> None:
    base, factors, head = parameters(2), parameters(2), parameters(1)
    sgd = torch.optim.SGD([*base, *head], lr=0.1, momentum=0.9)
    for parameter in (*base, *head):
        parameter.grad = torch.ones(2)
    sgd.step()
    momenta = {id(p): sgd.state[p]["momentum_buffer"] for p in base}
    both = Optimizers(base, factors, base)
    both.train_adapter([sgd])
    assert same(held(sgd), [[*head, *factors]])
    assert set(sgd.state) == set(head)
    sgd.state_dict()
    both.train_base([sgd])
    assert same(held(sgd), [[*base, *head]])
    assert all(sgd.state[p]["momentum_buffer"] is momenta[id(p)] for p in base)


def test_a_factor_joins_the_group_of_its_weight() -> None:
    base, factors = parameters(2), parameters(2)
    sgd = torch.optim.SGD([{"params": [p]} for p in base], lr=0.1)
    Optimizers(base, factors, weights=reversed(base)).train_adapter([sgd])
    assert same(held(sgd), [[factors[1]], [factors[0]]])


def test_nothing_is_put_in_twice() -> None:
    base, factors = parameters(2), parameters(2)
    both = Optimizers(base, factors, base)
    both.train_adapter([])
    late = torch.optim.SGD([*base, *factors], lr=0.1)
    both.train_base([late])
    assert same(held(late), [base])


def test_names_of_parameters_go_along() -> None:
    base, factors = parameters(2), parameters(2)
    adam = torch.optim.AdamW([("x", base[0]), ("y", base[1])])
    both = Optimizers(base, factors, base)
    both.train_adapter([adam])
    assert len(adam.param_groups[0]["param_names"]) == 2
    both.train_base([adam])
    assert adam.param_groups[0]["param_names"] == ["x", "y"]


def test_two_that_hold_none_of_the_base() -> None:
    made = [torch.optim.SGD(parameters(1), lr=0.1) for _ in range(2)]
    before = [list(group) for group in held(*made)]
    with pytest.raises(FedloraError, match="there are 2 optimizers"):
        Optimizers(
            parameters(1), parameters(1), parameters(1), [p for group in before for p in group]
        ).train_adapter(made)
    assert same(held(*made), before)


def test_an_optimizer_of_something_else_is_left_alone() -> None:
    other, head = (torch.optim.SGD(parameters(1), lr=0.1) for _ in range(2))
    base, factors, beside = parameters(1), parameters(1), held(head)[0]
    before = [list(beside), *held(other)]
    Optimizers(base, factors, base, before[0]).train_adapter([other, head])
    assert same(held(head), [[*before[0], *factors]])
    assert same(held(other), before[1:])


def test_an_error_undoes_attributes_and_optimizers() -> None:
    class Thing:
        pass

    thing: Any = Thing()
    weights = parameters(2)
    thing.adam = adam = torch.optim.AdamW(weights)
    weights[0].grad = torch.ones(2)
    adam.step()
    moment, saved = adam.state[weights[0]]["exp_avg"].clone(), adam.state_dict()
    with pytest.raises(KeyError), undone_on_error(thing, [adam]):  # noqa: PT012
        adam.state[weights[0]]["exp_avg"].zero_()
        adam.load_state_dict(saved)
        adam.param_groups[0]["params"].clear()
        adam.param_groups[0]["lr"] = 5
        thing.adam = thing.new = None
        raise KeyError
    assert vars(thing) == {"adam": adam}
    assert same(held(adam), [weights])
    assert adam.param_groups[0]["lr"] == 1e-3
    assert torch.equal(adam.state[weights[0]]["exp_avg"], moment)
