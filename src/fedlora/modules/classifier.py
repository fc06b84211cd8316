"""The LightningModule: a LoRA-adapted CLIP classifier that knows nothing of clients or rounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW
from torchmetrics import MetricCollection

from fedlora.data.preprocess import ImagePreprocess
from fedlora.data.templates import DEFAULT_TEMPLATES
from fedlora.errors import FedloraError
from fedlora.modules.class_weights import (
    ClassWeights,
    check_class_weights,
    make_class_weights,
)
from fedlora.modules.clip import FederatedCLIPModel, Head
from fedlora.modules.clip_wrapper import CLIPLoRAWrapper, Towers
from fedlora.modules.config import LoRAConfig
from fedlora.modules.loading import load_preprocess_config
from fedlora.modules.metrics import MetricName, check_metrics, make_metrics
from fedlora.modules.quick import fuse, make_quick
from fedlora.modules.saved import load_adapter
from fedlora.modules.step_logger import StepLogger

Batch = Mapping[str, Tensor]


class CLIPLoRAClassifier(LightningModule):
    """CLIP with a LoRA adapter and a classification head: one label per picture.

    The model is built in :meth:`configure_model`, where the data's class names are known; the
    constructor only keeps the settings. ``lightning.Trainer`` fits it as it is (the centralised
    baseline), ``FederatedTrainer`` plays clients with it. The classes exclude each other (softmax
    and cross-entropy): pictures with several labels at once are not for it.

    With ``class_weights`` w the training loss of sample i is w[y_i] times its cross-entropy, label
    smoothing included, and that of a batch is the mean over its samples, as everywhere here: a
    sample counts the same whatever batch and client it is in. ``torch``'s weighted cross-entropy
    divides by the batch's sum of weights instead, so that they cancel out for a client that holds
    one class, and weighs each class's part of the smoothing. Validation and test are not weighted;
    ``train/loss`` is.

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
        metrics: what validation and test measure besides ``acc`` and ``loss``: ``macro_f1``,
            ``balanced_acc``, ``auroc`` (keeps the logits of a split in memory), and ``per_class``,
            a table of the test classes at the end of a run.
        class_weights: a number above 0 for each class; or ``balanced``: n / (k * n_c) for n
            training rows of k classes, n_c of them of this one, so that the mean weight is 1 (0 for
            a class without rows). For that each client's counts of rows per class are added up at
            the server: it learns who holds which classes unless it sees nothing but their sum.
        frozen_cache_gb: with ``lora.layers`` what the vision blocks below the first adapted one
            give for a picture never changes. ``FederatedTrainer`` keeps it on the model's device
            where that of all pictures takes at most so many 10^9 bytes in a process, else none of
            it. 0: never. Augmented pictures are computed each time.

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
        metrics: list[MetricName] | None = None,
        class_weights: ClassWeights = None,
        frozen_cache_gb: float = 1.0,
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
        if not frozen_cache_gb >= 0:
            raise FedloraError(f"model.frozen_cache_gb must be 0 or above, got {frozen_cache_gb}.")
        self.model_name = model_name
        self.num_classes = num_classes
        self.head = head
        self.towers = towers
        self.lora_config = replace(lora)  # the caller's own may be assigned to later
        self.optimizer = optimizer
        self.head_lr = head_lr
        self.label_smoothing = label_smoothing
        self.adapter = adapter
        self.metrics = check_metrics(metrics)
        self.class_weights = check_class_weights(class_weights)
        self.frozen_cache_gb = frozen_cache_gb
        self.loss_weights: Tensor | None  # of each class, (num_classes,), once the model is built
        self.register_buffer("loss_weights", None, persistent=False)
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
        count = getattr(data, "class_counts", None) if self.class_weights == "balanced" else None
        self.build(names, getattr(data, "templates", None), count and count())

    def build(
        self,
        class_names: Iterable[str] | None,
        templates: Iterable[str] | None = None,
        class_counts: Iterable[int] | None = None,
    ) -> CLIPLoRAWrapper:
        """Load CLIP, make the head and inject the adapter; start from ``adapter`` if there is one.

        A trainer that goes on from a checkpoint has all that is learned there: the folder of
        ``adapter`` may be gone then.

        Args:
            class_names: one per class; None with ``num_classes`` and a linear head.
            templates: prompts with one ``{}`` for the class name.
            class_counts: training rows of each class, for ``class_weights=balanced``.

        Raises:
            FedloraError: for a model that cannot be had, or classes that do not fit.
        """
        names = None if class_names is None else list(class_names)
        if names is not None and self.num_classes not in (None, len(names)):
            raise FedloraError(
                f"model.num_classes is {self.num_classes} but the data has {len(names)} classes. "
                "Leave it out, or set it to that number."
            )
        classes = self.num_classes if names is None else len(names)
        if classes is not None:  # else the model says that it is missing
            counts = None if class_counts is None else list(class_counts)
            self.loss_weights = make_class_weights(self.class_weights, classes, counts)
        model = FederatedCLIPModel(
            self.model_name,
            self.num_classes,
            head=self.head,
            class_names=names,
            templates=list(templates or DEFAULT_TEMPLATES),
            keep_text_tower=self.towers == "both",
        )
        self.lora = CLIPLoRAWrapper(model, self.lora_config, towers=self.towers).apply()
        make_quick(model)
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

    def keep_frozen(self, client: int, count: int, batches: Iterable[Batch]) -> None:
        """Compute what frozen blocks give for a client's training rows, where that is kept.

        Within :func:`~fedlora.modules.prefix.keeping_frozen`, before each time that it trains and
        under the autocast of its steps; does nothing the second time.

        Args:
            client: id.
            count: its training rows.
            batches: all of these, each time in the same batches; not begun where not needed.
        """
        if self.model is not None and self.model.prefix is not None:
            self.model.prefix.keep(client, count, batches)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, 3, H, W), uint8 or normalised float."""
        if self.model is None:
            raise FedloraError("the model is not built yet: call build() or use a trainer.")
        return self.model(images)  # type: ignore[no-any-return]

    def _logits(self, batch: Batch, fixed: bool = False) -> Tensor:
        """Of a batch; ``fixed`` where its rows always come together, in this order."""
        if self.model is None or self.model.prefix is None:
            return self(batch["image"])  # type: ignore[no-any-return]
        # What is kept of a picture is known by its index.
        index = batch.get("index")
        return self.model(batch["image"], index, fixed=fixed)  # type: ignore[no-any-return]

    def training_step(self, batch: Batch, batch_idx: int = 0) -> dict[str, Tensor]:
        """The loss of a batch: ``loss`` (mean), ``losses`` (n,), weighted, and ``correct`` (n,)."""
        logits = self._logits(batch)
        losses = nn.functional.cross_entropy(
            logits, batch["label"], reduction="none", label_smoothing=self.label_smoothing
        )
        if self.loss_weights is not None:
            losses = losses * self.loss_weights[batch["label"]]
        correct = logits.detach().argmax(1) == batch["label"]
        return {"loss": losses.mean(), "losses": losses, "correct": correct}

    def validation_step(self, batch: Batch, batch_idx: int = 0) -> dict[str, Tensor]:
        """``losses`` (n,), ``logits`` (n, classes) and ``label`` (n,): no smoothing, no weights."""
        logits = self._logits(batch, fixed=True)
        losses = nn.functional.cross_entropy(logits, batch["label"], reduction="none")
        return {"losses": losses, "logits": logits, "label": batch["label"]}

    def test_step(self, batch: Batch, batch_idx: int = 0) -> dict[str, Tensor]:
        """As in validation."""
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> dict[str, Tensor]:
        """``index`` (n,) of each picture and its class probabilities ``probs`` (n, classes)."""
        logits = self._logits(batch, fixed=True)
        return {"index": batch["index"], "probs": logits.softmax(-1)}

    def make_metrics(
        self, names: Sequence[MetricName] = (), sync: bool = False
    ) -> MetricCollection:
        """Fresh metrics of an evaluation: ``acc``, ``loss`` and what ``names`` needs.

        Args:
            names: of :attr:`metrics`, those that are wanted.
            sync: add up over ranks.
        """
        if self.model is None:
            raise FedloraError("the model is not built yet: call build() or use a trainer.")
        return make_metrics(self.model.num_classes, names, sync)

    def optimizer_groups(
        self, trained: Mapping[str, nn.Parameter] | None = None
    ) -> list[dict[str, Any]]:
        """The trained parameters, the head apart so that it has its own learning rate.

        Args:
            trained: in their place, by the same names.
        """
        if self.lora is None:
            raise FedloraError("the model is not built yet: call build() or use a trainer.")
        trained = self.lora.trainable() if trained is None else trained
        # Trained in full or by an adapter of its own.
        heads = ("other/classifier.", "A/classifier", "B/classifier")
        head = [p for name, p in trained.items() if name.startswith(heads)]
        rest = [p for name, p in trained.items() if not name.startswith(heads)]
        groups: list[dict[str, Any]] = [{"params": rest}] if rest else []
        if head:
            groups.append({"params": head} | ({} if self.head_lr is None else {"lr": self.head_lr}))
        return groups

    def make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """A fresh optimizer of groups as :meth:`optimizer_groups` gives them."""
        return fuse(self.optimizer(groups))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """A fresh optimizer over what is trainable now."""
        return self.make_optimizer(self.optimizer_groups())

    def configure_callbacks(self) -> list[Callback]:
        """What logs the steps' figures under ``lightning.Trainer``."""
        return [StepLogger()]
