from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fedlora.modules.view import only


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 2)))


def test_every_listing_says_the_chosen_only() -> None:
    model = net()
    chosen = [model[1].running_mean, model[2][0].weight]
    with only([model], chosen):
        assert list(model.state_dict()) == ["1.running_mean", "2.0.weight"]
        assert [n for n, _ in model.named_parameters()] == ["2.0.weight"]
        assert [p is chosen[1] for p in model.parameters()] == [True]
        assert [n for n, _ in model.named_buffers()] == ["1.running_mean"]
        assert list(model[2].state_dict()) == ["0.weight"]
        assert list(model[0].parameters()) == []
        assert model(torch.ones(4, 2)).shape == (4, 2)  # and it is whole all the same
        assert model[0].weight.shape == (3, 2)
    assert len(model.state_dict()) == 9
    assert len(list(model.parameters())) == 6


def test_nothing_stays_behind_also_after_an_error() -> None:
    model = net()
    before = [dict(vars(module)) for module in model.modules()]
    hooks = [len(m._state_dict_hooks) + len(m._load_state_dict_pre_hooks) for m in model.modules()]
    with pytest.raises(KeyError), only([model], [model[0].weight]):
        raise KeyError
    assert [vars(module).keys() for module in model.modules()] == [b.keys() for b in before]
    assert hooks == [
        len(m._state_dict_hooks) + len(m._load_state_dict_pre_hooks) for m in model.modules()
    ]


@pytest.mark.parametrize("assign", [False, True])
def test_loading_takes_the_chosen_and_leaves_the_rest(assign: bool) -> None:
    model = net()
    weight, mean = model[2][0].weight, model[1].running_mean
    before = {n: t.clone() for n, t in model.state_dict().items()}
    given = {"1.running_mean": torch.full((3,), 2.0), "2.0.weight": torch.full((2, 3), 3.0)}
    with only([model], [weight, mean]):
        model.load_state_dict(given, assign=assign)
    assert model[2][0].weight is weight
    assert model[1].running_mean is mean
    after = model.state_dict()
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    assert changed == {"1.running_mean", "2.0.weight"}
    mean.add_(1)
    assert torch.equal(given["1.running_mean"], torch.full((3,), 2.0))  # the giver's own


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, r"Missing key\(s\) in state_dict: \"2.0.weight\""),
        ({"2.0.weight": torch.ones(2, 3), "0.weight": torch.ones(3, 2)}, "Unexpected key"),
        ({"2.0.weight": torch.ones(2, 3), "x": torch.ones(1)}, "Unexpected key"),
    ],
)
def test_strict_is_strict(wrong: dict[str, torch.Tensor], message: str) -> None:
    model = net()
    with only([model], [model[2][0].weight]), pytest.raises(RuntimeError, match=message):
        model.load_state_dict(wrong)


def test_replaced_and_removed_parameters_come_back_in_order() -> None:
    layer = nn.Linear(2, 3)
    weight, bias = layer.weight, layer.bias
    with only([layer], [weight, bias]):
        del layer.weight
        layer.register_parameter("weight", nn.Parameter(torch.ones(3, 2)))
        layer.bias = nn.Parameter(torch.zeros(3))
    assert list(layer._parameters) == ["weight", "bias"]
    assert layer.weight is weight
    assert layer.bias is bias
    assert (weight == 1).all()
    assert (bias == 0).all()
    with pytest.raises(KeyError), only([layer], [weight]):  # noqa: PT012
        del layer.weight
        raise KeyError
    assert layer.weight is weight


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_in_the_view_is_whole(how: object) -> None:
    model = net()
    with only([model], [model[0].weight]):
        made = how(model)  # type: ignore[operator]
        assert len(made.state_dict()) == 9
    assert len(list(made.parameters())) == 6
    mine = {id(p) for m in made.modules() for p in m._parameters.values()}
    assert {id(p) for p in made.parameters()} == mine
    made.load_state_dict({n: t + 1 for n, t in made.state_dict().items()})
    assert not torch.equal(made[0].bias, model[0].bias)
    again = copy.deepcopy(made)
    assert {id(p) for p in again.parameters()}.isdisjoint(mine)


def test_views_nest() -> None:
    model = net()
    with only([model], [model[0].weight, model[0].bias]):
        with only([model], [model[0].bias]):
            assert list(model.state_dict()) == ["0.bias"]
        assert [n for n, _ in model.named_parameters()] == ["0.weight", "0.bias"]
    assert "named_parameters" not in vars(model)
