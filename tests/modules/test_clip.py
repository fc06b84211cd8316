from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPModel

from fedlora.data.templates import DEFAULT_TEMPLATES
from fedlora.errors import FedloraError
from fedlora.modules import clip, families
from fedlora.modules.clip import FederatedCLIPModel
from fedlora.modules.recomputation import set_gradient_checkpointing
from tests.runs import fit
from tests.small_clip import DIM, NAMES, TEMPLATES, VISION, pictures


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Eight normalised pictures, (8, 3, 16, 16)."""
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def build(folder: Path, **settings: object) -> FederatedCLIPModel:
    settings = {"class_names": NAMES, "templates": TEMPLATES} | settings
    return FederatedCLIPModel(str(folder), **settings).eval()  # type: ignore[arg-type]


@torch.no_grad()
def by_transformers(folder: Path, images: Tensor, template: str) -> Tensor:
    """CLIP's own logits, its prompts padded to the full 32 tokens."""
    prompts = [template.format(name) for name in NAMES]
    tokens = AutoTokenizer.from_pretrained(folder)(
        prompts, padding="max_length", max_length=32, return_tensors="pt"
    )
    return CLIPModel.from_pretrained(folder).eval()(pixel_values=images, **tokens).logits_per_image


@pytest.mark.parametrize("template", [*TEMPLATES, *DEFAULT_TEMPLATES])
@pytest.mark.parametrize("head", ["text", "linear"])
@pytest.mark.parametrize("keep", [True, False])
@torch.no_grad()
def test_one_template_gives_the_logits_of_clip(
    folder: Path, images: Tensor, template: str, head: str, keep: bool
) -> None:
    model = build(folder, head=head, templates=[template], keep_text_tower=keep)
    assert model.has_text_tower == keep
    expected = by_transformers(folder, images, template)
    torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-4)
    assert expected.std(0).min() > 1e-3  # the pictures do differ


@torch.no_grad()
def test_the_prompts_of_a_class_are_averaged(folder: Path, images: Tensor) -> None:
    clip = CLIPModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = []
    for name in NAMES:  # one prompt at a time: no padding at all
        each = []
        for template in TEMPLATES:
            ids = tokenizer(template.format(name), return_tensors="pt")["input_ids"]
            pooled = clip.text_model(input_ids=ids).pooler_output
            each.append(normalize(clip.text_projection(pooled), dim=-1)[0])
        text.append(normalize(torch.stack(each).mean(0), dim=0))
    pooled = clip.vision_model(pixel_values=images).pooler_output
    features = normalize(clip.visual_projection(pooled), dim=-1)
    expected = clip.logit_scale.exp() * features @ torch.stack(text).T
    for head in ("text", "linear"):
        torch.testing.assert_close(build(folder, head=head)(images), expected, atol=1e-4, rtol=1e-4)


def test_the_linear_head_starts_as_the_zero_shot_classifier(folder: Path, images: Tensor) -> None:
    linear, text = build(folder), build(folder, head="text")
    assert torch.equal(linear(images).argmax(1), text(images).argmax(1))
    assert linear.classifier is not None
    assert linear.classifier.weight.shape == (len(NAMES), DIM)
    assert linear.text_features is None
    assert text.classifier is None


def test_the_linear_head_starts_from_zeros_without_names(folder: Path, images: Tensor) -> None:
    model = build(folder, class_names=None, num_classes=5)
    assert torch.equal(model(images), torch.zeros(8, 5))
    assert model.num_classes == 5


@torch.no_grad()
def test_prompts_may_be_padded_to_the_longest_or_to_the_end(folder: Path) -> None:
    model = build(folder, head="text")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [t.format(name) for name in NAMES for t in TEMPLATES]
    full = tokenizer(prompts, padding="max_length", max_length=32, return_tensors="pt")
    tokens = model._tokenize()
    assert tokens["input_ids"].shape[1] < full["input_ids"].shape[1] == 32
    assert set(tokens["attention_mask"].sum(1).tolist()) != {tokens["input_ids"].shape[1]}
    torch.testing.assert_close(
        model.encode_text(tokens), model.encode_text(dict(full)), atol=1e-5, rtol=1e-5
    )


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of prompts of each pass through the text tower."""
    seen: list[int] = []
    whole = families.text_features

    def counted(clip: Any, tokens: Any) -> Tensor:
        seen.append(len(tokens["input_ids"]))
        return whole(clip, tokens)

    monkeypatch.setattr(families, "text_features", counted)
    return seen


def test_many_prompts_are_encoded_in_parts_where_no_gradient_is_needed(
    folder: Path, images: Tensor, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {head: build(folder, head=head, keep_text_tower=False) for head in ("linear", "text")}
    assert passes == [6, 6]  # 3 classes in 2 templates
    monkeypatch.setattr(clip, "PROMPTS_AT_ONCE", 4)
    for head, model in whole.items():  # a class's two prompts fall into one part or two
        passes.clear()
        parts = build(folder, head=head, keep_text_tower=False)
        assert passes == [4, 2]
        torch.testing.assert_close(parts(images), model(images))
    passes.clear()
    model = build(folder, head="text")
    model(images).sum().backward()
    assert passes == [6]
    with torch.no_grad():
        model(images)
    assert passes == [6, 4, 2]


@pytest.mark.parametrize("head", ["text", "linear"])
def test_a_run_encodes_its_prompts_once(tmp_path: Path, passes: list[int], head: str) -> None:
    fit(tmp_path, max_rounds=2, limit_train_batches=1, model={"head": head})
    assert len(passes) == 1


@torch.no_grad()
def test_underscores_of_class_names_are_spaces_in_prompts(folder: Path) -> None:
    names = ["golden_retriever", "a__b", "tram"]
    model = build(folder, class_names=names, head="text")
    assert model.class_names == names
    assert model.describe()["class_names"] == names
    spaced = build(folder, class_names=["golden retriever", "a  b", "tram"], head="text")
    assert torch.equal(model._tokenize()["input_ids"], spaced._tokenize()["input_ids"])
    kept = build(folder, class_names=["golden-retriever", "a--b", "tram"], head="text")
    assert not torch.equal(model._tokenize()["input_ids"], kept._tokenize()["input_ids"])


def test_underscores_of_templates_stay(folder: Path) -> None:
    one, other = (build(folder, templates=[t])._tokenize() for t in ("a_{}", "a {}"))
    assert not torch.equal(one["input_ids"], other["input_ids"])


def test_a_prompt_that_is_too_long_is_cut(folder: Path, images: Tensor) -> None:
    model = build(folder, head="text", class_names=["a", "very " * 100])
    assert model(images).isfinite().all()


def test_without_its_text_tower_the_model_still_works(folder: Path, images: Tensor) -> None:
    whole, small = build(folder), build(folder, keep_text_tower=False)
    assert not any(name.startswith("clip.text_model") for name in small.state_dict())
    assert torch.equal(whole(images), small(images))
    assert small.base_sha256 == whole.base_sha256


@torch.no_grad()
def test_pixels_are_normalised_inside(folder: Path) -> None:
    model, pixels = build(folder), pictures()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    expected = model((pixels / 255 - mean) / std)
    torch.testing.assert_close(model(pixels), expected, atol=1e-4, rtol=1e-4)


def test_image_features_have_length_one(folder: Path, images: Tensor) -> None:
    features = build(folder).encode_image(images)
    assert features.shape == (8, DIM)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(8))


def test_checkpointing_can_be_switched_on_and_off(folder: Path, images: Tensor) -> None:
    model = build(folder).train()
    calls: list[int] = []
    fc1 = model.clip.vision_model.encoder.layers[0].mlp.fc1
    fc1.register_forward_hook(lambda *_: calls.append(VISION))

    def count() -> int:
        calls.clear()
        model(images).sum().backward()
        return len(calls)

    assert count() == 1
    set_gradient_checkpointing(model, True)
    assert count() == 2
    model.eval()
    assert count() == 1  # nothing to save where there is no training
    set_gradient_checkpointing(model.train(), False)
    assert count() == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_names": None}, "num_classes is needed where there are no class_names"),
        ({"num_classes": 4}, "num_classes is 4 but there are 3 class names"),
        ({"class_names": None, "num_classes": 3, "head": "text"}, "the text head needs"),
        ({"class_names": None, "num_classes": 0}, "num_classes must be at least 2, got 0"),
        ({"class_names": []}, "num_classes must be at least 2, got 0"),
        ({"head": "linaer"}, "head should be one of linear, text but got 'linaer'"),
        ({"templates": []}, "templates must be a list of at least one prompt"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, object], message: str) -> None:
    with pytest.raises(FedloraError, match=message):
        build(Path("/never/read"), **settings)
