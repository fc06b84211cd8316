"""Every function against transformers' own forward, called as its documentation says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, CLIPModel, SiglipConfig, SiglipModel

from fedlora.data.preprocess import ImagePreprocess
from fedlora.errors import FedloraError
from fedlora.modules import families
from fedlora.modules.loading import load_clip, load_preprocess_config, load_tokenizer
from tests.small_siglip import LENGTH, make_siglip

FAMILIES = ["clip", "siglip", "siglip2"]
PROMPTS = ["a photo of the digit zero", "a very round two", "seven"]
# What a model of no particular use needs set to stay small.
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LONG = " ".join(["three four five six seven eight nine"] * 6)


@dataclass
class Whole:
    """A model and what transformers makes of three pictures and ``PROMPTS``."""

    folder: Path
    model: Any
    tokenizer: Any
    inputs: dict[str, Tensor]
    outputs: Any


def pictures() -> list[Image.Image]:
    """Three pictures of 45 x 30: noise over a ramp."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 30, 45, 3))
    ramp = np.linspace(0, 255, 45)[:, None]
    return [Image.fromarray(pixels) for pixels in ((noise + ramp) / 2).astype(np.uint8)]


def how(family: str) -> dict[str, Any]:
    """How the documentation has prompts padded."""
    return (
        {"padding": True} if family == "clip" else {"padding": "max_length", "max_length": LENGTH}
    )


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def whole(family: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    if family != "clip":
        folder = make_siglip(tmp_path_factory.mktemp(family) / "small", gemma=family == "siglip2")
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(text=PROMPTS, images=pictures(), return_tensors="pt", **how(family))
    # As the documentation loads it; what is tested comes from our loader.
    model = (CLIPModel if family == "clip" else SiglipModel).from_pretrained(folder)
    with torch.no_grad():
        outputs = model(**inputs)
    ours, name = load_clip(str(folder)), str(folder)
    return Whole(folder, ours, load_tokenizer(name), dict(inputs), outputs)


def test_tokens_are_the_processors(whole: Whole, family: str) -> None:
    ours = families.tokenise(whole.model, whole.tokenizer, PROMPTS)
    assert ours.keys() == whole.inputs.keys() - {"pixel_values"}
    assert all(torch.equal(tokens, whole.inputs[name]) for name, tokens in ours.items())
    assert ("attention_mask" in ours) == (family == "clip")
    assert (ours["input_ids"].shape[1] == LENGTH) == (family != "clip")


def test_long_prompts_are_cut_as_the_processor_does(whole: Whole) -> None:
    limit = whole.model.config.text_config.max_position_embeddings
    processor = AutoProcessor.from_pretrained(whole.folder)
    theirs = processor(
        text=[LONG], padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
    )
    ours = families.tokenise(whole.model, whole.tokenizer, [LONG])["input_ids"]
    assert len(whole.tokenizer(LONG)["input_ids"]) > limit
    assert torch.equal(ours, theirs["input_ids"])


def test_capitals_make_no_difference(whole: Whole) -> None:
    # CLIP's tokenizer lower-cases by itself, so does SigLIP's, and Gemma's does not.
    upper = families.tokenise(whole.model, whole.tokenizer, [PROMPTS[0].upper()])["input_ids"]
    lower = families.tokenise(whole.model, whole.tokenizer, [PROMPTS[0]])["input_ids"]
    assert torch.equal(upper, lower)


@pytest.mark.parametrize("kind", ["GemmaTokenizer", "Siglip2Tokenizer"])
def test_siglip_is_padded_right_whatever_its_tokenizer_would_do(kind: str, tmp_path: Path) -> None:
    folder = make_siglip(tmp_path / "siglip2", gemma=True)
    model = load_clip(str(folder))
    expected = families.tokenise(model, load_tokenizer(str(folder)), PROMPTS)["input_ids"]
    assert expected[2, -4:].tolist() == [0] * 4  # <pad>
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    # What transformers 5.23 takes where the folder says nothing.
    file.write_text(json.dumps(config | {"tokenizer_class": kind, "padding_side": "left"}))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.padding_side == "left"
    assert torch.equal(families.tokenise(model, tokenizer, PROMPTS)["input_ids"], expected)


def test_a_tokenizer_of_spiece_model_alone(tmp_path: Path) -> None:
    folder = make_siglip(tmp_path / "siglip")
    model, name = load_clip(str(folder)), str(folder)
    expected = families.tokenise(model, load_tokenizer(name), PROMPTS)["input_ids"]
    (folder / "tokenizer_config.json").unlink()
    assert torch.equal(
        families.tokenise(model, load_tokenizer(name), PROMPTS)["input_ids"], expected
    )


def test_a_missing_package_of_siglips_tokenizer_is_named(tmp_path: Path) -> None:
    """A process of its own, where sentencepiece cannot be imported."""
    folder = make_siglip(tmp_path / "siglip")
    script = f"""if True:
        import sys

        sys.modules["sentencepiece"] = None
        from fedlora.errors import FedloraError
        from fedlora.modules import families, loading

        assert "transformers" not in sys.modules  # seconds that `fedlora --help` need not wait
        try:
            loading.load_tokenizer({str(folder)!r})
        except FedloraError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    needs = f"model_name {str(folder)!r}: its tokenizer needs sentencepiece."
    assert done.stdout == f"{needs} Run: python -m pip install sentencepiece\n"


@torch.no_grad()
def test_features_are_those_of_the_full_forward(whole: Whole) -> None:
    image = families.image_features(whole.model, whole.inputs["pixel_values"])
    tokens = families.tokenise(whole.model, whole.tokenizer, PROMPTS)
    text = families.text_features(whole.model, tokens)
    torch.testing.assert_close(image, whole.outputs.image_embeds)
    torch.testing.assert_close(text, whole.outputs.text_embeds)
    assert image.shape == text.shape == (3, families.feature_dim(whole.model))
    assert image.std(0).max() > 0.01  # pictures differ, and prompts
    assert text.std(0).max() > 0.01


@torch.no_grad()
def test_the_logit_scale_gives_the_softmax_of_the_full_forward(whole: Whole, family: str) -> None:
    scale = families.logit_scale(whole.model)
    image = families.image_features(whole.model, whole.inputs["pixel_values"])
    tokens = families.tokenise(whole.model, whole.tokenizer, PROMPTS)
    logits = scale * image @ families.text_features(whole.model, tokens).T
    theirs = whole.outputs.logits_per_image
    torch.testing.assert_close(logits.softmax(-1), theirs.softmax(-1), atol=1e-5, rtol=1e-5)
    bias = 0.0 if family == "clip" else -10.0  # what small_siglip sets: it cancels in the softmax
    torch.testing.assert_close(logits + bias, theirs, atol=1e-4, rtol=1e-5)


def test_preprocessing_is_the_processors_within_two_steps_of_255(whole: Whole) -> None:
    ours = ImagePreprocess.from_config(load_preprocess_config(str(whole.folder)))
    batch = torch.stack([torch.from_numpy(np.array(image)) for image in pictures()])
    pixels = ours.normalise(ours.resize(batch.permute(0, 3, 1, 2)))
    theirs = whole.inputs["pixel_values"]
    assert pixels.shape == theirs.shape == (3, 3, 16, 16)
    steps = (pixels - theirs).abs() * torch.tensor(ours.std).view(3, 1, 1) * 255
    assert steps.max() < 2.01


def test_the_class_of_a_model_type(whole: Whole) -> None:
    assert families.model_class(whole.model.config.model_type) is type(whole.model)
    assert whole.model.config.model_type in families.SUPPORTED
    families.check(whole.model.config, "it")


def test_what_is_supported_is_named() -> None:
    assert families.SUPPORTED_TEXT == ("CLIP (clip), SigLIP and fixed-resolution SigLIP 2 (siglip)")


def test_what_counts_as_a_clip() -> None:
    assert {kind.__name__ for kind in families.backbone_classes()} == {
        "CLIPModel",
        "CLIPVisionModel",
        "CLIPVisionModelWithProjection",
        "SiglipModel",
        "SiglipVisionModel",
    }


@torch.no_grad()
def test_without_its_text_tower_a_model_sees_as_before(whole: Whole) -> None:
    model = load_clip(str(whole.folder))
    assert families.has_text_tower(model)
    families.drop_text_tower(model)
    assert not families.has_text_tower(model)
    assert not [name for name, _ in model.named_parameters() if name.startswith("text")]
    image = families.image_features(model, whole.inputs["pixel_values"])
    torch.testing.assert_close(image, whole.outputs.image_embeds)
    assert families.feature_dim(model) == image.shape[1]


def test_without_its_text_tower_a_model_can_recompute_activations(whole: Whole) -> None:
    gradients = []
    for recompute in (False, True):
        model: Any = load_clip(str(whole.folder))
        families.drop_text_tower(model)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        families.image_features(model, whole.inputs["pixel_values"])[0, 0].backward()
        gradients.append(model.vision_model.encoder.layers[0].mlp.fc1.weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


@torch.no_grad()
@pytest.mark.parametrize("dropped", [False, True])
def test_the_vision_half_alone(dropped: bool, whole: Whole, family: str, tmp_path: Path) -> None:
    """Saved and loaded as anybody would, it gives the features of the given weights."""
    from transformers import AutoModel, CLIPVisionModelWithProjection

    model = load_clip(str(whole.folder))
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.state_dict().items()
    }
    other = families.model_class(model.config.model_type)(model.config).eval()
    other.load_state_dict(weights)
    expected = other(**whole.inputs).image_embeds
    if dropped:
        families.drop_text_tower(model)
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("text")}
    before = {name: tensor.clone() for name, tensor in weights.items()}
    families.vision_only(model, weights).save_pretrained(tmp_path)
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items())
    kind = CLIPVisionModelWithProjection if family == "clip" else AutoModel
    vision, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    found = vision(pixel_values=whole.inputs["pixel_values"])
    features = found.image_embeds if family == "clip" else found.pooler_output
    torch.testing.assert_close(torch.nn.functional.normalize(features, dim=-1), expected)


def test_a_projection_width_that_the_vision_config_lacks(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy/config.json"
    config = json.loads(file.read_text())
    del config["vision_config"]["projection_dim"]
    file.write_text(json.dumps(config))
    model = load_clip(str(tmp_path / "copy"))
    vision: Any = families.vision_only(model, model.state_dict())
    assert vision.visual_projection.out_features == 20
    assert model.config.vision_config.projection_dim != 20  # the model's own config is left alone


def test_a_siglip_without_a_pooling_head_is_refused() -> None:
    config = SiglipConfig(
        text_config=dict.fromkeys(SIZES, 8), vision_config=dict.fromkeys(SIZES, 8)
    )
    config.vision_config.vision_use_head = False
    with pytest.raises(
        FedloraError, match=r"^mine has no pooling head .* Choose a model that has one"
    ):
        families.check(config, "mine")
    with pytest.raises(FedloraError, match=r"^the model has no pooling head"):
        families.image_features(SiglipModel(config), torch.zeros(1, 3, 224, 224))
