"""What makes training quick: the layers of a built model, and fused optimizers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, AdamW, NAdam, RMSprop

from fedlora.modules.adapted import AdaptedLinear
from fedlora.modules.classifier import CLIPLoRAClassifier
from fedlora.modules.config import LoRAConfig
from fedlora.modules.layers import LaneLinear, LaneNorm
from fedlora.modules.quick import fuse, make_plain, make_quick
from fedlora.modules.tower import FirstTokenLayer, QuickGELU
from tests.small_clip import NAMES, adapted, pictures, shake


def parameters(seed: int = 0) -> list[nn.Parameter]:
    """Of several shapes; most optimizers treat each by itself."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 16), (24, 3), (7,), ()]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def options(optimizer: torch.optim.Optimizer) -> list[tuple[Any, Any]]:
    return [(group.get("fused", "none"), group.get("foreach")) for group in optimizer.param_groups]


@pytest.mark.parametrize("kind", [AdamW, Adam, partial(SGD, lr=0.1, momentum=0.9)])
def test_what_nobody_decided_is_fused(kind: Any) -> None:
    first, *rest = parameters()
    optimizer = kind([{"params": rest}, {"params": [first], "lr": 0.5}])
    assert fuse(optimizer) is optimizer
    assert options(optimizer) == [(True, None)] * 2
    assert optimizer.param_groups[1]["lr"] == 0.5


@pytest.mark.parametrize("kind", [AdamW, Adam, partial(SGD, lr=0.1)])
@pytest.mark.parametrize(
    "own",
    [
        {"fused": False},
        {"fused": True},
        {"foreach": True},
        {"foreach": False},
        {"differentiable": True},
    ],
    ids=str,
)
def test_what_the_user_said_is_kept(own: dict[str, bool], kind: Any) -> None:
    optimizer = kind(parameters(), **own)
    before = options(optimizer)
    fuse(optimizer)
    assert options(optimizer) == before


def test_capturable_ones_are_left_alone() -> None:
    optimizer = AdamW(parameters(), capturable=True)
    assert options(fuse(optimizer)) == [(None, None)]


def test_one_group_may_be_decided_and_another_not() -> None:
    first, *rest = parameters()
    optimizer = AdamW([{"params": rest}, {"params": [first], "foreach": False}])
    assert options(fuse(optimizer)) == [(True, None), (None, False)]


@pytest.mark.parametrize("kind", [RMSprop, Adadelta, NAdam])
def test_optimizers_without_the_option_are_left_alone(kind: Any) -> None:
    optimizer = kind(parameters())
    before = [dict(group) for group in optimizer.param_groups]
    assert [dict(group) for group in fuse(optimizer).param_groups] == before
    assert options(optimizer) == [("none", None)]


def test_an_optimizer_that_has_its_state_already_is_left_alone() -> None:
    """Adagrad makes it at once, in a place that depends on the option."""
    assert options(fuse(Adagrad(parameters()))) == [(None, None)]


def test_other_devices_and_numbers_are_left_alone() -> None:
    assert options(fuse(AdamW([nn.Parameter(torch.empty(2, device="meta"))]))) == [(None, None)]
    whole = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    assert options(fuse(AdamW([whole]))) == [(None, None)]
    mixed = [*parameters(), nn.Parameter(torch.empty(2, device="meta"))]
    assert options(fuse(AdamW(mixed))) == [(None, None)]


@pytest.mark.parametrize(
    "kind",
    [
        partial(AdamW, lr=0.01, weight_decay=0.1),
        partial(AdamW, lr=0.01, amsgrad=True),
        partial(Adam, lr=0.01),
        partial(SGD, lr=0.01, momentum=0.9, weight_decay=0.01),
        partial(SGD, lr=0.01, momentum=0.9, nesterov=True),
        partial(SGD, lr=0.01),
    ],
    ids=str,
)
def test_ten_fused_steps_are_ten_steps(kind: Any) -> None:
    trained = []
    for own in (False, True):
        values = parameters()
        optimizer = fuse(kind(values)) if own else kind(values, fused=False)
        assert options(optimizer)[0][0] is own
        generator = torch.Generator().manual_seed(1)
        for step in range(10):
            for parameter in values:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            if step == 3:
                values[0].grad = None  # an adapter that no picture reached
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        trained.append(values)
    for plain, fused, start in zip(*trained, parameters(), strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-6, atol=1e-6)
        assert (plain - start).norm() > 1e-2


def built(folder: Path, **options: Any) -> CLIPLoRAClassifier:
    lora = LoRAConfig(r=3, lora_alpha=6, lora_dropout=0.0)
    module = CLIPLoRAClassifier(str(folder), lora=lora, **options)
    module.build(NAMES, ["a photo of the digit {}.", "{}"])
    return module


def test_a_built_classifier_is_quick(folder: Path) -> None:
    module = built(folder)
    kinds = {type(each) for each in module.model.modules()}
    assert {AdaptedLinear, LaneLinear, LaneNorm, FirstTokenLayer, QuickGELU} <= kinds
    assert nn.LayerNorm not in kinds
    # PEFT's factors alone stay torch's.
    factors = {
        id(f["default"]) for at in module.lora.layers.values() for f in (at.lora_A, at.lora_B)
    }
    plain = {id(each) for each in module.model.modules() if type(each) is nn.Linear}
    assert plain == factors
    for optimizer in (
        module.configure_optimizers(),
        module.make_optimizer(module.optimizer_groups()),
    ):
        assert [group["fused"] for group in optimizer.param_groups] == [True, True]


def test_the_users_optimizer_is_as_the_user_wants(folder: Path) -> None:
    module = built(folder, optimizer=partial(AdamW, foreach=True))
    assert options(module.configure_optimizers()) == [(None, True)] * 2


@pytest.mark.parametrize("head", ["linear", "text"])
def test_a_quick_model_is_the_same_model(head: str, folder: Path) -> None:
    found = []
    for quick in (False, True):
        torch.manual_seed(0)
        lora = adapted(folder, head=head, towers="both" if head == "text" else "vision")
        if quick:
            make_quick(lora.federated)
        shake(lora)
        lora.federated.train()
        logits = lora.federated(pictures())
        (logits * torch.arange(logits.numel()).sin().view_as(logits)).sum().backward()
        gradients = {n: p.grad for n, p in lora.trainable().items() if p.grad is not None}
        found.append({"logits": logits.detach()} | gradients)
    plain, quick = found
    assert plain.keys() == quick.keys()
    for name, tensor in plain.items():
        close = 1e-4 * max(1.0, float(tensor.abs().max()))
        torch.testing.assert_close(quick[name], tensor, rtol=1e-4, atol=close)


def test_each_layer_is_of_its_own_class_again(folder: Path) -> None:
    """Once the adapter is out: a model of transformers, to be used and wrapped as any other."""
    lora = adapted(folder, layers=None)
    before = [type(module) for module in lora.federated.modules()]
    make_quick(lora.federated)
    assert [type(module) for module in lora.federated.modules()] != before
    make_plain(lora.federated)
    after = [type(module) for module in lora.federated.modules()]
    assert after == before
    make_quick(lora.federated)
    model = lora.unload()
    ours = (LaneLinear, LaneNorm, FirstTokenLayer, QuickGELU)
    assert not any(isinstance(module, ours) for module in model.modules())
