"""Which layers count as normalisation, and that each of their parameters counts once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from fedlora.errors import FedloraError
from fedlora.modules.config import LoRAConfig
from fedlora.modules.in_full import norms
from fedlora.modules.lora import LoRAWrapper


class Channels(nn.LayerNorm):
    """Derived, as libraries do for pictures."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class OwnRMSNorm(nn.Module):
    """Named like one and of nobody's library: what it does with its weight is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class Modulated(LlamaRMSNorm):
    """Of transformers, without a weight: a layer computes it from something else."""

    def __init__(self) -> None:
        super().__init__(4)
        del self.weight
        self.modulation = nn.Linear(4, 4)


def weight_normed() -> nn.Module:
    layer = nn.LayerNorm(4)
    return nn.utils.parametrizations.weight_norm(layer, dim=None)


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (nn.LayerNorm(4), {"weight", "bias"}),
        (nn.LayerNorm(4, bias=False), {"weight"}),
        (nn.LayerNorm(4, elementwise_affine=False), set()),
        (Channels(4), {"weight", "bias"}),
        (nn.GroupNorm(2, 4), {"weight", "bias"}),
        (nn.BatchNorm1d(4), {"weight", "bias"}),
        (nn.BatchNorm2d(4), {"weight", "bias"}),
        (nn.BatchNorm3d(4, affine=False), set()),
        (nn.SyncBatchNorm(4), {"weight", "bias"}),
        (nn.InstanceNorm2d(4, affine=True), {"weight", "bias"}),
        (nn.RMSNorm(4), {"weight"}),
        (LlamaRMSNorm(4), {"weight"}),
        (T5LayerNorm(4), {"weight"}),
        (
            weight_normed(),
            {
                "bias",
                "parametrizations.weight.original0",
                "parametrizations.weight.original1",
            },
        ),
        (Modulated(), set()),
        (OwnRMSNorm(), set()),
        (nn.Linear(4, 4), set()),
        (nn.Conv1d(4, 4, 1), set()),
        (nn.PReLU(4), set()),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_which_layers_normalise(layer: nn.Module, names: set[str]) -> None:
    net = nn.ModuleDict({"deep": nn.Sequential(layer, nn.Linear(4, 4))})
    found = norms(net)
    assert set(found) == {f"deep.0.{name}" for name in names}
    own = dict(net.named_parameters())
    assert all(parameter is own[name] for name, parameter in found.items())
    assert set(norms(layer)) == names


def shared_layer() -> nn.Module:
    norm = nn.LayerNorm(4)
    return nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 4), norm)


def shared_weight() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4))
    net[3].weight, net[3].bias = net[1].weight, net[1].bias
    return net


def shared_with_a_linear_layer() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    net[1].bias = net[0].bias
    return net


NORM, LINEAR = ["1.weight", "1.bias"], ["0.bias", "2.bias"]


@pytest.mark.parametrize(
    ("make", "bias", "names"),
    [
        (shared_layer, "none", NORM),
        (shared_layer, "all", [*NORM, *LINEAR]),
        (shared_layer, "lora_only", [*NORM, *LINEAR]),
        (shared_weight, "none", NORM),
        (shared_weight, "all", [*NORM, *LINEAR]),
        (shared_with_a_linear_layer, "none", NORM),
        (shared_with_a_linear_layer, "all", ["1.weight", "0.bias"]),
        (shared_with_a_linear_layer, "lora_only", ["1.weight", "0.bias"]),
    ],
)
def test_each_parameter_counts_once(make: object, bias: str, names: list[str]) -> None:
    config = LoRAConfig(r=2, lora_dropout=0.0, bias=bias, train_norm=True)  # type: ignore[arg-type]
    lora = LoRAWrapper(make(), config).apply()  # type: ignore[operator]
    assert sorted(lora.state().other) == sorted(names)
    assert lora.report().full == 4 * len(names)
    assert len({id(p) for p in lora.trainable().values()}) == len(lora.trainable())


def test_a_layer_of_transformers_is_trained() -> None:
    net = nn.Sequential(nn.Linear(4, 4), LlamaRMSNorm(4), nn.Linear(4, 2))
    lora = LoRAWrapper(net, LoRAConfig(r=2, lora_dropout=0.0, train_norm=True)).apply()
    net(torch.randn(3, 4)).square().sum().backward()
    torch.optim.SGD(lora.trainable().values(), lr=0.1).step()
    assert set(lora.state().other) == {"1.weight"}
    assert not torch.equal(lora.state().other["1.weight"], torch.ones(4))


def test_a_model_without_any_is_refused_and_left_alone() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False), OwnRMSNorm())
    lora = LoRAWrapper(net, LoRAConfig(r=2, train_norm=True))
    with pytest.raises(FedloraError, match=r"lora\.train_norm is true, and Sequential has no norm"):
        lora.apply()
    assert type(net[0]) is nn.Linear
    assert all(parameter.requires_grad for parameter in net.parameters())
