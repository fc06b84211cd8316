"""LoRAWrapper on nets of any kind: a residual net, a perceptron, attention and odd convolutions."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedlora.errors import FedloraError
from fedlora.modules.lora import LoRAWrapper
from fedlora.state import AdapterState, Residual
from tests.small_clip import shake
from tests.small_nets import NETS, equal, inputs, make_net, snapshot, train, wrap

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def shaken(kind: str, dtype: torch.dtype = torch.float32, **lora: Any) -> LoRAWrapper:
    wrapper = wrap(make_net(kind, dtype), **lora)
    shake(wrapper)
    return wrapper


# The forward pass.

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...], Callable[..., Tensor]]] = {
    "linear": (nn.Linear(5, 4), (2, 3, 5), nn.functional.linear),
    "no bias": (nn.Linear(5, 4, bias=False), (2, 5), nn.functional.linear),
    "conv1d": (
        nn.Conv1d(3, 4, 3, stride=2, padding=1),
        (2, 3, 8),
        lambda x, W, b: nn.functional.conv1d(x, W, b, stride=2, padding=1),
    ),
    "conv2d": (
        nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(0, 1)),
        (2, 3, 7, 6),
        lambda x, W, b: nn.functional.conv2d(x, W, b, stride=(2, 1), padding=(0, 1)),
    ),
    "1x1": (
        nn.Conv2d(3, 4, 1, stride=2, bias=False),
        (2, 3, 7, 6),
        lambda x, W, b: nn.functional.conv2d(x, W, b, stride=2),
    ),
    "same": (
        nn.Conv2d(3, 4, (3, 2), padding="same"),
        (2, 3, 7, 6),
        lambda x, W, b: nn.functional.conv2d(x, W, b, padding="same"),
    ),
    "conv3d": (
        nn.Conv3d(3, 4, 2),
        (2, 3, 4, 3, 3),
        lambda x, W, b: nn.functional.conv3d(x, W, b),
    ),
}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("layer", "shape", "function"), LAYERS.values(), ids=LAYERS)
def test_a_layer_computes_with_w_plus_scaled_product(
    layer: nn.Module, shape: tuple[int, ...], function: Callable[..., Tensor], rslora: bool
) -> None:
    net = nn.Sequential(copy.deepcopy(layer))
    lora = wrap(net, r=3, use_rslora=rslora)
    shake(lora)
    state = lora.state()
    scaling = 6 / (3**0.5 if rslora else 3)
    assert lora.scaling == {"0": pytest.approx(scaling)}
    change = scaling * state.B["0"] @ state.A["0"]  # (4, in * kernel)
    W = layer.weight + change.view(layer.weight.shape)
    x = torch.randn(shape)
    torch.testing.assert_close(net(x), function(x, W, layer.bias))


@pytest.mark.parametrize("kind", NETS)
def test_the_class_and_code_of_the_model_are_untouched(kind: str) -> None:
    net = make_net(kind)
    before = [(type(m), set(vars(m)), list(m._modules)) for m in net.modules()]
    modules = list(net.modules())
    lora = shaken(kind)
    lora = wrap(net)
    assert lora.model is net
    assert type(net) is NETS[kind].make
    for module, (cls, names, children) in zip(modules, before, strict=True):
        assert type(module) is cls
        assert set(vars(module)) == names
        assert list(module._modules) == children
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    lora.unload()
    assert all(one is two for one, two in zip(net.modules(), modules, strict=True))


@pytest.mark.parametrize("kind", NETS)
def test_a_fresh_adapter_changes_nothing_yet(kind: str) -> None:
    net = make_net(kind).eval()
    expected = net(inputs(kind))
    assert torch.equal(wrap(net).model(inputs(kind)), expected)  # B is zero


@pytest.mark.parametrize("kind", NETS)
def test_every_factor_gets_a_gradient(kind: str) -> None:
    lora = shaken(kind)
    lora.model.train()
    # Not a plain sum, whose gradient is lost in the mean that BatchNorm takes away.
    (lora.model(inputs(kind)) * torch.randn(4, 1)).square().sum().backward()
    trained = lora.trainable()
    assert len(trained) == 2 * len(NETS[kind].layers)
    assert [n for n, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0] == []
    frozen = {id(p) for p in trained.values()}
    assert all(p.grad is None for p in lora.model.parameters() if id(p) not in frozen)


def test_a_tied_layer_is_adapted_in_both_its_places() -> None:
    lora = shaken("mixed", target_modules=["first"])
    net = lora.model
    assert net.first is net.again["inner"] is lora.layers["first"]
    x = torch.randn(2, 6)
    once = net.first(x)
    base, state = lora.layers["first"].get_base_layer(), lora.state()
    W = base.weight + 3 * state.B["first"] @ state.A["first"]
    torch.testing.assert_close(once, x @ W.T + base.bias)
    lora.disable_lora_layers()
    assert net.first is net.again["inner"] is base
    lora.enable_lora_layers()
    lora.merge_and_unload()
    assert net.first is net.again["inner"] is base
    torch.testing.assert_close(net.again["inner"](x), once)


# What is exchanged.


@pytest.mark.parametrize("kind", NETS)
def test_factors_are_matrices_whose_product_is_the_change_of_the_flat_weight(kind: str) -> None:
    lora = shaken(kind)
    state = lora.state()
    plain = make_net(kind)
    expected = {n: plain.get_submodule(n).weight.flatten(1).double() for n in lora.layers}
    for name, (in_features, out_features, elements) in NETS[kind].layers.items():
        assert state.A[name].shape == (2, in_features * elements)
        assert state.B[name].shape == (out_features, 2)
        expected[name] += 3 * state.B[name].double() @ state.A[name].double()
    merged = lora.merge_and_unload()
    for name, W in expected.items():
        torch.testing.assert_close(merged.get_submodule(name).weight.flatten(1).double(), W)


def test_a_state_goes_in_as_it_came_out() -> None:
    state = shaken("resnet", bias="all").state()
    other = wrap(make_net("resnet"), bias="all")
    other.load(AdapterState.from_dict(copy.deepcopy(state.to_dict())))
    back = other.state()
    assert [n for n, _ in back.tensors()] == [n for n, _ in state.tensors()]
    for (_, one), (_, two) in zip(back.tensors(), state.tensors(), strict=True):
        assert one.is_contiguous()
        assert torch.equal(one, two)


def test_kernels_that_are_not_matrices_are_refused() -> None:
    lora = shaken("resnet")
    before = lora.get_parameters()
    wrong = AdapterState(A={"fc": torch.ones(2, 8), "layer1.0.conv1": torch.ones(2, 6, 3, 3)})
    with pytest.raises(FedloraError, match=r"has shape \(2, 6, 3, 3\), expected \(2, 54\)"):
        lora.load(wrong)
    assert equal(lora.get_parameters(), before)


def test_what_is_learned_has_names_and_shapes_of_the_model() -> None:
    lora = wrap(make_net("resnet"), bias="lora_only")
    given = lora.get_parameters()
    statistics = [f"{n}.running_{s}" for n in NETS["resnet"].statistics for s in ("mean", "var")]
    factors = [f"{n}.lora_{f}" for n in NETS["resnet"].layers for f in "AB"]
    biases = ["conv1.bias", "layer1.0.conv2.bias", "fc.bias"]
    assert list(given) == [*factors, *biases, *statistics]
    assert given["conv1.lora_A"].shape == (2, 3, 3, 3)
    assert given["conv1.lora_B"].shape == (6, 2, 1, 1)
    assert given["fc.lora_A"].shape == (2, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", NETS)
def test_parameters_go_round_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    one = shaken(kind, dtype, bias="all")
    train(one, kind)
    given = one.get_parameters()
    assert {t.dtype for t in given.values()} == {dtype}
    two = wrap(make_net(kind, dtype), bias="all")
    two.set_parameters(given)
    assert equal(two.get_parameters(), given)
    x = inputs(kind, dtype=dtype)
    for lora in (one, two):
        lora.model.eval()
    assert torch.equal(one.model(x), two.model(x))


def test_parameters_are_copies() -> None:
    lora = shaken("resnet")
    given = lora.get_parameters()
    kept = copy.deepcopy(given)
    lora.set_parameters(given)
    for tensor in given.values():
        tensor.zero_()
    assert equal(lora.get_parameters(), kept)


@pytest.mark.parametrize("kind", ["resnet", "mixed"])
def test_running_statistics_travel_and_counters_do_not(kind: str) -> None:
    one, two = wrap(make_net(kind)), wrap(make_net(kind))
    train(one, kind)
    given = one.get_parameters()
    names = [f"{n}.running_{s}" for n in NETS[kind].statistics for s in ("mean", "var")]
    assert [n for n in given if "lora_" not in n] == names
    assert list(one.state().other) == names
    assert not any("num_batches_tracked" in name for name in given)
    assert not torch.equal(given[names[0]], two.get_parameters()[names[0]])
    counters = {n: t.clone() for n, t in two.model.named_buffers() if "num_batches" in n}
    two.load(one.state())
    assert equal(two.get_parameters(), given)
    assert all(torch.equal(t, dict(two.model.named_buffers())[n]) for n, t in counters.items())


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda p: {n: t for n, t in p.items() if n != "bn1.running_var"}, "is missing"),
    "empty": (lambda p: {}, r"'conv1\.lora_A' is missing; .* \(and \d+ more\)"),
    "unknown": (lambda p: {**p, "fc.weight": torch.ones(4, 8)}, r"'fc\.weight' is unknown here"),
    "no name": (lambda p: {**p, 3: torch.ones(1)}, "3 is unknown here"),
    "shape": (
        lambda p: {**p, "conv1.lora_A": p["conv1.lora_A"].flatten(1)},
        r"'conv1\.lora_A' has shape \(2, 27\), expected \(2, 3, 3, 3\)",
    ),
    "broadcast": (
        lambda p: {**p, "fc.lora_B": torch.ones(1, 2)},
        r"'fc\.lora_B' has shape \(1, 2\), expected \(4, 2\)",
    ),
    "dtype": (
        lambda p: {**p, "fc.lora_B": p["fc.lora_B"].double()},
        r"'fc\.lora_B' is torch\.float64, expected torch\.float32",
    ),
    "nan": (lambda p: {**p, "fc.lora_B": p["fc.lora_B"] * torch.nan}, "NaN or infinite"),
    "inf": (lambda p: {**p, "bn1.running_mean": torch.full((6,), torch.inf)}, "'bn1.running_mean"),
    "array": (lambda p: {**p, "fc.lora_B": np.ones((4, 2))}, "is a ndarray, expected a tensor"),
    "none": (lambda p: {**p, "fc.lora_B": None}, "is a NoneType, expected a tensor"),
    "list": (lambda p: list(p.values()), r"must be a dict of name -> tensor, .* got list\."),
    "nothing": (lambda p: None, r"must be a dict of name -> tensor, .* got NoneType\."),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG)
def test_parameters_that_do_not_fit_are_refused_and_nothing_is_half_set(
    spoil: Callable[[dict[str, Any]], Any], message: str
) -> None:
    lora = shaken("resnet")
    before = snapshot(lora.model)
    moved = {n: t + 1 for n, t in lora.get_parameters().items()}
    with pytest.raises(FedloraError, match=message):
        lora.set_parameters(spoil(moved))
    assert equal(snapshot(lora.model), before)


@pytest.mark.parametrize("how", ["whole", "off", "disabled"])
def test_so_are_those_of_the_whole_model(how: str) -> None:
    lora = shaken("resnet", enabled=how != "disabled", save_only_trainable=how != "whole")
    if how == "off":
        lora.disable_lora_layers()
    before = snapshot(lora.model)
    moved = {n: t + 1 for n, t in lora.get_parameters().items()}
    last = next(reversed(moved))
    for spoiled, message in (
        ({**moved, last: torch.full_like(moved[last], torch.nan)}, "NaN or infinite"),
        ({n: t for n, t in moved.items() if n != last}, f"'{last}' is missing"),
        ({**moved, "fc.lora_A": torch.ones(2, 8)}, "'fc.lora_A' is unknown here"),
        ({**moved, "bn1.num_batches_tracked": torch.tensor(1.5)}, "expected torch.int64"),
    ):
        with pytest.raises(FedloraError, match=message):
            lora.set_parameters(spoiled)
        assert equal(snapshot(lora.model), before)


def test_every_fault_is_named() -> None:
    lora = wrap(make_net("mlp"))
    given = lora.get_parameters()
    given["out.lora_A"], given["out.lora_B"] = torch.ones(1), given["out.lora_B"] / 0
    del given["layers.0.lora_A"]
    with pytest.raises(FedloraError) as error:
        lora.set_parameters({**given, "x": torch.ones(1)})
    assert str(error.value) == (
        "parameters do not fit this model, nothing was changed: 'layers.0.lora_A' is missing; "
        "'out.lora_A' has shape (1,), expected (2, 4); 'out.lora_B' has values that are NaN or "
        "infinite; 'x' is unknown here."
    )


@pytest.mark.parametrize("kind", NETS)
def test_all_is_exchanged_where_that_is_wanted(kind: str) -> None:
    one = shaken(kind, save_only_trainable=False)
    train(one, kind)
    with torch.no_grad():
        for tensor in one.model.parameters():
            tensor.add_(0.125)  # the base too
    given = one.get_parameters()
    assert given.keys() == one.model.state_dict().keys()
    two = wrap(make_net(kind), save_only_trainable=False)
    two.set_parameters(given)
    assert equal(two.get_parameters(), given)
    assert equal(snapshot(two.model), snapshot(one.model))
    x = inputs(kind)
    assert torch.equal(one.model.eval()(x), two.model.eval()(x))


def test_all_that_was_set_is_what_is_merged_and_changed_by_residuals() -> None:
    """A residual that was served before is part of the base that is exchanged."""
    lora = shaken("mlp", torch.float64, save_only_trainable=False)
    lora.load(AdapterState(residual={"out": Residual(torch.ones(3, 4))}))
    given = {name: tensor + 1 for name, tensor in lora.get_parameters().items()}
    lora.set_parameters(given)
    W, x = given["out.base_layer.weight"], inputs("mlp", dtype=torch.float64)
    assert torch.equal(lora.base_weights()["out"], W)
    lora.load(AdapterState(residual={"out": Residual(torch.full((3, 4), 2.0))}))
    assert torch.equal(lora.base_weights()["out"], W + 2)
    lora.load(AdapterState())
    assert torch.equal(lora.base_weights()["out"], W)
    expected = lora.model(x)
    torch.testing.assert_close(lora.merge_and_unload()(x), expected)


@pytest.mark.parametrize("kind", NETS)
def test_without_lora_everything_is_trained_and_exchanged(kind: str) -> None:
    one, two = (wrap(make_net(kind), enabled=False) for _ in range(2))
    assert one.layers == {}
    assert all(parameter.requires_grad for parameter in one.model.parameters())
    assert len(one.trainable()) == len(list(one.model.parameters()))
    train(one, kind)
    given = one.get_parameters()
    assert given.keys() == make_net(kind).state_dict().keys()
    two.set_parameters(given)
    assert equal(snapshot(two.model), snapshot(one.model))
    assert torch.equal(one.model.eval()(inputs(kind)), two.model.eval()(inputs(kind)))
    assert one.unload() is one.model


@pytest.mark.parametrize("kind", ["resnet", "mixed"])
def test_without_lora_a_state_holds_running_statistics_too(kind: str) -> None:
    one, two = (wrap(make_net(kind), enabled=False) for _ in range(2))
    train(one, kind)
    two.load(one.state())
    x = inputs(kind)
    assert torch.equal(one.model.eval()(x), two.model.eval()(x))


def test_without_lora_unloading_gives_the_flags_back() -> None:
    net = make_net("mlp")
    net.out.bias.requires_grad_(False)
    wrap(net, enabled=False).unload()
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["out.bias"]


# Off and on.


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", NETS)
def test_off_it_is_the_untouched_model_and_on_what_it_was(kind: str, training: bool) -> None:
    lora, plain = shaken(kind, bias="all"), make_net(kind)
    train(lora, kind)
    lora.load(AdapterState(residual=residuals(kind)))
    x = inputs(kind)
    before = snapshot(lora.model)
    expected = lora.model.eval()(x)
    lora.disable_lora_layers()
    assert equal(snapshot(lora.model), snapshot(plain))
    assert list(lora.model.state_dict()) == list(plain.state_dict())
    lora.model.train(training)
    assert torch.equal(lora.model(x), plain.train(training)(x))
    assert equal(lora.get_parameters(), plain.state_dict())
    assert all(p.requires_grad for p in lora.model.parameters())
    lora.enable_lora_layers()
    assert lora.model.training is training
    if training:  # the statistics moved while it was off were the original's
        lora.model.eval()
    assert torch.equal(lora.model(x), expected)
    assert all(torch.equal(t, before[n]) for n, t in lora.model.state_dict().items())
    assert len(lora.trainable()) == len([p for p in lora.model.parameters() if p.requires_grad])


def residuals(kind: str) -> dict[str, Residual]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: Residual(torch.randn(out, in_features * elements, generator=generator))
        for name, (in_features, out, elements) in NETS[kind].layers.items()
    }


def test_the_context_puts_it_back_after_an_exception() -> None:
    lora, x = shaken("resnet"), inputs("resnet")
    lora.model.eval()
    expected, plain = lora.model(x), make_net("resnet").eval()(x)

    def fail() -> None:
        with lora.lora_disabled():
            assert torch.equal(lora.model(x), plain)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert lora.phase == "on"
    assert torch.equal(lora.model(x), expected)


def test_contexts_may_be_nested_and_used_while_off() -> None:
    lora, x = shaken("resnet"), inputs("resnet")
    lora.model.eval()
    expected, plain = lora.model(x), make_net("resnet").eval()(x)
    with lora.lora_disabled():
        with lora.lora_disabled():
            assert torch.equal(lora.model(x), plain)
        assert torch.equal(lora.model(x), plain)
    assert torch.equal(lora.model(x), expected)
    lora.disable_lora_layers()
    lora.disable_lora_layers()
    with lora.lora_disabled():
        assert torch.equal(lora.model(x), plain)
    assert lora.phase == "off"
    lora.enable_lora_layers()
    lora.enable_lora_layers()
    assert torch.equal(lora.model(x), expected)


def test_the_model_may_be_switched_and_moved_while_the_layers_are_off() -> None:
    lora = shaken("mlp", lora_dropout=0.5)
    lora.model.eval()
    lora.disable_lora_layers()
    lora.model.train()
    lora.enable_lora_layers()
    assert all(layer.training for layer in lora.layers.values())
    assert lora.layers["out"].lora_dropout["default"].training


def test_a_value_known_by_two_names_comes_back() -> None:
    """Swapped once, not once for each of its names."""
    net = make_net("mlp")
    config = wrap(make_net("mlp"), bias="all").config
    lora = LoRAWrapper(net, config, other={"head.bias": net.out.bias}).apply()
    shake(lora)
    x = inputs("mlp")
    expected = lora.model(x)
    with lora.lora_disabled():
        assert equal(snapshot(net), snapshot(make_net("mlp")))
    assert torch.equal(lora.model(x), expected)


def test_a_buffer_that_two_modules_share_comes_back() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)
            mean = torch.zeros(2)
            self.one.register_buffer("mean", mean)
            self.two.register_buffer("mean", mean)

    net = Shared()
    lora = wrap(net)
    # An adapted layer's buffers are its base's.
    lora.layers["one"].get_base_layer().mean.fill_(7)
    with lora.lora_disabled():
        assert net.one.mean.tolist() == net.two.mean.tolist() == [0, 0]
    assert lora.layers["two"].get_base_layer().mean.tolist() == [7, 7]


def test_biases_that_layers_share_are_trained_once() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].bias = net[0].bias
    lora = wrap(net, bias="lora_only")
    assert list(lora.parameters["other"]) == ["0.bias"]


# Away.


@pytest.mark.parametrize("kind", NETS)
def test_unloaded_the_model_is_the_one_that_it_was(kind: str) -> None:
    net = make_net(kind)
    next(net.parameters()).requires_grad_(False)
    flags = {n: p.requires_grad for n, p in net.named_parameters()}
    modules, parameters = dict(net.named_modules()), dict(net.named_parameters())
    before = snapshot(net)
    lora = wrap(net, bias="all", lora_dropout=0.3)
    shake(lora)
    train(lora, kind)
    lora.load(AdapterState(residual=residuals(kind)))
    assert lora.unload() is net
    assert equal(snapshot(net), before)
    assert {n: p.requires_grad for n, p in net.named_parameters()} == flags
    assert all(dict(net.named_modules())[n] is m for n, m in modules.items())
    assert all(dict(net.named_parameters())[n] is p for n, p in parameters.items())
    assert len(list(net.modules())) == len(modules)
    net.train()
    assert torch.equal(net(inputs(kind)), make_net(kind)(inputs(kind)))
    wrap(net)  # and it can be wrapped again


def test_unloading_works_while_the_layers_are_off() -> None:
    lora = shaken("resnet")
    lora.disable_lora_layers()
    assert equal(snapshot(lora.unload()), snapshot(make_net("resnet")))


USES: dict[str, Callable[[LoRAWrapper], Any]] = {
    "get_parameters": lambda lora: lora.get_parameters(),
    "set_parameters": lambda lora: lora.set_parameters({}),
    "state": lambda lora: lora.state(),
    "load": lambda lora: lora.load(AdapterState()),
    "report": lambda lora: lora.report(),
    "set_trainable": lambda lora: lora.set_trainable({"A"}),
    "disable": lambda lora: lora.disable_lora_layers(),
    "enable": lambda lora: lora.enable_lora_layers(),
    "context": lambda lora: lora.lora_disabled().__enter__(),
    "merge": lambda lora: lora.merge_and_unload(),
    "unload": lambda lora: lora.unload(),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_use_before_apply(use: Callable[[LoRAWrapper], Any]) -> None:
    net = make_net("mlp")
    lora = LoRAWrapper(net, wrap(make_net("mlp")).config)
    with pytest.raises(FedloraError, match=r"^this adapter is not applied yet. Call apply\(\)"):
        use(lora)
    assert equal(snapshot(net), snapshot(make_net("mlp")))


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_use_when_it_is_gone(use: Callable[[LoRAWrapper], Any], merge: bool) -> None:
    lora = shaken("mlp", bias="all")
    lora.merge_and_unload() if merge else lora.unload()
    before, flags = snapshot(lora.model), [p.requires_grad for p in lora.model.parameters()]
    what = "was merged into the model and is gone" if merge else "was unloaded and is gone"
    with pytest.raises(FedloraError, match=rf"^this adapter {what}. Wrap the model anew\.$"):
        use(lora)
    assert equal(snapshot(lora.model), before)
    assert [p.requires_grad for p in lora.model.parameters()] == flags


@pytest.mark.parametrize("use", ["state", "load", "report", "merge", "set_trainable"])
def test_what_needs_the_layers_on(use: str) -> None:
    lora = shaken("mlp", bias="all")
    lora.disable_lora_layers()
    with pytest.raises(FedloraError, match=r"is off\. Call enable_lora_layers\(\) first"):
        USES[use](lora)
    assert equal(snapshot(lora.model), snapshot(make_net("mlp")))


def test_a_model_cannot_be_wrapped_twice() -> None:
    net = make_net("mlp")
    one, two = LoRAWrapper(net), LoRAWrapper(net)
    one.apply()
    with pytest.raises(FedloraError, match=r"was applied before \(it is on now\)"):
        one.apply()
    with pytest.raises(FedloraError, match=r"has LoRA already \(in layers\.0\)"):
        two.apply()
    with pytest.raises(FedloraError, match=r"has LoRA already .* unload\(\)"):
        LoRAWrapper(net)
    assert two.phase == "new"
    one.unload()
    two.apply()


def test_another_adapter_that_came_while_this_one_was_off_is_not_overwritten() -> None:
    net = make_net("mlp")
    one = wrap(net)
    one.disable_lora_layers()
    two = wrap(net)
    with pytest.raises(FedloraError, match="has LoRA already"):
        one.enable_lora_layers()
    assert net.out is two.layers["out"]
    two.unload()
    one.enable_lora_layers()
    assert net.out is one.layers["out"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("kind", NETS)
def test_merged_it_is_a_plain_model_with_the_same_predictions(
    kind: str, dtype: torch.dtype, tolerance: float
) -> None:
    lora = shaken(kind, dtype, bias="all")
    train(lora, kind)
    lora.model.eval()
    x = inputs(kind, dtype=dtype)
    expected, statistics = lora.model(x), lora.get_parameters()
    merged = lora.merge_and_unload()
    torch.testing.assert_close(merged(x), expected, rtol=tolerance, atol=tolerance)
    assert [n for n, _ in merged.named_modules()] == [n for n, _ in make_net(kind).named_modules()]
    assert list(merged.state_dict()) == list(make_net(kind).state_dict())
    assert not any("lora" in f"{n} {type(m)}".lower() for n, m in merged.named_modules())
    for name, tensor in merged.state_dict().items():
        assert name not in statistics or torch.equal(tensor, statistics[name])
    assert all(parameter.requires_grad for parameter in merged.parameters())
    for twin in (copy.deepcopy(merged), pickle.loads(pickle.dumps(merged))):
        assert torch.equal(twin(x), merged(x))


def test_merging_with_a_residual_is_exact() -> None:
    """W0 + R + s B A, each a power of two, summed without a rounding error."""
    net = nn.Sequential(nn.Conv2d(1, 1, 2, bias=False))
    nn.init.constant_(net[0].weight, 2**-20)
    lora = wrap(net, r=1, lora_alpha=2)
    ones = {"0": torch.ones(1, 4)}
    lora.load(AdapterState(ones, {"0": torch.ones(1, 1)}, residual={"0": Residual(ones["0"] * 8)}))
    # 8 + 2^-20 does not fit into the 24 bits of what is served, 8 - 8 + 2^-20 does.
    assert torch.equal(lora.base_weights()["0"], torch.full((1, 4), 8 + 2**-20))
    lora.load(
        AdapterState({"0": torch.full((1, 4), -4.0)}, residual={"0": Residual(ones["0"] * 8)})
    )
    merged = lora.merge_and_unload()
    assert torch.equal(merged[0].weight, torch.full((1, 1, 2, 2), 2**-20))


@pytest.mark.parametrize("kind", NETS)
def test_merging_with_residuals_keeps_the_predictions(kind: str) -> None:
    lora = shaken(kind, torch.float64)
    lora.load(AdapterState(residual=residuals(kind)))
    lora.model.eval()
    x = inputs(kind, dtype=torch.float64)
    expected = lora.model(x)
    assert not torch.allclose(expected, make_net(kind, torch.float64).eval()(x))
    torch.testing.assert_close(lora.merge_and_unload()(x), expected, rtol=1e-10, atol=1e-10)


def test_an_adapted_model_can_be_copied() -> None:
    lora = shaken("resnet")
    twin = copy.deepcopy(lora)
    lora.model.eval()
    twin.model.eval()
    assert torch.equal(twin.model(inputs("resnet")), lora.model(inputs("resnet")))
    before = snapshot(lora.model)
    shake(twin, seed=1)
    twin.merge_and_unload()
    assert equal(snapshot(lora.model), before)


def test_describe_names_the_model_without_its_adapter() -> None:
    lora = shaken("resnet")
    about = lora.describe()
    assert about["base_model"] == "ResNet"
    assert about == wrap(make_net("resnet")).describe()
    changed = make_net("resnet")
    with torch.no_grad():
        changed.fc.bias[0] += 1
    assert wrap(changed).describe() != about
