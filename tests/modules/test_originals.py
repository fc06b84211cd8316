from __future__ import annotations

import torch
from torch import nn

from fedlora.modules.originals import Originals


def make() -> tuple[nn.Sequential, Originals]:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[0].bias.requires_grad_(False)
    head = {f"2.{n}": p for n, p in model[2].named_parameters()}
    return model, Originals.of(model[0].parameters(), model.named_modules(), head)


def test_flags_come_back() -> None:
    model, originals = make()
    before = [p.requires_grad for p in model.parameters()]
    originals.freeze()
    assert not any(p.requires_grad for p in model[0].parameters())
    model[2].requires_grad_(False)  # a rule that trains B only
    originals.thaw()
    assert [p.requires_grad for p in model.parameters()] == before


def test_swapping_twice_is_nothing() -> None:
    model, originals = make()
    first = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        model[2].weight.add_(1)
    model(torch.randn(4, 2))
    learned = {n: t.clone() for n, t in model.state_dict().items()}
    assert not torch.equal(learned["1.running_mean"], first["1.running_mean"])
    originals.swap()
    assert all(torch.equal(t, first[n]) for n, t in model.state_dict().items())
    originals.swap()
    assert all(torch.equal(t, learned[n]) for n, t in model.state_dict().items())


def test_statistics_are_saved_floating_point_buffers() -> None:
    model, originals = make()
    model[1].register_buffer("late", torch.ones(1))
    model[1].running_mean = torch.full((3,), 5.0)  # replaced, as a move to a device does
    found = originals.statistics()
    assert found.keys() == {"1.running_mean", "1.running_var"}
    assert found["1.running_mean"] is model[1].running_mean
