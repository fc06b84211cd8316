"""Models that are not ours: a federated class of somebody's own, and a small ResNet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPModel


class OwnClip(nn.Module):
    """CLIP and a head, exchanged as a list of arrays in the way that Flower's examples do."""

    def __init__(self, folder: Path, classes: int = 3) -> None:
        super().__init__()
        self.backbone = CLIPModel.from_pretrained(folder)
        torch.manual_seed(1)
        self.head = nn.Linear(self.backbone.config.projection_dim, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        pooled = self.backbone.vision_model(pixel_values=pixels).pooler_output
        return self.head(self.backbone.visual_projection(pooled))

    def get_parameters(self) -> list[np.ndarray]:
        return [tensor.detach().cpu().numpy().copy() for tensor in self.state_dict().values()]

    def set_parameters(self, arrays: list[np.ndarray]) -> None:
        names = self.state_dict().keys()
        self.load_state_dict(
            {name: torch.from_numpy(a) for name, a in zip(names, arrays, strict=True)}
        )


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn(self.conv(x)))


class SmallResNet(nn.Module):
    """A strided convolution, a residual block, a head; every one with BatchNorm or a bias."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.block = Block(8)
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(torch.relu(self.bn(self.conv(x))))
        return self.fc(x.mean((2, 3)))
