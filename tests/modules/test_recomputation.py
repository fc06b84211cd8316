from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPModel

from fedlora.errors import FedloraError
from fedlora.modules.lora import LoRAWrapper
from fedlora.modules.recomputation import set_gradient_checkpointing
from tests.small_clip import SIZE, adapted, pictures, shake
from tests.small_nets import make_net, wrap


class Larger(nn.Module):
    """A net of somebody's own around one or two of transformers' towers."""

    def __init__(self, *clips: nn.Module) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({str(i): clip for i, clip in enumerate(clips)})
        self.head = nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        pooled = [clip.vision_model(pixel_values=x).pooler_output for clip in self.towers.values()]
        return self.head(torch.stack(pooled).sum(0))


def clip(folder: Path) -> CLIPModel:
    return CLIPModel.from_pretrained(folder)


def checkpointing(model: nn.Module) -> list[bool]:
    return [m.gradient_checkpointing for m in model.modules() if hasattr(m, "layer_norm1")]


@pytest.mark.parametrize("kind", ["mlp", "resnet", "mixed"])
@pytest.mark.parametrize("enable", [True, False])
def test_a_net_without_it_says_so(kind: str, enable: bool) -> None:
    lora = wrap(make_net(kind))
    switch = lora.enable_gradient_checkpointing if enable else lora.disable_gradient_checkpointing
    with pytest.raises(FedloraError) as error:
        switch()
    assert str(error.value) == (
        f"{type(lora.model).__name__} has no gradient checkpointing: no part of it has the method "
        "gradient_checkpointing_enable, as transformers' models do. Leave it off, or use "
        "torch.utils.checkpoint in the model's forward()."
    )


def test_it_is_found_in_every_model_of_transformers_inside(folder: Path) -> None:
    net = Larger(clip(folder), clip(folder))
    assert checkpointing(net) == [False] * 8  # two blocks in each of two towers, twice
    set_gradient_checkpointing(net, True)
    assert checkpointing(net) == [True] * 8
    set_gradient_checkpointing(net, False)
    assert checkpointing(net) == [False] * 8


def test_a_model_that_does_not_support_it_is_passed_over(folder: Path) -> None:
    net = Larger(clip(folder))
    net.towers["0"].supports_gradient_checkpointing = False
    with pytest.raises(FedloraError, match="Larger has no gradient checkpointing"):
        set_gradient_checkpointing(net, True)


def test_a_method_of_the_users_own_is_called(folder: Path) -> None:
    class Own(Larger):
        def gradient_checkpointing_enable(self) -> None:
            self.calls = "on"

        def gradient_checkpointing_disable(self) -> None:
            self.calls = "off"

    net = Own(clip(folder))
    set_gradient_checkpointing(net, True)
    assert net.calls == "on"
    set_gradient_checkpointing(net, False)
    assert net.calls == "off"
    assert checkpointing(net) == [False] * 4  # the outermost decides


class Counted(nn.Module):
    """Counts the forward passes of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.calls = layer, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x)


def gradients(lora: LoRAWrapper, x: Tensor, key: int) -> dict[str, Tensor]:
    lora.model.train()
    lora.set_dropout_key(key)
    for parameter in lora.trainable().values():
        parameter.grad = None
    (lora.model(x) * torch.arange(1.0, 3.0)).square().sum().backward()
    return {name: p.grad.clone() for name, p in lora.trainable().items() if p.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_are_the_same_with_and_without(folder: Path, dropout: float) -> None:
    net = Larger(clip(folder))
    block = net.towers["0"].vision_model.encoder.layers[0]
    block.layer_norm1 = counted = Counted(block.layer_norm1)
    targets = [n for n, m in net.named_modules() if "vision_model.enc" in n and n[-3:-1] == "fc"]
    lora = wrap(net, r=3, lora_dropout=dropout, target_modules=targets)
    assert len(lora.layers) == 4
    shake(lora)
    x = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    plain = gradients(lora, x, key=1)
    assert len(plain) == 8
    assert counted.calls == 1
    lora.enable_gradient_checkpointing()
    again = gradients(lora, x, key=1)
    assert counted.calls == 3  # once more in the backward pass
    lora.disable_gradient_checkpointing()
    assert gradients(lora, x, key=1).keys() == again.keys() == plain.keys()
    assert counted.calls == 4
    for name, gradient in plain.items():
        size = float(gradient.abs().max())
        torch.testing.assert_close(again[name], gradient, rtol=1e-6, atol=1e-6 * size)
    if dropout:
        other = gradients(lora, x, key=2)
        assert not torch.allclose(other[name], plain[name])


def test_it_is_off_in_evaluation_mode(folder: Path) -> None:
    lora = adapted(folder)
    shake(lora)
    expected = lora.federated.eval()(pictures())
    lora.enable_gradient_checkpointing()
    assert torch.equal(lora.federated.eval()(pictures()), expected)
    loss = torch.nn.functional.cross_entropy(
        lora.federated.train()(pictures()), torch.arange(4) % 3
    )
    loss.backward()
    assert all(p.grad is not None for p in lora.trainable().values())
    lora.disable_gradient_checkpointing()
    assert torch.equal(lora.federated.eval()(pictures()), expected)
