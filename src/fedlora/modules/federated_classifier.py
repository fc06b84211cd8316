"""The federated interface of an image classifier: exchange, a training step, evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedlora.data.pictures import to_labels, to_pixels
from fedlora.data.preprocess import ImagePreprocess
from fedlora.errors import FedloraError
from fedlora.modules.parameters import copy_of, fill


class FederatedClassifier(nn.Module):
    """A classifier of pictures as a hand-written federated loop uses it.

    It knows nothing of adapters: a wrapper that adds one decides what ``state_dict()`` shows here.

    Args:
        preprocess: how pictures become the model's input.
        num_classes: number of classes; ``forward`` gives logits (n, num_classes).
    """

    def __init__(self, preprocess: ImagePreprocess, num_classes: int) -> None:
        super().__init__()
        self.preprocess = preprocess
        self.num_classes = num_classes
        self.moved = False  # whether the weights may differ from those that were loaded
        self._optimizer: torch.optim.Optimizer | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.parameters()).device

    def get_parameters(self) -> dict[str, Tensor]:
        """Copies of all parameters on the CPU, by name, in their own types."""
        return copy_of(self.state_dict())

    def set_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`get_parameters` gave, and start with a fresh optimizer.

        Raises:
            FedloraError: names every value that is missing, unknown, of another shape or type or
                not finite; nothing is changed then.
        """
        fill(self.state_dict(), parameters)
        self.moved = True
        self._optimizer = None

    def train_step(self, data: object, labels: object, lr: float = 1e-3) -> float:
        """One step of AdamW on a batch.

        The optimizer lasts until :meth:`set_parameters`; ``lr`` may differ from step to step.

        Args:
            data: pictures: a tensor, numpy array or PIL image or a list of them, of any size where
                they are uint8; float tensors (n, 3, H, W) are taken as normalised.
            labels: one class number per picture.
            lr: the learning rate.

        Returns:
            The mean cross-entropy before the step.

        Raises:
            FedloraError: for data or labels that cannot be used, and where nothing is trained.
        """
        pixels, targets = self._batch(data, labels)
        optimizer = self._ready_optimizer(lr)
        self.train()
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(self(pixels), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        self.moved = True
        return float(loss.detach())

    def _ready_optimizer(self, lr: float) -> torch.optim.Optimizer:
        if not isinstance(lr, int | float) or not 0 <= lr < math.inf:
            raise FedloraError(f"lr must be a number from 0, got {lr!r}.")
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not trained:
            raise FedloraError("nothing in this model wants gradients, so nothing can be trained.")
        optimizer = self._optimizer
        held = {id(p) for g in optimizer.param_groups for p in g["params"]} if optimizer else set()
        if optimizer is None or held != {id(parameter) for parameter in trained}:
            optimizer = self._optimizer = torch.optim.AdamW(trained, lr=lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        return optimizer

    @torch.no_grad()
    def evaluate(self, data: object, labels: object, batch_size: int = 256) -> dict[str, float]:
        """Accuracy and loss on pictures, in evaluation mode; the mode is as before afterwards.

        Args:
            data: as in :meth:`train_step`.
            labels: one class number per picture.
            batch_size: pictures in a forward pass.

        Returns:
            ``accuracy`` in [0, 1], ``loss`` (mean cross-entropy), ``num_samples``, ``num_correct``.

        Raises:
            FedloraError: for data or labels that cannot be used.
        """
        from fedlora.modules.metrics import make_metrics, update_metrics  # takes seconds

        if batch_size < 1:
            raise FedloraError(f"batch_size must be at least 1, got {batch_size}.")
        pixels, targets = self._batch(data, labels)
        metrics = make_metrics(self.num_classes).to(self.device)
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            for start in range(0, len(targets), batch_size):
                images, label = (x[start : start + batch_size] for x in (pixels, targets))
                logits = self(images)
                losses = nn.functional.cross_entropy(logits, label, reduction="none")
                update_metrics(metrics, {"logits": logits, "label": label, "losses": losses})
        finally:
            for module, training in modes:
                module.training = training
        values = metrics.compute()
        accuracy, count = float(values["acc"]), len(targets)
        return {
            "accuracy": accuracy,
            "loss": float(values["loss"]),
            "num_samples": count,
            "num_correct": round(accuracy * count),
        }

    def _batch(self, data: object, labels: object) -> tuple[Tensor, Tensor]:
        """Pixels (n, 3, size, size) and labels (n,) on the model's device."""
        pixels = to_pixels(data, self.preprocess)
        targets = to_labels(labels, len(pixels), self.num_classes)
        return pixels.to(self.device), targets.to(self.device)
