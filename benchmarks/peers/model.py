"""The adapted vision tower with its head, and a client's training, as one writes them by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection
from work import Work


class AdaptedTower(nn.Module):
    """A CLIP vision tower with PEFT's adapter and a linear head on its normalised features."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        task = work.task
        self.vision = CLIPVisionModelWithProjection.from_pretrained(task.model)
        self.vision.requires_grad_(False)
        config = LoraConfig(
            r=task.rank, lora_alpha=task.alpha, lora_dropout=0.0, target_modules=task.targets
        )
        inject_adapter_in_model(config, self.vision)
        head = work.start["head.weight"]
        self.head = nn.Linear(head.shape[1], head.shape[0])
        self.register_buffer("scale", work.scale, persistent=False)
        self.register_buffer("shift", work.shift, persistent=False)
        self.lr = task.lr
        self.set(work.start)
        self.train()

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained and exchanged: adapter and head."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def set(self, tensors: Mapping[str, Tensor]) -> None:
        """Load an adapter and head."""
        for name, parameter in self.trained().items():
            parameter.copy_(tensors[name])

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        """A fresh one; fused, which is the fastest on a CPU, too."""
        return torch.optim.AdamW(self.trained().values(), lr=lr, weight_decay=0.0, fused=True)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of pictures (n, 3, size, size), uint8."""
        pixels = images.float().mul_(self.scale).add_(self.shift)
        features = nn.functional.normalize(self.vision(pixels).image_embeds, dim=-1)
        return nn.functional.cross_entropy(self.head(features), labels)

    def train_client(self, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        """Train from what is loaded; returns the mean loss over the rows."""
        optimizer = self.optimizer(self.lr)
        summed, seen = torch.zeros(()), 0
        for images, labels in batches:
            loss = self.loss(images, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            summed += loss.detach() * len(labels)
            seen += len(labels)
        return summed.item() / seen
