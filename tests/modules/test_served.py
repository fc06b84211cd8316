from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedlora.modules.served import ServedWeights
from fedlora.state import Residual


class Layer(nn.Module):
    """What is asked of PEFT's layers here."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def get_base_layer(self) -> Any:
        return self.base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)


def make(*bases: nn.Module) -> ServedWeights:
    return ServedWeights({str(index): Layer(base) for index, base in enumerate(bases)})


def dyadic(*shape: int, seed: int = 0) -> Tensor:
    """Multiples of 1/64 below 1: their sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-63, 64, shape, generator=generator) / 64


def conv(*, memory_format: torch.memory_format = torch.contiguous_format) -> nn.Conv2d:
    layer = nn.Conv2d(3, 4, (3, 2)).to(memory_format=memory_format)
    layer.weight.data.copy_(dyadic(4, 3, 3, 2, seed=9))
    return layer


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_kernel_is_served_as_a_matrix(memory_format: torch.memory_format) -> None:
    layer = conv(memory_format=memory_format)
    W0, R = layer.weight.detach().clone(), dyadic(4, 18)
    served = make(layer)
    served.serve({"0": Residual(R)})
    by_hand = W0 + R.view(4, 3, 3, 2)
    assert torch.equal(layer.weight, by_hand)
    assert layer.weight.is_contiguous(memory_format=memory_format)
    assert torch.equal(served.weight("0"), by_hand.flatten(1))
    assert torch.equal(served.pristine("0"), W0.flatten(1))
    x = dyadic(1, 3, 5, 5)
    expected = nn.functional.conv2d(x, by_hand, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    served.serve({})
    assert torch.equal(layer.weight, W0)


@pytest.mark.parametrize(
    ("dtype", "computed"),
    # W0 + R is computed in float32 at least, and rounded once.
    [(torch.float64, torch.float64), (torch.float32, torch.float32)],
    ids=str,
)
def test_the_sum_is_rounded_once(dtype: torch.dtype, computed: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5).to(dtype)
    W0, U, V = layer.weight.detach().clone(), torch.randn(5, 2), torch.randn(2, 6)
    served = make(layer)
    served.serve({"0": Residual(U, V)})
    expected = W0.to(computed) + U.to(computed) @ V.to(computed)
    assert torch.equal(layer.weight, expected.to(dtype))
    served.serve({})
    assert torch.equal(layer.weight, W0)


def test_what_is_served_replaces_what_was() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    W1, W2 = (layer.weight.detach().clone() for layer in (one, two))
    served = make(one, two)
    served.serve({"0": Residual(torch.ones(2, 2)), "1": Residual(torch.ones(2, 2))})
    served.serve({"1": Residual(2 * torch.ones(2, 2))})
    assert torch.equal(one.weight, W1)
    assert torch.equal(two.weight, W2 + 2)
    assert list(served.residual) == ["1"]
    again = served.residual["1"]
    two.weight.data.zero_()
    served.serve({"1": again})  # the very same: nothing to do
    assert (two.weight == 0).all()


def test_forgetting_brings_the_weights_back_and_lets_them_change() -> None:
    layer = nn.Linear(2, 2)
    W0 = layer.weight.detach().clone()
    served = make(layer)
    residual = {"0": Residual(torch.ones(2, 2))}
    served.serve(residual)
    assert served.forget() == residual
    assert torch.equal(layer.weight, W0)
    assert served.residual == {}
    layer.weight.data.copy_(2 * W0)  # somebody trains it
    served.serve(residual)
    assert torch.equal(layer.weight, 2 * W0 + 1)
    served.serve({})
    assert torch.equal(layer.weight, 2 * W0)
    assert make(layer).forget() == {}


def test_the_pristine_weight_is_a_copy_only_where_it_is_needed() -> None:
    layer = nn.Linear(2, 2)
    served = make(layer)
    assert served.pristine("0").data_ptr() == layer.weight.data_ptr()
    served.serve({"0": Residual(torch.zeros(2, 2))})
    assert served.pristine("0").data_ptr() != layer.weight.data_ptr()


@pytest.mark.parametrize(
    ("residual", "fault"),
    [
        ({"0": Residual(torch.ones(4, 18))}, None),
        ({"0": Residual(torch.ones(4, 2), torch.ones(2, 18))}, None),
        ({"1": Residual(torch.ones(4, 18))}, "the residual of '1' has no adapted layer here"),
        ({"0": Residual(torch.ones(18, 4))}, "the residual of '0' has shape (18, 4)"),
        ({"0": Residual(torch.ones(4, 3, 3, 2))}, "the residual of '0' has shape (4, 3, 3, 2)"),
        ({"0": Residual(torch.ones(4))}, "the residual of '0' has shape (4,)"),
        (
            {"0": Residual(torch.ones(4, 2), torch.ones(3, 18))},
            "the residual of '0' has shape (4, 2) x (3, 18)",
        ),
        (
            {"0": Residual(torch.ones(4, 2), torch.ones(18))},
            "the residual of '0' has shape (4, 2) x (18,)",
        ),
        (
            {"0": Residual(torch.ones(5, 2), torch.ones(2, 18))},
            "the residual of '0' has shape (5, 2) x (2, 18)",
        ),
    ],
)
def test_residuals_that_do_not_fit(residual: dict[str, Residual], fault: str | None) -> None:
    assert list(make(conv()).faults(residual)) == ([] if fault is None else [fault])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_weight_stays_as_it_is(dtype: torch.dtype) -> None:
    layer = nn.Linear(6, 5).to(dtype)
    W0, R = layer.weight.detach().clone(), torch.full((5, 6), 1e-6)  # far below a step of W0
    served = make(layer)
    served.serve({"0": Residual(R)})
    assert torch.equal(layer.weight, W0)
    assert torch.equal(served.weight("0"), W0.float() + R)
    assert not torch.equal(served.weight("0"), W0.float())
    assert torch.equal(served.pristine("0"), W0)
    assert served._pristine == {}  # no copy of what nobody changes
    served.serve({})
    assert not served.layers["0"]._forward_hooks
    assert torch.equal(served.weight("0"), W0)


def test_a_weight_may_get_another_type_in_between() -> None:
    """Inside a float32 weight, beside a 16-bit one, whatever came before."""
    layer = nn.Linear(6, 5, bias=False)
    W0 = layer.weight.data.bfloat16().float().clone()
    layer.weight.data.copy_(W0)
    served, residual, x = make(layer), {"0": Residual(torch.randn(5, 6))}, torch.randn(3, 6)
    hooks = served.layers["0"]._forward_hooks
    want = x @ (W0 + residual["0"].U).T
    served.serve(residual)
    layer.bfloat16()  # of the sum: rounded
    served.serve(residual)
    assert torch.equal(layer.weight, W0.bfloat16())
    assert len(hooks) == 1
    layer.float()
    torch.testing.assert_close(served.layers["0"](x), want)  # beside, until served anew
    torch.testing.assert_close(served.weight("0"), W0 + residual["0"].U)
    served.serve(residual)
    assert not hooks
    torch.testing.assert_close(layer(x), want)
    served.serve({})
    assert torch.equal(layer.weight, W0)


@pytest.mark.parametrize("end", ["serve", "forget", "settle"])
def test_nothing_is_left_beside_a_weight(end: str) -> None:
    layer = nn.Linear(6, 5).bfloat16()
    W0, served, x = layer.weight.detach().clone(), make(layer), torch.randn(3, 6).bfloat16()
    before, residual = served.layers["0"](x), {"0": Residual(torch.ones(5, 2), torch.ones(2, 6))}
    served.serve(residual)
    assert not torch.equal(served.layers["0"](x), before)
    if end == "serve":
        served.serve({})
    elif end == "settle":
        served.settle()
    else:
        assert served.forget() == residual
    assert not served.layers["0"]._forward_hooks
    assert served.residual == {}
    assert torch.equal(layer.weight, W0)
    assert torch.equal(served.layers["0"](x), before)
