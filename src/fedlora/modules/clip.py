"""A CLIP image classifier: pretrained towers and a linear or a text head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedlora.data.preprocess import ImagePreprocess
from fedlora.errors import FedloraError
from fedlora.modules.loading import (
    load_clip,
    load_preprocess_config,
    load_tokenizer,
    weights_sha256,
)

Head = Literal["linear", "text"]
DEFAULT_TEMPLATES = ("a photo of a {}.",)


def _num_classes(num_classes: int | None, head: Head, class_names: Sequence[str] | None) -> int:
    """The number of classes, when all that says it agrees."""
    if head not in ("linear", "text"):
        raise FedloraError(f"head should be one of linear, text but got {head!r}.")
    if num_classes is None and class_names is None:
        raise FedloraError("num_classes is needed where there are no class_names. Give one.")
    count = len(class_names or ()) if num_classes is None else num_classes
    if count < 1:
        raise FedloraError(f"num_classes must be at least 1, got {count}.")
    if class_names is not None and len(class_names) != count:
        raise FedloraError(
            f"num_classes is {count} but there are {len(class_names)} class names. Drop "
            "num_classes or set it to that number."
        )
    if head == "text" and class_names is None:
        raise FedloraError("the text head needs class_names, got none. Give them or head=linear.")
    return count


class FederatedCLIPModel(nn.Module):
    """CLIP with a classification head.

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
        keep_text_tower: keep the text tower where the head does not need it.

    Raises:
        FedloraError: for a model that cannot be had, or classes that do not fit.
    """

    def __init__(
        self,
        model_name: str = "openai/clip-vit-base-patch32",
        num_classes: int | None = None,
        head: Head = "linear",
        class_names: Sequence[str] | None = None,
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        keep_text_tower: bool = True,
    ) -> None:
        super().__init__()
        count = _num_classes(num_classes, head, class_names)
        if not templates:
            raise FedloraError("templates must be at least one prompt, got none. Leave them out.")
        self.model_name = model_name
        self.num_classes = count
        self.head = head
        self.class_names = None if class_names is None else list(class_names)
        self.templates = list(templates)
        self.preprocess = ImagePreprocess.from_config(load_preprocess_config(model_name))
        self.clip = load_clip(model_name)
        self.base_sha256 = weights_sha256(self.clip)
        self.logit_scale = float(self.clip.logit_scale.detach().exp())

        self.classifier: nn.Linear | None = None
        self.text_features: Tensor | None
        self.text_frozen = True  # whoever trains the text tower says so here
        self.register_buffer("text_features", None, persistent=False)
        self._prompts: dict[str, Tensor] = {}
        if class_names is not None:
            tokens = self._tokenize()
            with torch.no_grad():
                self.text_features = self.encode_text(tokens)
            if head == "text" and keep_text_tower:
                self._prompts = tokens
        if head == "linear":
            self.classifier = nn.Linear(int(self.clip.visual_projection.out_features), count)
            nn.init.zeros_(self.classifier.bias)
            with torch.no_grad():
                if self.text_features is None:
                    self.classifier.weight.zero_()
                else:  # the scale inside the weight: round 0 answers with CLIP's own probabilities
                    self.classifier.weight.copy_(self.logit_scale * self.text_features)
            self.text_features = None
        if not keep_text_tower:
            del self.clip.text_model, self.clip.text_projection

    @property
    def has_text_tower(self) -> bool:
        """Whether the text tower is still there."""
        return hasattr(self.clip, "text_model")

    def _tokenize(self) -> dict[str, Tensor]:
        """Every class in every template, padded to the longest: (classes * templates, length)."""
        tokenizer = load_tokenizer(self.model_name)
        prompts = [t.format(name) for name in self.class_names or () for t in self.templates]
        text_config: Any = self.clip.config.text_config
        limit = text_config.max_position_embeddings
        encoded = tokenizer(
            prompts, padding=True, truncation=True, max_length=limit, return_tensors="pt"
        )
        return {key: encoded[key] for key in ("input_ids", "attention_mask")}

    def encode_text(self, tokens: dict[str, Tensor]) -> Tensor:
        """One normalised embedding per class, the average over templates: (classes, dim)."""
        device = self.clip.logit_scale.device
        tokens = {key: value.to(device) for key, value in tokens.items()}
        pooled = self.clip.text_model(**tokens).pooler_output
        features = nn.functional.normalize(self.clip.text_projection(pooled), dim=-1)
        features = features.view(-1, len(self.templates), features.shape[-1]).mean(1)
        return nn.functional.normalize(features, dim=-1)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Normalised image features: (n, 3, H, W) float -> (n, dim)."""
        pooled = self.clip.vision_model(pixel_values=pixels).pooler_output
        return nn.functional.normalize(self.clip.visual_projection(pooled), dim=-1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits.

        Args:
            images: (n, 3, H, W), uint8 as from the data module, or float and already normalised.

        Returns:
            (n, num_classes), float32.
        """
        if images.dtype == torch.uint8:
            images = self.preprocess.normalise(images)
        features = self.encode_image(images)
        if self.classifier is not None:
            logits: Tensor = self.classifier(features)
            return logits.float()
        # A trained text tower has moved: its prompts are encoded anew. A frozen one has not.
        text = self.text_features if self.text_frozen else self.encode_text(self._prompts)
        if text is None:  # the constructor makes them wherever the head is "text"
            raise FedloraError("the text head has no class prompts.")
        return self.logit_scale * (features @ text.T.to(features.dtype)).float()

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute activations of each block in the backward pass (training mode only)."""
        verb = "enable" if enabled else "disable"
        # The first name came during transformers 5, the second goes with version 6.
        method = getattr(self.clip, f"activation_checkpointing_{verb}", None)
        method = method or getattr(self.clip, f"gradient_checkpointing_{verb}")
        # The re-entrant form needs inputs that require gradients; a frozen base has none.
        method(*([{"use_reentrant": False}] if enabled else []))
