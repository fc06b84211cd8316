"""R x beside a 16-bit weight: in whole models of 16 bits, and under autocast."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedlora import FedloraError, LoRAConfig, LoRAWrapper
from fedlora.modules.beside import Beside
from fedlora.state import AdapterState, Residual
from tests.small_clip import adapted, pictures, shake
from tests.small_nets import NETS, inputs, make_net, snapshot, wrap

HALVES = [torch.bfloat16, torch.float16]


def residuals(lora: LoRAWrapper, thin: bool) -> dict[str, Residual]:
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shapes = {name: weight.shape for name, weight in lora.base_weights().items()}
    return {
        name: Residual(draw(out, 2), draw(2, width)) if thin else Residual(draw(out, width))
        for name, (out, width) in shapes.items()
    }


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def make(kind: str, dtype: torch.dtype, thin: bool = True) -> tuple[LoRAWrapper, nn.Module, Tensor]:
    """A net that serves residuals beside its weights, the same net in float64 and an input."""
    lora = wrap(make_net(kind, dtype).eval())
    exact = copy.deepcopy(lora.model).double()
    R = residuals(lora, thin)
    lora.load(AdapterState(residual=R))
    for name, change in R.items():
        weight = exact.get_submodule(f"{name}.base_layer").weight.data
        weight.add_(change.to(torch.float64).dense().view_as(weight))
    return lora, exact, inputs(kind, dtype=dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("thin", [True, False])
@pytest.mark.parametrize("kind", NETS)
def test_each_layer_gives_w_x_and_r_x(kind: str, thin: bool, dtype: torch.dtype) -> None:
    lora, exact, x = make(kind, dtype, thin)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in lora.layers.items():
        layer.register_forward_hook(
            lambda _, args, output, name=name: seen.update({name: (args[0], output)})
        )
    lora.model(x)
    for name, (given, output) in seen.items():
        assert output.dtype == dtype
        want = exact.get_submodule(name)(given.double())
        close = torch.finfo(dtype).eps * float(want.abs().max())  # W0 x and R x may cancel out
        assert (output.double() - want).abs().max() < close
        # Without R it would be another answer by far.
        far = make_net(kind, dtype).eval().get_submodule(name)(given).double() - want
        assert far.abs().max() > 10 * close
    assert seen.keys() == lora.layers.keys()


def test_a_residual_of_no_columns_is_none() -> None:
    kernel = nn.Conv2d(3, 4, (3, 2))
    none = Beside(Residual(torch.ones(4, 0), torch.ones(0, 18)), kernel.weight)
    assert none.first.shape == kernel.weight.shape
    assert not none.first.any()


def test_what_is_far_below_a_step_of_the_weight_has_its_effect() -> None:
    net = nn.Sequential(nn.Linear(8, 1, bias=False)).bfloat16()
    net[0].weight.data.copy_(torch.tensor([1.0, -1.0] * 4))
    tiny = 2.0**-12  # bfloat16 steps by 2^-7 from 1 on
    assert torch.equal(net[0].weight + tiny, net[0].weight)
    lora = wrap(net)
    lora.load(AdapterState(residual={"0": Residual(torch.full((1, 8), tiny))}))
    assert net(torch.ones(1, 8).bfloat16()).detach().item() == 8 * tiny


@pytest.mark.parametrize("kind", NETS)
def test_off_and_on_and_away(kind: str) -> None:
    original = make_net(kind, torch.bfloat16).eval()
    lora, _, x = make(kind, torch.bfloat16)
    before, count = lora.model(x), len(lora.layers)
    assert hooks(lora.model) == count
    with lora.lora_disabled():
        assert hooks(lora.model) == 0
        assert torch.equal(lora.model(x), original(x))
    assert torch.equal(lora.model(x), before)
    for twin in (copy.deepcopy(lora.model), pickle.loads(pickle.dumps(lora.model))):
        assert torch.equal(twin(x), before)
    unloaded = lora.unload()
    assert hooks(unloaded) == 0
    assert all(map(torch.equal, snapshot(unloaded).values(), snapshot(original).values()))


@pytest.mark.parametrize("kind", NETS)
def test_merged_weights_contain_it(kind: str) -> None:
    lora, exact, _ = make(kind, torch.bfloat16)
    names = list(lora.layers)
    merged = lora.merge_and_unload()
    assert hooks(merged) == 0
    for name in names:
        want = exact.get_submodule(f"{name}.base_layer").weight
        assert torch.equal(merged.get_submodule(name).weight, want.bfloat16())


@pytest.mark.parametrize("other", [torch.float32, torch.float64], ids=str)
def test_a_model_that_gets_another_type_serves_it_on(other: torch.dtype) -> None:
    lora, exact, x = make("resnet", torch.bfloat16)
    with torch.no_grad():
        lora.model.to(other)
        answer = lora.model(x.to(other))
        torch.testing.assert_close(answer.double(), exact(x.double()), rtol=1e-4, atol=1e-5)
        lora.load(lora.state())  # now inside the weights
        assert hooks(lora.model) == 0
        torch.testing.assert_close(lora.model(x.to(other)), answer, rtol=1e-4, atol=1e-5)


def test_it_goes_where_the_model_goes() -> None:
    lora, _, x = make("mlp", torch.bfloat16)
    lora.model.to("meta")
    lora.model(x.to("meta"))
    for layer in lora.layers.values():
        (hook,) = layer._forward_hooks.values()
        assert hook.first.device.type == hook.second.device.type == "meta"


def test_under_autocast_it_adds_up_over_inputs() -> None:
    """W0 x is rounded to bfloat16; what many of the layer's outputs say of R is not."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8, bias=False))
    W0 = net[0].weight.data.bfloat16().float().clone()
    net[0].weight.data = W0.bfloat16()
    lora = LoRAWrapper(net, LoRAConfig(r=2, lora_dropout=0.0)).apply()
    R = torch.randn(8, 8) * 2e-4
    lora.load(AdapterState(residual={"0": Residual(R)}))
    x = torch.randn(40_000, 8).bfloat16().float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    found = torch.linalg.lstsq(x.double(), y.double()).solution.T
    error, rounded = found - (W0 + R), (W0 + R).bfloat16() - (W0 + R)
    assert error.norm() < 0.2 * R.norm()
    assert error.norm() < 0.2 * rounded.norm()


@pytest.mark.parametrize("autocast", [True, False])
def test_checkpointing_gives_the_same_gradients(autocast: bool, folder: Path) -> None:
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        lora = adapted(folder, lora_dropout=0.3)
        shake(lora)
        if autocast:
            lora.set_base_dtype(torch.bfloat16)
        else:
            lora.federated.bfloat16()
        lora.load(AdapterState(residual=residuals(lora, thin=True)))
        (lora.enable_gradient_checkpointing if checkpointing else lambda: None)()
        lora.set_dropout_key(5)
        lora.federated.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            lora.federated(pictures()).square().mean().backward()
        found.append({n: p.grad for n, p in lora.trainable().items()})
    plain, saved = found
    assert all(torch.equal(plain[name], saved[name]) for name in plain)
    assert all(gradient.any() for gradient in plain.values())


def test_weights_that_travel_are_not_changed_beside_them() -> None:
    lora = wrap(make_net("mlp", torch.bfloat16), save_only_trainable=False)
    residual = {"out": Residual(torch.ones(3, 4))}
    with pytest.raises(FedloraError, match="'out' would be rounded away in the bfloat16 weights"):
        lora.load(AdapterState(residual=residual))
    assert hooks(lora.model) == 0
    lora.model.float()
    lora.load(AdapterState(residual=residual))
    assert lora.state().residual == residual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_all_is_inside_and_nothing_is_served_any_more(dtype: torch.dtype) -> None:
    lora, _, _ = make("mlp", dtype)
    merged = lora.merge_and_unload()
    weights = {n: w.clone() for n, w in merged.named_parameters() if n.endswith("weight")}
    for name, weight in lora.base_weights().items():
        assert torch.equal(weight, weights[f"{name}.weight"])
    lora.set_base_dtype(torch.float32)
    assert all(torch.equal(w.float(), merged.get_parameter(n)) for n, w in weights.items())
