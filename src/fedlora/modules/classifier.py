"""The LightningModule: a LoRA-adapted CLIP classifier that knows nothing of clients or rounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW
from torchmetrics import MetricCollection

from fedlora.data.preprocess import ImagePreprocess
from fedlora.errors import FedloraError
from fedlora.modules.clip import DEFAULT_TEMPLATES, FederatedCLIPModel, Head
from fedlora.modules.clip_wrapper import CLIPLoRAWrapper, Towers
from fedlora.modules.config import LoRAConfig
from fedlora.modules.loading import load_preprocess_config
from fedlora.modules.metrics import make_metrics
from fedlora.modules.saved import load_adapter

Batch = Mapping[str, Tensor]


class CLIPLoRAClassifier(LightningModule):
    """CLIP with a LoRA adapter and a classification head.

    The model is built in :meth:`configure_model`, where the data's class names are known; the
    constructor only keeps the settings. ``lightning.Trainer`` fits it as it is (the centralised
    baseline), ``FederatedTrainer`` plays clients with it.

    Args:
        model_name: ``tiny-clip``, a local folder in the Hugging Face layout, or a hub name.
        num_classes: checked against the data where given.
        head: ``linear`` (on normalised image features) or ``text`` (cosine with class prompts).
        towers: which towers are adapted; with ``vision`` the text tower is dropped once the class
            prompts are encoded.
        lora: the adapter's settings.
        optimizer: makes the optimizer from parameter groups.
        head_lr: learning rate of the head; None takes the optimizer's.
        label_smoothing: of the training loss, in [0, 1).
        adapter: a folder with a PEFT adapter to start from.

    Raises:
        FedloraError: for a wrong setting; for a model that cannot be had, once it is built.
    """

    def __init__(
        self,
        model_name: str = "tiny-clip",
        num_classes: int | None = None,
        head: Head = "linear",
        towers: Towers = "vision",
        lora: LoRAConfig = LoRAConfig(),  # noqa: B008  (read only; the command line shows its fields)
        optimizer: OptimizerCallable = AdamW,
        head_lr: float | None = None,
        label_smoothing: float = 0.0,
        adapter: str | None = None,
    ) -> None:
        super().__init__()
        lora.validate()
        if lora.enabled and not lora.save_only_trainable:
            raise FedloraError(
                "model.lora.save_only_trainable must be true here: of a frozen model only what is "
                "trained is exchanged. Leave it out, or set model.lora.enabled=false to train and "
                "exchange the full model."
            )
        if not 0 <= label_smoothing < 1:
            raise FedloraError(f"model.label_smoothing must be in [0, 1), got {label_smoothing}.")
        if head_lr is not None and not head_lr >= 0:
            raise FedloraError(f"model.head_lr must be 0 or above, got {head_lr}.")
        self.model_name = model_name
        self.num_classes = num_classes
        self.head = head
        self.towers = towers
        self.lora_config = replace(lora)  # the caller's own may be assigned to later
        self.optimizer = optimizer
        self.head_lr = head_lr
        self.label_smoothing = label_smoothing
        self.adapter = adapter
        self.model: FederatedCLIPModel | None = None
        self.lora: CLIPLoRAWrapper | None = None

    @cached_property
    def preprocess(self) -> ImagePreprocess:
        """How pictures become the model's input; reads one small file."""
        return ImagePreprocess.from_config(load_preprocess_config(self.model_name))

    def configure_model(self) -> None:
        """Build the model from the data's class names; does nothing the second time."""
        if self.model is not None:
            return
        data = getattr(self.trainer, "datamodule", None)
        names = getattr(data, "class_names", None)
        self.build(names, getattr(data, "templates", None))

    def build(
        self, class_names: Iterable[str] | None, templates: Iterable[str] | None = None
    ) -> CLIPLoRAWrapper:
        """Load CLIP, make the head and inject the adapter; start from ``adapter`` if there is one.

        A trainer that goes on from a checkpoint has all that is learned there: the folder of
        ``adapter`` may be gone then.
        """
        names = None if class_names is None else list(class_names)
        if names is not None and self.num_classes not in (None, len(names)):
            raise FedloraError(
                f"model.num_classes is {self.num_classes} but the data has {len(names)} classes. "
                "Leave it out, or set it to that number."
            )
        model = FederatedCLIPModel(
            self.model_name,
            self.num_classes,
            head=self.head,
            class_names=names,
            templates=list(templates or DEFAULT_TEMPLATES),
            keep_text_tower=self.towers == "both",
        )
        self.lora = CLIPLoRAWrapper(model, self.lora_config, towers=self.towers).apply()
        if getattr(self._trainer, "ckpt_path", None) is None:
            self.start_from_adapter()
        # CLIP is loaded in evaluation mode, which lightning.Trainer would keep while it trains.
        self.model = model.train(self.training)
        return self.lora

    def start_from_adapter(self) -> None:
        """Load the adapter that ``adapter`` names into the model; nothing without one.

        Raises:
            FedloraError: where it is no adapter, is damaged or does not fit.
        """
        if self.adapter is not None and self.lora is not None:
            load_adapter(self.adapter, self.lora)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, 3, H, W), uint8 or normalised float."""
        if self.model is None:
            raise FedloraError("the model is not built yet: call build() or use a trainer.")
        return self.model(images)  # type: ignore[no-any-return]

    def training_step(self, batch: Batch, batch_idx: int = 0) -> dict[str, Tensor]:
        """The loss of a batch: ``loss`` (mean), ``losses`` (n,) and ``correct`` (n,)."""
        logits = self(batch["image"])
        losses = nn.functional.cross_entropy(
            logits, batch["label"], reduction="none", label_smoothing=self.label_smoothing
        )
        correct = logits.detach().argmax(1) == batch["label"]
        return {"loss": losses.mean(), "losses": losses, "correct": correct}

    def validation_step(self, batch: Batch, batch_idx: int = 0) -> dict[str, Tensor]:
        """``losses`` (n,), ``logits`` (n, classes) and ``label`` (n,), without smoothing."""
        logits = self(batch["image"])
        losses = nn.functional.cross_entropy(logits, batch["label"], reduction="none")
        return {"losses": losses, "logits": logits, "label": batch["label"]}

    def test_step(self, batch: Batch, batch_idx: int = 0) -> dict[str, Tensor]:
        """As in validation."""
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> dict[str, Tensor]:
        """``index`` (n,) of each picture and its class probabilities ``probs`` (n, classes)."""
        return {"index": batch["index"], "probs": self(batch["image"]).softmax(-1)}

    def make_metrics(self) -> MetricCollection:
        """Fresh ``acc`` and ``loss`` of an evaluation."""
        if self.model is None:
            raise FedloraError("the model is not built yet: call build() or use a trainer.")
        return make_metrics(self.model.num_classes)

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """The trained parameters, the head apart so that it has its own learning rate."""
        if self.lora is None:
            raise FedloraError("the model is not built yet: call build() or use a trainer.")
        trained = self.lora.trainable()
        # Trained in full or by an adapter of its own.
        heads = ("other/classifier.", "A/classifier", "B/classifier")
        head = [p for name, p in trained.items() if name.startswith(heads)]
        rest = [p for name, p in trained.items() if not name.startswith(heads)]
        groups: list[dict[str, Any]] = [{"params": rest}] if rest else []
        if head:
            groups.append({"params": head} | ({} if self.head_lr is None else {"lr": self.head_lr}))
        return groups

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """A fresh optimizer over what is trainable now."""
        return self.optimizer(self.optimizer_groups())

    def configure_callbacks(self) -> list[Callback]:
        """What logs the steps' figures under ``lightning.Trainer``."""
        return [StepLogger()]


class StepLogger(Callback):
    """Logs ``train/loss``, ``val/acc``, ``val/loss``, ``test/…`` under ``lightning.Trainer``."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the training loss."""
        pl_module.log("train/loss", outputs["loss"], batch_size=len(batch["label"]))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *step: Any
    ) -> None:
        """Log the validation figures."""
        self._log("val", pl_module, step[0])

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *step: Any) -> None:
        """Log the test figures."""
        self._log("test", pl_module, step[0])

    def _log(self, stage: str, pl_module: LightningModule, step: Mapping[str, Tensor]) -> None:
        count = len(step["label"])
        correct = (step["logits"].argmax(1) == step["label"]).double().mean()
        pl_module.log(f"{stage}/acc", correct, batch_size=count, on_epoch=True, prog_bar=True)
        pl_module.log(f"{stage}/loss", step["losses"].mean(), batch_size=count, on_epoch=True)
