"""What logs the classifier's figures under ``lightning.Trainer``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer
from torchmetrics import MetricCollection

from fedlora.modules.metrics import MetricName, compute_metrics, update_metrics

if TYPE_CHECKING:
    from fedlora.modules.classifier import CLIPLoRAClassifier


class StepLogger(Callback):
    """Logs ``train/loss``, ``val/acc``, ``val/loss``, ``test/…`` under ``lightning.Trainer``.

    Figures of a split are counted over all its samples, on all ranks, and logged at its end: F1 and
    AUROC are no means over batches. Not defined ones are left out. ``per_class`` is not for here.
    """

    def __init__(self) -> None:
        self._metrics: MetricCollection | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the training loss."""
        pl_module.log("train/loss", outputs["loss"], batch_size=len(batch["label"]))

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Count from 0."""
        self._start(pl_module)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, *step: Any) -> None:
        """Count the batch."""
        self._count(step[0])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Log the validation figures."""
        self._log("val", pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Count from 0."""
        self._start(pl_module)

    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, *step: Any) -> None:
        """Count the batch."""
        self._count(step[0])

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Log the test figures."""
        self._log("test", pl_module)

    def _start(self, module: CLIPLoRAClassifier) -> None:
        self._metrics = module.make_metrics(_names(module), sync=True).to(module.device)

    def _count(self, step: Any) -> None:
        if self._metrics is not None:
            update_metrics(self._metrics, step)

    def _log(self, split: str, module: CLIPLoRAClassifier) -> None:
        if self._metrics is None:
            return
        values = compute_metrics(self._metrics, _names(module)).values
        self._metrics = None
        for name, value in values.items():
            if value is not None:
                # The same on every rank; sync_dist only keeps Lightning from warning.
                module.log(f"{split}/{name}", value, prog_bar=name == "acc", sync_dist=True)


def _names(module: CLIPLoRAClassifier) -> list[MetricName]:
    return [name for name in module.metrics if name != "per_class"]
