"""Small nets of other kinds than CLIP, for what holds of any model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.modules.config import LoRAConfig
from fedlora.modules.lora import LoRAWrapper


class MLP(nn.Module):
    """5 -> 7 -> 4 -> 3, one layer without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4, bias=False))
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.layers(x)))


class Block(nn.Module):
    """A residual block that halves the picture; its shortcut is a 1 x 1 convolution."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, (3, 1), padding="same")
        self.bn2 = nn.BatchNorm2d(out, track_running_stats=False)
        self.downsample = nn.Sequential(
            nn.Conv2d(width, out, 1, stride=2, bias=False), nn.BatchNorm2d(out)
        )

    def forward(self, x: Tensor) -> Tensor:
        main = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(main + self.downsample(x))


class ResNet(nn.Module):
    """A stem, one block and a head: pictures (n, 3, 9, 9) -> (n, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, stride=(2, 1), padding=(1, 0))
        self.bn1 = nn.BatchNorm2d(6)
        self.layer1 = nn.Sequential(Block(6, 8))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer1(torch.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


class Mixed(nn.Module):
    """Sequences (n, 4, 10) -> (n, 3), with layers that have no exact adapter and a tied one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(4, 6, 3, padding=1)
        self.grouped = nn.Conv1d(6, 6, 3, padding=1, groups=2)
        self.depthwise = nn.Conv1d(6, 6, 3, padding=1, groups=6)
        self.dilated = nn.Conv1d(6, 6, 3, padding=2, dilation=2)
        self.circular = nn.Conv1d(6, 6, 3, padding=1, padding_mode="circular")
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.first = nn.Linear(6, 6)
        self.again = nn.ModuleDict({"inner": self.first})  # the same layer in a second place
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dilated(self.depthwise(self.grouped(self.stem(x))))
        x = self.norm(self.circular(x)).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.again["inner"](torch.tanh(self.first(x)))
        return self.head(x.mean(1))


@dataclass(frozen=True)
class Kind:
    """A net and what is known of it by hand.

    Attributes:
        make: its class.
        shape: one input.
        layers: each layer that can be adapted -> (in, out, elements of the kernel).
        statistics: running statistics.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    layers: dict[str, tuple[int, int, int]]
    statistics: tuple[str, ...] = ()


NETS = {
    "mlp": Kind(MLP, (5,), {"layers.0": (5, 7, 1), "layers.2": (7, 4, 1), "out": (4, 3, 1)}),
    "resnet": Kind(
        ResNet,
        (3, 9, 9),
        {
            "conv1": (3, 6, 9),
            "layer1.0.conv1": (6, 8, 9),
            "layer1.0.conv2": (8, 8, 3),
            "layer1.0.downsample.0": (6, 8, 1),
            "fc": (8, 4, 1),
        },
        ("bn1", "layer1.0.bn1", "layer1.0.downsample.1"),
    ),
    "mixed": Kind(
        Mixed, (4, 10), {"stem": (4, 6, 3), "first": (6, 6, 1), "head": (6, 3, 1)}, ("norm",)
    ),
}


def make_net(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same weights at every call; running statistics that are not the initial ones."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = NETS[kind].make()
        for _ in range(3):
            net(torch.randn(8, *NETS[kind].shape) + 0.5)
    return net.to(dtype)


def inputs(kind: str, count: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise, (count, …)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *NETS[kind].shape, generator=generator).to(dtype)


def wrap(net: nn.Module, **lora: Any) -> LoRAWrapper:
    """An adapter in a net, rank 2 and without dropout unless said; the same at every call."""
    config = LoRAConfig(**{"r": 2, "lora_alpha": 6, "lora_dropout": 0.0, **lora})
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return LoRAWrapper(net, config).apply()


def train(lora: LoRAWrapper, kind: str, steps: int = 2) -> None:
    """A few steps, which move running statistics too; the mode is as before afterwards."""
    was, dtype = lora.model.training, next(lora.model.parameters()).dtype
    optimizer = torch.optim.SGD(lora.trainable().values(), lr=0.05)
    lora.model.train()
    for step in range(steps):
        optimizer.zero_grad()
        lora.model(inputs(kind, 8, seed=step, dtype=dtype)).square().mean().backward()
        optimizer.step()
    lora.model.train(was)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything that a model holds, counters and unsaved buffers included."""
    named = [*model.state_dict().items(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """The same names in the same order, types and bits."""
    return list(one) == list(two) and all(
        one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one
    )
