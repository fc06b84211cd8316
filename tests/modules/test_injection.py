from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from fedlora.errors import FedloraError
from fedlora.modules.config import LoRAConfig
from fedlora.modules.injection import ADAPTER, find_targets, make_slots, product, why_not
from fedlora.modules.lora import LoRAWrapper
from tests.small_clip import shake
from tests.small_nets import NETS, Mixed, equal, make_net, snapshot, wrap

CONFIG = LoRAConfig(r=2, lora_alpha=6, lora_dropout=0.0)


def tied_weights() -> nn.Module:
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5), nn.Linear(5, 2))
    net[1].weight = net[0].weight
    return net


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, nn.functional.normalize(self.weight))


class Standardised(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Plain(nn.Linear):
    """Of another class, but it computes what a linear layer does."""


def quantised() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


# Layers that have no exact adapter -> why. Each stands in a net beside one that has.
UNABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "grouped": (lambda: nn.Conv2d(4, 4, 3, groups=2), "convolutions with groups"),
    "depthwise": (lambda: nn.Conv1d(4, 4, 3, groups=4), "convolutions with groups"),
    "dilated": (lambda: nn.Conv2d(4, 4, 3, dilation=(1, 2)), "dilation"),
    "reflected": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "non-zero padd"),
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, 3), "it is a ConvTranspose2d, not a linear"),
    "norm": (lambda: nn.BatchNorm2d(4), "it is a BatchNorm2d, not a linear or convolutional"),
    "embedding": (lambda: nn.Embedding(4, 4), "it is a Embedding, not a linear or convolution"),
    "activation": (nn.ReLU, "it is a ReLU, not a linear or convolutional layer"),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "computed from others"),
    "spectral norm": (lambda: spectral_norm(nn.Conv1d(4, 4, 1)), "computed from others"),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 2), "from others"),
    "own forward": (lambda: Cosine(4, 4), r"Cosine has a forward\(\) of its own"),
    "own convolution": (lambda: Standardised(4, 4, 3), r"Standardised has a forward\(\) of its"),
    "quantised": (quantised, r"its weight is torch\.int8"),
}


@pytest.mark.parametrize("kind", NETS)
def test_every_layer_with_an_exact_adapter_is_found_and_no_other(kind: str) -> None:
    net = make_net(kind)
    targets = find_targets(net, CONFIG)
    assert [target.name for target in targets] == list(NETS[kind].layers)
    for target in targets:
        assert target.base is net.get_submodule(target.name)
        in_features, out_features, elements = NETS[kind].layers[target.name]
        assert target.base.weight.flatten(1).shape == (out_features, in_features * elements)
        assert (target.r, target.lora_alpha) == (2, 6)
    adapted = {n for n, m in wrap(net).model.named_modules() if hasattr(m, "lora_A")}
    assert adapted - {"again.inner"} == set(NETS[kind].layers)


@pytest.mark.parametrize(("make", "reason"), UNABLE.values(), ids=UNABLE)
def test_what_has_no_exact_adapter_is_passed_over_and_refused_by_name(
    make: Callable[[], nn.Module], reason: str
) -> None:
    net = nn.ModuleDict({"odd": make(), "even": nn.Linear(4, 4)})
    assert [target.name for target in find_targets(net, CONFIG)] == ["even"]
    before = snapshot(net)
    with pytest.raises(
        FedloraError, match=rf"^lora\.target_modules: 'odd' cannot be adapted: .*{reason}.*\.$"
    ):
        LoRAWrapper(net, CONFIG, ["even", "odd"])
    assert equal(snapshot(net), before)
    assert type(net["even"]) is nn.Linear


def test_a_layer_that_attention_reads_without_calling_it() -> None:
    net = make_net("mixed")
    with pytest.raises(FedloraError, match="MultiheadAttention reads its weight"):
        find_targets(net, CONFIG, ["attention.out_proj"])
    assert why_not(net.attention.out_proj).startswith("torch's MultiheadAttention")


def test_tied_weights_of_two_layers_have_no_adapter_that_can_be_merged() -> None:
    """Added to the weight of one, the change would appear in the other."""
    net = tied_weights()
    assert [target.name for target in find_targets(net, CONFIG)] == ["2"]
    with pytest.raises(FedloraError, match=r"'1' cannot be adapted: its weight belongs to another"):
        find_targets(net, CONFIG, ["1"])
    biases = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    biases[1].bias = biases[0].bias  # nothing is added to these
    assert [target.name for target in find_targets(biases, CONFIG)] == ["0", "1"]


def test_a_class_that_computes_what_its_base_does_is_adapted() -> None:
    assert [t.name for t in find_targets(nn.Sequential(Plain(3, 2)), CONFIG)] == ["0"]


@pytest.mark.parametrize("name", ["fc", "layer", "onv1", "conv1.", "", "layer1.0.conv3", "Conv2d"])
def test_a_name_that_matches_nothing_lists_what_there_is(name: str) -> None:
    net = make_net("resnet")
    net.add_module("last", net.fc)
    del net.fc
    with pytest.raises(FedloraError) as error:
        find_targets(net, CONFIG, ["conv2", name])
    assert str(error.value) == (
        f"lora.target_modules: {name!r} matches no layer. There are: conv1, layer1.0.conv1, "
        "layer1.0.conv2, layer1.0.downsample.0, last."
    )


def test_a_long_list_is_cut() -> None:
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(14)))
    with pytest.raises(FedloraError, match=r"There are: 0, 1, .*, 10, 11 …\.$"):
        find_targets(net, CONFIG, ["x"])


def test_names_are_paths_or_their_endings() -> None:
    net = make_net("resnet")

    def found(*names: str) -> list[str]:
        return [target.name for target in find_targets(net, CONFIG, names)]

    assert found("conv1") == ["conv1", "layer1.0.conv1"]
    assert found("layer1.0.conv1") == ["layer1.0.conv1"]
    assert found("fc", "0.conv2") == ["layer1.0.conv2", "fc"]  # in the model's order
    assert found("conv2", "layer1.0.conv2") == ["layer1.0.conv2"]  # once
    assert found() == []  # none, where something else is trained
    assert [t.name for t in find_targets(net, CONFIG, "fc")] == ["fc"]  # not "f" and "c"
    config = LoRAConfig(target_modules=["downsample.0"])
    assert [t.name for t in find_targets(net, config)] == ["layer1.0.downsample.0"]
    assert [t.name for t in find_targets(net, config, ["fc"])] == ["fc"]
    # An ending that also fits a layer without an exact adapter takes the others.
    odd = nn.ModuleDict(
        {k: nn.ModuleDict({"conv": nn.Conv1d(4, 4, 1, groups=g)}) for k, g in [("a", 1), ("b", 2)]}
    )
    assert [target.name for target in find_targets(odd, CONFIG, ["conv"])] == ["a.conv"]


@pytest.mark.parametrize("name", ["first", "again.inner", "inner"])
def test_a_tied_layer_answers_to_each_of_its_names(name: str) -> None:
    net = Mixed()
    (target,) = find_targets(net, CONFIG, [name])
    assert target.name == "first"
    assert {(id(owner), attribute) for owner, attribute in target.places} == {
        (id(net), "first"),
        (id(net.again), "inner"),
    }


@pytest.mark.parametrize(
    "net",
    [
        nn.LSTM(3, 4),
        nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()),
        nn.Linear(3, 4),  # it has no name, and no place where an adapter could hang
        nn.Sequential(nn.Conv1d(4, 4, 3, groups=2)),
        nn.Sequential(),
    ],
    ids=["lstm", "norms", "linear", "grouped", "empty"],
)
def test_a_model_without_layers_to_adapt(net: nn.Module) -> None:
    with pytest.raises(FedloraError, match=r"no linear or convolutional layer to adapt\."):
        LoRAWrapper(net, CONFIG)


def test_an_empty_list_in_the_settings() -> None:
    with pytest.raises(FedloraError, match=r"null for the inferred ones, got \[\]"):
        LoRAWrapper(make_net("mlp"), LoRAConfig(target_modules=[]))


def test_a_lazy_model() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with pytest.raises(FedloraError, match="Run a batch through it first"):
        LoRAWrapper(net, CONFIG)
    net(torch.ones(1, 3))
    assert list(wrap(net).layers) == ["0", "1"]


@pytest.mark.parametrize("kind", NETS)
def test_making_layers_leaves_the_model_alone(kind: str) -> None:
    net = make_net(kind)
    next(net.parameters()).requires_grad_(False)
    before, flags = snapshot(net), [p.requires_grad for p in net.parameters()]
    modules = list(net.modules())
    slots = make_slots(find_targets(net, CONFIG), CONFIG)
    assert equal(snapshot(net), before)
    assert [p.requires_grad for p in net.parameters()] == flags
    assert all(one is two for one, two in zip(modules, net.modules(), strict=True))
    for slot in slots:
        assert slot.layer.get_base_layer() is slot.target.base
        assert (slot.layer.lora_B[ADAPTER].weight == 0).all()
        slot.hang(slot.layer)
        assert net.get_submodule(slot.target.name) is slot.layer
        slot.hang(slot.target.base)
    assert equal(snapshot(net), before)
    assert list(dict(net.named_modules())) == list(dict(make_net(kind).named_modules()))


def test_no_targets_make_no_layers() -> None:
    assert make_slots([], CONFIG) == []


def test_ranks_may_differ_by_layer() -> None:
    net = make_net("mlp")
    first, second, third = find_targets(net, CONFIG)
    slots = make_slots([first, replace(second, r=5, lora_alpha=1), third], CONFIG)
    assert [slot.layer.lora_A[ADAPTER].weight.shape[0] for slot in slots] == [2, 5, 2]
    assert [slot.layer.scaling[ADAPTER] for slot in slots] == [3, 0.2, 3]


def test_the_product_is_the_change_of_the_flattened_kernel() -> None:
    lora = wrap(make_net("resnet"))
    shake(lora)
    layer = lora.layers["layer1.0.conv1"]
    A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight  # (2,6,3,3), (8,2,1,1)
    change = product(layer)
    assert change.dtype == torch.float64
    assert change.shape == (8, 54)
    by_hand = 3 * torch.einsum("or,rikl->oikl", B.double().squeeze(), A.double())
    torch.testing.assert_close(change.view(8, 6, 3, 3), by_hand, rtol=1e-12, atol=1e-12)


# torch's TransformerEncoderLayer reads its weights in evaluation mode, and never calls its layers.


def encoder(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, layers)).eval()


def answers(net: nn.Module, x: Tensor, padding: Tensor | None = None) -> Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        out: Tensor = net[0](x, src_key_padding_mask=padding)
    return out


@pytest.mark.parametrize("padded", [False, True])
def test_fused_layers_see_the_adapter_in_evaluation_mode(padded: bool) -> None:
    net, x = encoder(), torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    padding = torch.tensor([[False, False, False], [False, False, True]]) if padded else None
    plain = answers(net, x, padding)
    lora = wrap(net)
    assert list(lora.layers) == [f"0.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    shake(lora)
    adapted = answers(net, x, padding)
    seen = slice(None) if padding is None else ~padding
    assert (adapted - plain)[seen].abs().max() > 0.1
    net.train()
    torch.testing.assert_close(adapted[seen], answers(net, x, padding)[seen])
    # With gradients too, where the first layer's output wants them.
    net.eval()
    net[0](x, src_key_padding_mask=padding).sum().backward()
    with lora.lora_disabled():
        assert torch.equal(answers(net, x, padding), plain)
    assert torch.equal(answers(net, x, padding), adapted)
    lora.merge_and_unload()
    torch.testing.assert_close(answers(net, x, padding)[seen], adapted[seen])
    assert vars(net[0].layers[0])["activation_relu_or_gelu"] == 1
    assert net[0].use_nested_tensor


def test_fused_layers_are_as_before_when_unloaded() -> None:
    net = encoder(1)
    before = [{k: v for k, v in vars(m).items() if k[0] != "_"} for m in net.modules()]
    wrap(net).unload()
    assert [{k: v for k, v in vars(m).items() if k[0] != "_"} for m in net.modules()] == before
