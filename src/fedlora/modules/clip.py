"""A CLIP image classifier: pretrained towers and a linear or a text head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from operator import index
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

import torch
from torch import Tensor, nn

from fedlora.data.preprocess import ImagePreprocess
from fedlora.data.templates import DEFAULT_TEMPLATES, check_templates
from fedlora.errors import FedloraError
from fedlora.modules import families
from fedlora.modules.federated_classifier import FederatedClassifier
from fedlora.modules.layers import Bound
from fedlora.modules.loading import (
    load_clip,
    load_preprocess_config,
    load_tokenizer,
    weights_sha256,
)

if TYPE_CHECKING:
    from fedlora.modules.prefix import FrozenPrefix

Head = Literal["linear", "text"]
PROMPTS_AT_ONCE = 1024  # in a pass through the text tower that keeps nothing for gradients


def _num_classes(num_classes: int | None, head: Head, class_names: Sequence[str] | None) -> int:
    """The number of classes, when all that says it agrees."""
    if head not in ("linear", "text"):
        raise FedloraError(f"head should be one of linear, text but got {head!r}.")
    if num_classes is not None and (
        not isinstance(num_classes, SupportsIndex) or num_classes is True
    ):
        raise FedloraError(f"num_classes must be a whole number, got {num_classes!r}.")
    if isinstance(class_names, str):
        raise FedloraError(f"class_names must be a list of names, got {class_names!r}.")
    if num_classes is None and class_names is None:
        raise FedloraError("num_classes is needed where there are no class_names. Give one.")
    count = len(class_names or ()) if num_classes is None else index(num_classes)
    if count < 2:
        raise FedloraError(f"num_classes must be at least 2, got {count}.")
    if class_names is not None and len(class_names) != count:
        raise FedloraError(
            f"num_classes is {count} but there are {len(class_names)} class names. Drop "
            "num_classes or set it to that number."
        )
    if head == "text" and class_names is None:
        raise FedloraError("the text head needs class_names, got none. Give them or head=linear.")
    return count


class FederatedCLIPModel(FederatedClassifier):
    """CLIP (or SigLIP) with a classification head and a federated interface.

    ``get_parameters``, ``set_parameters``, ``train_step`` and ``evaluate`` work on the whole model;
    wrapped by :class:`~fedlora.CLIPLoRAWrapper` they work on the adapter and the head.

    Heads: ``linear``, a linear layer on the normalised image features, which starts as the
    zero-shot classifier where class names are known (as in WiSE-FT, arXiv 2109.01903, section 3)
    and from zeros otherwise; ``text``, the cosine with the averaged class prompts times CLIP's
    logit scale (arXiv 2103.00020, section 3.1.4).

    Args:
        model_name: ``tiny-clip``, a local folder in the Hugging Face layout, or a hub name.
        num_classes: number of classes; None takes it from ``class_names``.
        head: ``linear`` or ``text``.
        class_names: one per class; needed by the text head.
        templates: prompts with one ``{}`` for the class name; their embeddings are averaged.
        keep_text_tower: keep the text tower where the head does not need it; without it ``clip`` is
            no whole CLIP any more, so its ``save_pretrained`` is of no use.

    Raises:
        FedloraError: for a model that cannot be had, or classes that do not fit.
    """

    def __init__(
        self,
        model_name: str | PathLike[str] = "openai/clip-vit-base-patch32",
        num_classes: int | None = None,
        head: Head = "linear",
        class_names: Sequence[str] | None = None,
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        keep_text_tower: bool = True,
    ) -> None:
        count = _num_classes(num_classes, head, class_names)
        if not isinstance(model_name, str | PathLike):
            raise FedloraError(f"model_name must be a name or a path, got {model_name!r}.")
        model_name = fspath(model_name)
        prompts = check_templates(templates)
        preprocess = ImagePreprocess.from_config(load_preprocess_config(model_name))
        super().__init__(preprocess, count)
        self.model_name = model_name
        self.head = head
        self.class_names = None if class_names is None else list(class_names)
        self.templates = prompts
        self.clip = load_clip(model_name)
        self.base_sha256 = weights_sha256(self.clip)
        self.logit_scale = families.logit_scale(self.clip)

        self.classifier: nn.Linear | None = None
        # The text head's class features while the text tower stands still; None: made each time.
        self.text_features: Tensor | None
        self.register_buffer("text_features", None, persistent=False)
        # Likewise for a while in which nothing is trained; none before they are asked for.
        self._held_text: list[Tensor] | None = None
        self._prompts: dict[str, Tensor] = {}
        self.prefix: FrozenPrefix | None = None  # what frozen blocks give, while a trainer plays
        self.lanes: Bound | None = None  # whose pictures are in a batch, where several clients' are
        if class_names is not None:
            self._prompts = self._tokenize()
        if head == "linear":
            self.classifier = self._linear_head()
            self._prompts = {}
        if not keep_text_tower:
            self.freeze_text(True)
            families.drop_text_tower(self.clip)
            self._prompts = {}
        self.eval()  # as transformers loads a model

    def _linear_head(self) -> nn.Linear:
        head = nn.Linear(families.feature_dim(self.clip), self.num_classes)
        nn.init.zeros_(head.bias)
        with torch.no_grad():
            if self._prompts:
                # The scale inside the weight: round 0 answers with CLIP's own probabilities.
                head.weight.copy_(self.logit_scale * self.encode_text(self._prompts))
            else:
                head.weight.zero_()
        return head

    @property
    def has_text_tower(self) -> bool:
        """Whether the text tower is still there."""
        return families.has_text_tower(self.clip)

    @property
    def uses_text_tower(self) -> bool:
        """Whether the head reads the text tower; else gradients never reach it."""
        return self.head == "text"

    @property
    def text_frozen(self) -> bool:
        """Whether the class features of the text head are kept."""
        return self.text_features is not None

    @torch.no_grad()
    def freeze_text(self, frozen: bool) -> None:
        """Keep the text head's class features, or make them anew each time.

        Whoever trains the text tower, or stops to, says so here.
        """
        if self._prompts:
            self.text_features = self.encode_text(self._prompts) if frozen else None

    @contextmanager
    def holding_text(self) -> Iterator[None]:
        """Make the text head's class features once and not in each pass without gradients.

        For as long as the context lasts, in which the text tower must not change.
        """
        before, self._held_text = self._held_text, []
        try:
            yield
        finally:
            self._held_text = before

    def class_features(self) -> Tensor:
        """The text head's, normalised: (classes, dim)."""
        if self.text_features is not None:
            return self.text_features
        held = None if torch.is_grad_enabled() else self._held_text
        if held is None:
            return self.encode_text(self._prompts)
        if not held:  # not before: under the caller's autocast
            held.append(self.encode_text(self._prompts))
        return held[0]

    def _tokenize(self) -> dict[str, Tensor]:
        """Every class in every template: (classes * templates, length).

        Underscores become spaces, as in CoOp's code (arXiv 2109.01134): CLIP was trained on text,
        and class names are often those of folders.
        """
        names = [name.replace("_", " ") for name in self.class_names or ()]
        prompts = [template.format(name) for name in names for template in self.templates]
        return families.tokenise(self.clip, load_tokenizer(self.model_name), prompts)

    def encode_text(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """One normalised embedding per class, the average over templates: (classes, dim).

        Without gradients at most ``PROMPTS_AT_ONCE`` prompts at a time: a thousand classes in
        eighty templates fit in memory.
        """
        count = len(tokens["input_ids"])
        size = count if torch.is_grad_enabled() else PROMPTS_AT_ONCE
        parts = []
        for start in range(0, count, size):
            part = {key: value[start : start + size] for key, value in tokens.items()}
            part = {key: value.to(self.device) for key, value in part.items()}
            parts.append(families.text_features(self.clip, part))
        features = torch.cat(parts)
        features = features.view(-1, len(self.templates), features.shape[-1]).mean(1)
        return nn.functional.normalize(features, dim=-1)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Normalised image features: (n, 3, H, W) float -> (n, dim)."""
        return families.image_features(self.clip, pixels)

    def as_pixels(self, images: Tensor) -> Tensor:
        """Normalised (n, 3, H, W) in the model's type, of uint8 or of what is normalised."""
        if images.dtype == torch.uint8:
            images = self.preprocess.normalise(images)
        return images.to(self.clip.dtype)

    def forward(
        self, images: Tensor, index: Tensor | None = None, *, fixed: bool = False
    ) -> Tensor:
        """Logits.

        Args:
            images: (n, 3, H, W), uint8 as from the data module, or float and already normalised.
            index: (n,), which pictures these are, for what is kept of them while a trainer plays;
                best on the CPU, where it is read.
            fixed: whether these pictures always come together, in this order.

        Returns:
            (n, num_classes), float32.
        """
        if self.prefix is None:
            features = self.encode_image(self.as_pixels(images))
        else:
            features = self.prefix.image_features(images, index, fixed=fixed)
        if self.classifier is not None:
            logits: Tensor = self.classifier(features)
            return logits.float()
        return self.logit_scale * self._cosines(features).float()

    def _cosines(self, features: Tensor) -> Tensor:
        """Of the images with each class's prompts: (n, dim) -> (n, classes)."""
        if self.text_features is not None or self.lanes is None:
            text = self.class_features().to(features.dtype)
            return features @ text.T
        # A text tower that lanes have each their own of sees the prompts once for each.
        count = len(self.lanes.rows)
        prompts = {name: tokens.repeat(count, 1) for name, tokens in self._prompts.items()}
        own = self.encode_text(prompts).to(features.dtype).chunk(count)
        parts = features.split_with_sizes(list(self.lanes.rows))
        return torch.cat([part @ text.T for part, text in zip(parts, own, strict=True)])

    def set_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`get_parameters` gave, and start with a fresh optimizer.

        Raises:
            FedloraError: names every value that is missing, unknown, of another shape or type or
                not finite; nothing is changed then.
        """
        super().set_parameters(parameters)
        if "clip.logit_scale" in parameters:  # it is no parameter of the head, which has its value
            self.logit_scale = families.logit_scale(self.clip)
        if self.text_frozen and any(name.startswith("clip.text_") for name in parameters):
            self.freeze_text(True)

    def describe(self) -> dict[str, Any]:
        """What a saved adapter must say about the model, besides the adapter: JSON."""
        return {
            "base_model": self.model_name,
            "base_model_sha256": self.base_sha256,
            "head": self.head,
            "class_names": self.class_names,
            "templates": self.templates,
            "logit_scale": self.logit_scale,
            "preprocessing": asdict(self.preprocess),
        }
