"""Layers of ours against torch's own, and with several lanes against each lane alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedlora.modules.layers import Bound, LaneLinear, LaneNorm

IN, OUT = 16, 24
SHAPES = [(6, IN), (6, 5, IN), (6, 2, 3, IN)]
ROWS = [1, 3, 2]  # of three lanes, in a batch of six


def pair(kind: type[nn.Module] = nn.Linear, bias: bool = True) -> tuple[Any, Any]:
    """A frozen layer of torch's with random weights, and one of ours with the same."""
    torch.manual_seed(0)
    theirs: Any = nn.Linear(IN, OUT, bias=bias) if kind is nn.Linear else nn.LayerNorm(IN)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    theirs.requires_grad_(False)
    ours = copy.deepcopy(theirs)
    ours.__class__ = LaneLinear if kind is nn.Linear else LaneNorm
    return theirs, ours


def direction(y: Tensor) -> Tensor:
    """What the output is multiplied with: the same each time, and the same for each picture."""
    inner = torch.arange(float(y[0].numel())).sin().view_as(y[0])
    return inner.expand_as(y).float()


def run(layer: Any, x: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    """The output, and the gradients of the input and of what is trained."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    (y.float() * direction(y)).sum().backward()
    found = {"y": y.detach(), "x": x.grad}
    return found | {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], close: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=close, atol=close)


@pytest.mark.parametrize("trained", [(), ("weight",), ("bias",), ("weight", "bias")], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm])
def test_without_lanes_it_is_torchs_layer(
    kind: type[nn.Module], shape: tuple[int, ...], trained: tuple[str, ...]
) -> None:
    layers = pair(kind)
    for layer in layers:
        for name in trained:
            layer.get_parameter(name).requires_grad_()
    x = torch.randn(shape)
    theirs, ours = (run(layer, x) for layer in layers)
    compare(ours, theirs)
    assert ours.keys() == {"y", "x", *trained}


def test_a_frozen_layer_without_a_bias() -> None:
    theirs, ours = pair(bias=False)
    x = torch.randn(6, IN)
    compare(run(ours, x), run(theirs, x))


@pytest.mark.parametrize("trained", [(), ("weight",), ("bias",)], ids=str)
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm])
def test_under_autocast_it_is_torchs_layer_to_the_bit(
    kind: type[nn.Module], kept: torch.dtype, trained: tuple[str, ...]
) -> None:
    theirs, ours = pair(kind)
    if kind is nn.Linear:
        theirs, ours = theirs.to(kept), ours.to(kept)
    for layer in (theirs, ours):
        for name in trained:
            layer.get_parameter(name).requires_grad_()
    x = torch.randn(6, 5, IN)
    expected, found = run(theirs, x, autocast=True), run(ours, x, autocast=True)
    assert found.keys() == expected.keys() == {"y", "x", *trained}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert found["y"].dtype == (torch.bfloat16 if kind is nn.Linear else torch.float32)


def test_under_autocast_a_kept_weight_is_not_cast_first(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = pair()
    ours.bfloat16()
    linear, seen = nn.functional.linear, []
    monkeypatch.setattr(
        nn.functional, "linear", lambda *args: seen.append(args[1]) or linear(*args)
    )
    with torch.autocast("cpu", torch.bfloat16):
        ours(torch.randn(6, IN))
    assert len(seen) == 1
    assert seen[0] is ours.weight


@pytest.mark.parametrize("bias", [True, False])
def test_weights_of_16_bits_are_computed_with_in_the_type_of_the_input(bias: bool) -> None:
    theirs, ours = pair(bias=bias)
    ours.bfloat16()
    theirs.bfloat16().float()  # rounded
    x = torch.randn(6, 5, IN)
    found = run(ours, x)
    compare(found, run(theirs, x))
    assert found["y"].dtype == torch.float32
    assert ours.weight.dtype == torch.bfloat16


def test_a_trained_bias_beside_a_weight_of_16_bits() -> None:
    theirs, ours = pair()
    ours.weight.data = ours.weight.data.bfloat16()
    theirs.weight.data = theirs.weight.data.bfloat16().float()
    for layer in (theirs, ours):
        layer.bias.requires_grad_()
    x = torch.randn(6, 5, IN)
    compare(run(ours, x), run(theirs, x))


def test_a_model_wholly_in_16_bits() -> None:
    theirs, ours = (layer.bfloat16() for layer in pair())
    x = torch.randn(6, 5, IN).bfloat16()
    compare(run(ours, x), run(theirs, x), close=2e-2)
    assert run(ours, x)["y"].dtype == torch.bfloat16


# Lanes.


def test_a_batch_of_prompts_or_of_tokens_has_more_rows_than_pictures() -> None:
    bound = Bound(rows=ROWS)
    assert bound.counts(torch.empty(6, IN)) == ROWS
    assert bound.counts(torch.empty(6, 5, IN)) == [5, 15, 10]
    assert bound.counts(torch.empty(12, 5, IN)) == [10, 30, 20]


@pytest.mark.parametrize("each", [1, 4])
@pytest.mark.parametrize("inner", [(), (5,), (2, 3)], ids=str)
def test_the_rows_of_each_lane(inner: tuple[int, ...], each: int) -> None:
    x = torch.arange(6.0 * each).view(-1, *(1 for _ in inner), 1).expand(-1, *inner, IN)
    parts = Bound(rows=ROWS).split(x)
    assert [part.shape for part in parts] == [(rows * each, *inner, IN) for rows in ROWS]
    assert torch.equal(torch.cat(parts), x)


def test_what_lanes_have_of_a_parameter() -> None:
    own, common = torch.randn(3, OUT), torch.randn(OUT)
    bound = Bound({"bias": own}, ROWS)
    assert all(map(torch.equal, bound.of_lanes("bias", common), own))
    assert all(each is common for each in bound.of_lanes("weight", common))
    assert bound.of_lanes("weight", None) == [None, None, None]


def lanes_of(layer: Any, *names: str) -> dict[str, Tensor]:
    """Three other values for each of these parameters."""
    return {
        name: torch.randn(3, *layer.get_parameter(name).shape).requires_grad_() for name in names
    }


def alone(kind: type[nn.Module], own: dict[str, Tensor], lane: int) -> Any:
    layer, _ = pair(kind)
    with torch.no_grad():
        for name, values in own.items():
            layer.get_parameter(name).copy_(values[lane])
            layer.get_parameter(name).requires_grad_()
    return layer


CHOICES = [("weight", "bias"), ("bias",), ("weight",)]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("names", CHOICES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm])
def test_lanes_with_parameters_of_their_own_are_each_as_alone(
    kind: type[nn.Module], shape: tuple[int, ...], names: tuple[str, ...], autocast: bool
) -> None:
    """What a lane has not of its own is the layer's."""
    _, ours = pair(kind)
    for name in names:  # trained outside of lanes too
        ours.get_parameter(name).requires_grad_()
    own = lanes_of(ours, *names)
    ours.lanes = Bound(own, ROWS)
    x = torch.randn(shape)
    found = run(ours, x, autocast)
    assert found.keys() == {"y", "x"}  # nothing reaches what is bound over
    start = 0
    for lane, rows in enumerate(ROWS):
        expected = run(alone(kind, own, lane), x[start : start + rows], autocast)
        mine = {name: found[name][start : start + rows] for name in ("y", "x")}
        mine |= {name: own[name].grad[lane] for name in names}
        compare(mine, expected, close=3e-2 if autocast else 1e-5)
        start += rows
    ours.lanes = None
    theirs, _ = pair(kind)
    compare({"y": run(ours, x)["y"]}, {"y": run(theirs, x)["y"]})


def test_lanes_over_a_frozen_weight_of_16_bits() -> None:
    _, ours = pair()
    ours.weight.data = ours.weight.data.bfloat16()
    own = lanes_of(ours, "bias")
    ours.lanes = Bound(own, ROWS)
    x = torch.randn(6, 5, IN)
    expected = (
        x @ ours.weight.float().T + own["bias"].repeat_interleave(torch.tensor(ROWS), 0)[:, None]
    )
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)


def test_lanes_that_have_nothing_of_a_layer_share_it() -> None:
    for kind in (nn.Linear, nn.LayerNorm):
        theirs, ours = pair(kind)
        ours.lanes = Bound({}, ROWS)
        x = torch.randn(6, 5, IN)
        compare(run(ours, x), run(theirs, x))
