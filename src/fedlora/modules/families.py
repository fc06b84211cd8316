"""What differs between transformers' CLIP and SigLIP models, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn
from torch.nn.functional import normalize

from fedlora.errors import FedloraError

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedConfig, PreTrainedModel, SiglipModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

    Clip: TypeAlias = CLIPModel | SiglipModel

# Fixed-resolution SigLIP 2 is of type "siglip"; "siglip2" is NaFlex alone, another architecture.
SUPPORTED = ("clip", "siglip")
SUPPORTED_TEXT = "CLIP (clip), SigLIP and fixed-resolution SigLIP 2 (siglip)"
_NO_HEAD = (
    "has no pooling head (vision_use_head is false in its config.json), so it gives no image "
    "features. Choose a model that has one."
)


def check(config: PreTrainedConfig, subject: str) -> None:
    """Refuse a model that is of no supported family or gives no image features.

    Args:
        config: the transformers config of the whole model.
        subject: how the message names the model: ``model_name 'some/folder'``.

    Raises:
        FedloraError: one line that says why.
    """
    if config.model_type not in SUPPORTED:
        raise FedloraError(
            f"{subject} is a {config.model_type!r} model; supported: {SUPPORTED_TEXT}. "
            "Choose one of these."
        )
    vision: Any = getattr(config, "vision_config", None)
    if not getattr(vision, "vision_use_head", True):
        raise FedloraError(f"{subject} {_NO_HEAD}")


def model_class(model_type: str) -> type[Clip]:
    """The class of transformers that loads a supported model type."""
    from transformers import CLIPModel, SiglipModel

    return {"clip": CLIPModel, "siglip": SiglipModel}[model_type]


def backbone_classes() -> tuple[type[PreTrainedModel], ...]:
    """The classes that count as a CLIP inside somebody's own model."""
    import transformers as t

    whole = (t.CLIPModel, t.SiglipModel)
    return (*whole, t.CLIPVisionModelWithProjection, t.CLIPVisionModel, t.SiglipVisionModel)


def image_features(clip: Clip, pixels: Tensor) -> Tensor:
    """Normalised image features: (n, 3, H, W) float -> (n, dim)."""
    pooled = clip.vision_model(pixel_values=pixels).pooler_output
    return _features(pooled, getattr(clip, "visual_projection", None))


def vision_parts(clip: Clip) -> tuple[list[nn.Module], list[nn.Module]]:
    """What the vision tower runs pictures through, in order: what is before its blocks, and these.

    Only CLIP has a norm before its blocks.
    """
    vision: Any = clip.vision_model
    norm = getattr(vision, "pre_layrnorm", None)
    before = [vision.embeddings] if norm is None else [vision.embeddings, norm]
    return before, list(vision.encoder.layers)


def first_blocks(clip: Clip, pixels: Tensor, count: int) -> Tensor:
    """What the first blocks of the vision tower give: (n, 3, H, W) float -> (n, tokens, width)."""
    before, blocks = vision_parts(clip)
    hidden = pixels
    for part in before:
        hidden = part(hidden)
    for block in blocks[:count]:
        hidden = block(hidden, None)
    return hidden


def features_after(clip: Clip, hidden: Tensor, count: int) -> Tensor:
    """The rest of :func:`image_features`, from what :func:`first_blocks` gave: (n, dim)."""
    vision: Any = clip.vision_model
    for block in vision_parts(clip)[1][count:]:
        hidden = block(hidden, None)
    if clip.config.model_type == "siglip":
        return _features(vision.head(vision.post_layernorm(hidden)), None)
    return _features(vision.post_layernorm(hidden[:, 0]), clip.visual_projection)


def text_features(clip: Clip, tokens: Mapping[str, Tensor]) -> Tensor:
    """Normalised text features: from :func:`tokenise`, (prompts, length) -> (prompts, dim)."""
    pooled = clip.text_model(**tokens).pooler_output
    return _features(pooled, getattr(clip, "text_projection", None))


def _features(pooled: Tensor | None, projection: Any) -> Tensor:
    if pooled is None:
        raise FedloraError(f"the model {_NO_HEAD}")
    # SigLIP has no projections: its towers' heads end in the shared space.
    return normalize(pooled if projection is None else projection(pooled), dim=-1)


def feature_dim(clip: Clip) -> int:
    """The width of the features that images and texts share."""
    projection: Any = getattr(clip, "visual_projection", None)
    vision: Any = clip.config.vision_config
    return int(vision.hidden_size if projection is None else projection.out_features)


def logit_scale(clip: Clip) -> float:
    """What cosines are multiplied by, the exponential of the trained parameter."""
    # SigLIP's logit_bias is left out: the same for every class, it cancels in a softmax.
    return float(clip.logit_scale.detach().exp())


def tokenise(clip: Clip, tokenizer: Tokenizer, prompts: list[str]) -> dict[str, Tensor]:
    """What the text tower takes, as it was trained: (prompts, length) int64 each.

    CLIP: padded to the longest prompt, with a mask. SigLIP: lower-cased, padded to the full length.
    """
    text: Any = clip.config.text_config
    options: dict[str, Any] = {"padding": "longest"}
    names = ["input_ids", "attention_mask"]
    if clip.config.model_type == "siglip":
        # The tower attends both ways, without a mask, and pools the last position: the padding is
        # part of what it reads. Gemma's tokenizer (SigLIP 2) pads left unless its folder says
        # otherwise, and keeps capitals.
        options = {"padding": "max_length", "padding_side": "right"}
        names = ["input_ids"]
        prompts = [prompt.lower() for prompt in prompts]
    options |= {"truncation": True, "max_length": text.max_position_embeddings}
    encoded = tokenizer(prompts, return_tensors="pt", **options)
    return {name: encoded[name] for name in names}


def has_text_tower(clip: Clip) -> bool:
    """Whether the text tower is still there."""
    return hasattr(clip, "text_model")


def drop_text_tower(clip: Clip) -> None:
    """Delete the text tower and its projection, to save memory."""
    for name in ("text_model", "text_projection"):
        if hasattr(clip, name):
            delattr(clip, name)
    if clip.config.model_type == "siglip":
        # SiglipModel looks into its text tower for this where gradient checkpointing is enabled.
        clip.get_input_embeddings = clip.vision_model.get_input_embeddings  # type: ignore[method-assign]


def vision_only(clip: Clip, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """The vision half as a model of its own, for saving: transformers loads it as it is.

    Args:
        clip: the whole model, of which only the config is read.
        weights: tensors by their names in the whole model; those of the text half are ignored.
    """
    from transformers import CLIPVisionModelWithProjection, SiglipVisionModel

    config: Any = copy(clip.config.vision_config)
    vision: PreTrainedModel
    if clip.config.model_type == "siglip":
        vision = SiglipVisionModel(config)
    else:
        config.projection_dim = clip.config.projection_dim  # some folders say it only once
        vision = CLIPVisionModelWithProjection(config)
    # Between transformers 5.0 and 5.23 SiglipVisionModel lost the prefix of its names.
    whole = {n: n if n in weights else f"vision_model.{n}" for n in vision.state_dict()}
    vision.load_state_dict({name: weights[source] for name, source in whole.items()})
    return vision
