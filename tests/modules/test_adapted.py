"""PEFT's layer as ours against PEFT's own, which stays the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedlora import LoRAConfig
from fedlora.modules import adapted as module
from fedlora.modules.adapted import AdaptedLinear, use_own_layers
from fedlora.modules.beside import Beside
from fedlora.modules.dropout import Draws
from fedlora.modules.injection import Target, make_slots
from fedlora.modules.layers import Bound, LaneLinear, LaneNorm
from fedlora.state import AdapterState, Residual
from tests.small_nets import inputs, make_net, wrap

IN, OUT, RANK, ALPHA = 16, 24, 4, 6.0
ROWS = [1, 3, 2]  # of three lanes, in a batch of six
DROPOUTS = [0.0, 0.4]


def layer(dropout: float = 0.0, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    """PEFT's own, with random weights and the dropout of ours."""
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT, bias=bias).requires_grad_(False)
    target = Target("a", base, (), RANK, ALPHA)
    (slot,) = make_slots([target], LoRAConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout))
    nn.init.normal_(slot.layer.lora_B["default"].weight, std=0.5)
    if dropout:
        slot.layer.lora_dropout["default"].draws = Draws([7])
    made = slot.layer.to(dtype).train()
    assert type(made) is PeftLinear
    return made


def ours(theirs: Any) -> Any:
    twin = copy.deepcopy(theirs)
    use_own_layers(nn.ModuleList([twin]))
    assert type(twin) is AdaptedLinear
    assert type(twin.base_layer) is LaneLinear
    return twin


def direction(y: Tensor) -> Tensor:
    """What the output is multiplied with: the same each time, and the same for each picture."""
    inner = torch.arange(float(y[0].numel())).sin().view_as(y[0])
    return inner.expand_as(y).float()


def run(
    function: Callable[[Tensor], Tensor], layer: Any, x: Tensor, autocast: bool = False
) -> dict[str, Tensor]:
    """The output, and the gradients of the input and of all that is trained."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = function(x)
    (y.float() * direction(y)).sum().backward()
    found = {"y": y.detach(), "x": x.grad}
    return found | {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], close: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, rtol=close, atol=close)


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each quick product."""
    calls: list[int] = []

    class Counted:
        @staticmethod
        def apply(*args: Any) -> Tensor:
            calls.append(1)
            return original.apply(*args)

    original: Any = module.AdaptedProduct
    monkeypatch.setattr(module, "AdaptedProduct", Counted)
    return calls


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("bias", ["frozen", "trained", "none"])
@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("shape", [(6, IN), (6, 5, IN)], ids=str)
def test_it_is_pefts_layer(
    shape: tuple[int, ...], dropout: float, bias: str, training: bool, quick: list[int]
) -> None:
    theirs = layer(dropout, bias=bias != "none").train(training)
    if bias == "trained":
        theirs.base_layer.bias.requires_grad_()
    mine, x = ours(theirs), torch.randn(shape)
    expected = run(theirs, theirs, x)
    compare(run(mine, mine, x), expected)
    assert quick == [1]
    assert ("base_layer.bias" in expected) == (bias == "trained")
    with torch.no_grad():
        torch.testing.assert_close(mine(x), expected["y"], rtol=1e-5, atol=1e-5)


def test_another_scaling_or_rank_of_zeros_counts(quick: list[int]) -> None:
    theirs = layer()
    theirs.scaling["default"] = 0.3
    with torch.no_grad():
        theirs.lora_A["default"].weight[2:] = 0
        theirs.lora_B["default"].weight[:, 2:] = 0
    mine, x = ours(theirs), torch.randn(6, IN)
    found = run(mine, mine, x)
    compare(found, run(theirs, theirs, x))
    assert quick
    assert not found["lora_A.default.weight"][2:].any()  # to the bit: it stays that small a rank
    assert not found["lora_B.default.weight"][:, 2:].any()


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_a_factor_that_is_not_trained_gets_no_gradient(frozen: str, quick: list[int]) -> None:
    theirs = layer(0.4)
    getattr(theirs, f"lora_{frozen}")["default"].weight.requires_grad_(False)
    mine, x = ours(theirs), torch.randn(6, 5, IN)
    found = run(mine, mine, x)
    assert f"lora_{frozen}.default.weight" not in found
    compare(found, run(theirs, theirs, x))
    assert quick


@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_it_is_pefts_layer_to_the_bit(
    kept: torch.dtype, dropout: float, quick: list[int]
) -> None:
    theirs = layer(dropout)
    theirs.base_layer.to(kept)
    mine, x = ours(theirs), torch.randn(6, 5, IN)
    assert equal(run(mine, mine, x, autocast=True), run(theirs, theirs, x, autocast=True))
    assert not quick


def test_a_weight_of_16_bits_in_a_float32_model(quick: list[int]) -> None:
    theirs = layer(0.4)
    mine = ours(theirs)
    mine.base_layer.bfloat16()
    theirs.base_layer.bfloat16().float()  # rounded
    x = torch.randn(6, 5, IN)
    compare(run(mine, mine, x), run(theirs, theirs, x))
    assert not quick


@pytest.mark.parametrize("dropout", DROPOUTS)
def test_a_model_wholly_in_16_bits(dropout: float, quick: list[int]) -> None:
    theirs = layer(dropout, dtype=torch.bfloat16)
    mine, x = ours(theirs), torch.randn(6, 5, IN).bfloat16()
    found, expected = run(mine, mine, x), run(theirs, theirs, x)
    compare(found, expected, close=0.1)
    exact = run(theirs.double(), theirs, x.double())

    def error(one: dict[str, Tensor]) -> Tensor:
        return torch.stack([(one[n].double() - t).norm() / t.norm() for n, t in exact.items()])

    assert (error(found) < 1.5 * error(expected) + 1e-3).all()
    assert quick


# What PEFT does besides is left to it.


def test_switched_off_it_is_the_base(quick: list[int]) -> None:
    theirs = layer()
    mine, x = ours(theirs), torch.randn(6, IN)
    for each in (theirs, mine):
        each.enable_adapters(False)
    torch.testing.assert_close(mine(x), theirs(x))
    torch.testing.assert_close(mine(x), nn.functional.linear(x, *theirs.base_layer.parameters()))
    assert not quick


def test_merged_the_adapter_counts_once(quick: list[int]) -> None:
    theirs = layer()
    mine, x = ours(theirs), torch.randn(6, IN)
    before = mine(x)
    quick.clear()
    for each in (theirs, mine):
        each.merge()
    torch.testing.assert_close(mine(x), theirs(x))
    torch.testing.assert_close(mine(x), before, rtol=1e-4, atol=1e-4)
    assert not quick
    mine.unmerge()
    torch.testing.assert_close(mine(x), before, rtol=1e-4, atol=1e-4)
    assert quick


def test_a_second_adapter_counts_too(quick: list[int]) -> None:
    theirs = layer()
    theirs.update_layer("second", 2, 8, LoraConfig(init_lora_weights=False))
    theirs.set_adapter(["default", "second"])
    mine, x = ours(theirs), torch.randn(6, IN)
    torch.testing.assert_close(mine(x), theirs(x))
    compare(run(mine, mine, x), run(theirs, theirs, x))
    for each in (theirs, mine):
        each.set_adapter(["second"])
    torch.testing.assert_close(mine(x), theirs(x))
    assert not quick


def test_a_trained_weight_below_gets_its_gradient(quick: list[int]) -> None:
    theirs = layer()
    theirs.base_layer.requires_grad_(True)
    mine, x = ours(theirs), torch.randn(6, IN)
    found = run(mine, mine, x)
    assert {"base_layer.weight", "base_layer.bias"} <= found.keys()
    compare(found, run(theirs, theirs, x))
    assert not quick


# Around it.


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("dropout", DROPOUTS)
def test_checkpointing_gives_the_same_gradients_to_the_bit(dropout: float, autocast: bool) -> None:
    mine, x = ours(layer(dropout)), torch.randn(6, 5, IN)

    def again(x: Tensor) -> Tensor:
        return checkpoint(mine, x, use_reentrant=False)

    assert equal(run(again, mine, x, autocast), run(mine, mine, x, autocast))


@pytest.mark.parametrize("thin", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_residual_beside_it_is_added(dtype: torch.dtype, thin: bool) -> None:
    mine, x = ours(layer(0.4, dtype=dtype)), torch.randn(6, 5, IN).to(dtype)
    U, V = torch.randn(OUT, 2), torch.randn(2, IN)
    before = mine(x)
    hook = Beside(Residual(U, V) if thin else Residual(U @ V), mine.base_layer.weight)
    mine.register_forward_hook(hook)
    change = x.float() @ V.T @ U.T
    close = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(mine(x), (before.float() + change).to(dtype), rtol=close, atol=close)


def test_a_served_residual_is_that_of_pefts_layers() -> None:
    answers = []
    for own in (False, True):
        lora = wrap(make_net("mlp", torch.bfloat16).eval())
        if own:
            use_own_layers(lora.model)
            assert {type(each) for each in lora.layers.values()} == {AdaptedLinear}
        generator = torch.Generator().manual_seed(1)
        R = {
            name: Residual(torch.randn(weight.shape, generator=generator))
            for name, weight in lora.base_weights().items()
        }
        without = lora.model(inputs("mlp", dtype=torch.bfloat16))
        lora.load(AdapterState(residual=R))
        answers.append(lora.model(inputs("mlp", dtype=torch.bfloat16)))
        assert (answers[-1] - without).abs().max() > 1
    torch.testing.assert_close(*answers, rtol=3e-2, atol=3e-2)


# Lanes.


NAMES = {"A": "lora_A.default.weight", "B": "lora_B.default.weight", "bias": "base_layer.bias"}
SCALES = [1.5, 0.25, 3.0]


def in_lanes(
    mine: Any, own: dict[str, Tensor], rows: list[int], x: Tensor, autocast: bool
) -> list[dict[str, Tensor]]:
    """What one call for all lanes gives to each of them."""
    mine.lanes = Bound({name: own[name] for name in "AB"}, rows, SCALES)
    if "bias" in own:
        mine.base_layer.lanes = Bound({"bias": own["bias"]}, rows)
    for dropout in mine.lora_dropout.values():
        dropout.draws = Draws([3, 4, 5], rows)
    found = run(mine, mine, x, autocast)
    assert found.keys() == {"y", "x"}
    parts = zip(found["y"].split(rows), found["x"].split(rows), strict=True)
    return [
        {"y": y, "x": x} | {NAMES[name]: values.grad[lane] for name, values in own.items()}
        for lane, (y, x) in enumerate(parts)
    ]


def alone(
    theirs: Any, own: dict[str, Tensor], lane: int, x: Tensor, autocast: bool
) -> dict[str, Tensor]:
    with torch.no_grad():
        for name, values in own.items():
            theirs.get_parameter(NAMES[name]).copy_(values[lane])
    theirs.scaling["default"] = SCALES[lane]
    for dropout in theirs.lora_dropout.values():
        dropout.draws = Draws([3 + lane])
    return run(theirs, theirs, x, autocast)


def compare_lanes(dropout: float, bias: bool, rows: list[int], autocast: bool = False) -> None:
    theirs = layer(dropout)
    theirs.base_layer.bias.requires_grad_(bias)
    mine, x = ours(theirs), torch.randn(sum(rows), 5, IN)
    own = {"A": torch.randn(3, RANK, IN), "B": torch.randn(3, OUT, RANK)}
    own |= {"bias": torch.randn(3, OUT)} if bias else {}
    own = {name: values.requires_grad_() for name, values in own.items()}
    found = in_lanes(mine, own, rows, x, autocast)
    for lane, part in enumerate(x.split(rows)):
        expected = alone(theirs, own, lane, part, autocast)
        assert found[lane].keys() == expected.keys()
        for name, tensor in expected.items():
            # Sums of many roundings to 16 bits: relative to the largest.
            close = 0.05 * float(tensor.abs().max()) if autocast else 1e-4
            torch.testing.assert_close(found[lane][name], tensor, rtol=0, atol=close)


@pytest.mark.parametrize("rows", [ROWS, [2, 2, 2]], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["trained-bias", "frozen-bias"])
@pytest.mark.parametrize("dropout", DROPOUTS)
def test_each_lane_is_pefts_layer_alone(
    dropout: float, bias: bool, rows: list[int], quick: list[int]
) -> None:
    compare_lanes(dropout, bias, rows)
    assert quick == [1]


@pytest.mark.parametrize("rows", [ROWS, [2, 2, 2]], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["trained-bias", "frozen-bias"])
@pytest.mark.parametrize("dropout", DROPOUTS)
def test_each_lane_is_pefts_layer_alone_under_autocast(
    dropout: float, bias: bool, rows: list[int], quick: list[int]
) -> None:
    compare_lanes(dropout, bias, rows, autocast=True)
    assert not quick


def test_biases_of_lanes_that_are_not_trained(quick: list[int]) -> None:
    mine, x = ours(layer()), torch.randn(6, 5, IN)
    A, B = mine.lora_A["default"].weight, mine.lora_B["default"].weight
    own = {"A": A.detach().repeat(3, 1, 1), "B": B.detach().repeat(3, 1, 1)}
    biases = torch.randn(3, OUT)
    expected = mine(x) - mine.base_layer.bias
    mine.lanes = Bound(own, ROWS, [mine.scaling["default"]] * 3)
    mine.base_layer.lanes = Bound({"bias": biases}, ROWS)
    expected = expected + biases.repeat_interleave(torch.tensor(ROWS), 0)[:, None]
    torch.testing.assert_close(mine(x), expected, rtol=1e-5, atol=1e-5)
    assert len(quick) == 2


# Whose class changes.


def test_only_layers_of_torch_and_peft_change_their_class() -> None:
    class Own(nn.Linear):
        pass

    net = nn.ModuleDict(
        {
            "plain": nn.Linear(2, 2),
            "norm": nn.LayerNorm(2),
            "own": Own(2, 2),
            "attention": nn.MultiheadAttention(2, 1),
            "adapted": layer(0.4),
        }
    )
    attention, parameters = net["attention"].out_proj, dict(net.named_parameters())
    kinds = {name: type(each) for name, each in net.named_modules()}
    use_own_layers(net)
    use_own_layers(net)  # a second time changes nothing
    changed = {n: type(each) for n, each in net.named_modules() if type(each) is not kinds[n]}
    assert changed == {
        "plain": LaneLinear,
        "norm": LaneNorm,
        "adapted": AdaptedLinear,
        "adapted.base_layer": LaneLinear,
    }
    assert net["attention"].out_proj is attention
    after = dict(net.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(after[name] is parameter for name, parameter in parameters.items())
