"""The embedded model loads like any CLIP folder and knows digits it was never trained on."""

from __future__ import annotations

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import logging
import warnings
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, CLIPModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

FOLDER = Path(__file__).resolve().parents[2] / "src/fedlora/assets/tiny_clip"
MAX_BYTES = 8 * 2**20
FEATURES = 64
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a photo of the digit {}.",
    "the number {}.",
    "a blurry picture of the digit {}.",
    "a low resolution image of the digit {}.",
)


def pooled_text(model: CLIPModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return projected text features (texts, 64)."""
    with torch.no_grad():
        hidden = model.text_model(input_ids=ids, attention_mask=mask).pooler_output
        return model.text_projection(hidden)


@pytest.fixture(scope="module")
def model() -> CLIPModel:
    """The embedded model, in evaluation mode."""
    return CLIPModel.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """The embedded tokenizer."""
    return AutoTokenizer.from_pretrained(FOLDER)


def test_folder_is_complete_and_small() -> None:
    names = {p.name for p in FOLDER.iterdir()}
    assert {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= names
    assert sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()) <= MAX_BYTES


def test_loads_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    transformers_logging.enable_propagation()
    try:
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error")
            _, info = CLIPModel.from_pretrained(FOLDER, output_loading_info=True)
            AutoTokenizer.from_pretrained(FOLDER)
    finally:
        transformers_logging.disable_propagation()
    assert not any(info.values())
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_projection_dim_is_written_three_times() -> None:
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    parts = (config, config["text_config"], config["vision_config"])
    assert [part["projection_dim"] for part in parts] == [FEATURES] * 3


def test_special_ids_agree(model: CLIPModel, tokenizer: PreTrainedTokenizerBase) -> None:
    text = model.config.text_config
    assert tokenizer.is_fast
    assert tokenizer.eos_token_id not in (None, 2)  # 2 selects a legacy way of pooling
    assert text.eos_token_id == tokenizer.eos_token_id == len(tokenizer) - 1
    assert text.bos_token_id == tokenizer.bos_token_id
    assert text.pad_token_id == tokenizer.pad_token_id
    assert text.vocab_size == len(tokenizer)
    assert text.max_position_embeddings == tokenizer.model_max_length == 32


@pytest.mark.parametrize("length", [None, 20, 32])
def test_pools_at_the_end_token_whatever_the_padding(
    model: CLIPModel, tokenizer: PreTrainedTokenizerBase, length: int | None
) -> None:
    texts = ["two", "a blurry picture of the digit seven."]
    alone = [pooled_text(model, tokenizer(t, return_tensors="pt")["input_ids"])[0] for t in texts]
    padding = "max_length" if length else True
    batch = tokenizer(texts, padding=padding, max_length=length, return_tensors="pt")
    for mask in (batch["attention_mask"], None):
        together = pooled_text(model, batch["input_ids"], mask)
        torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-4)
    hidden = model.text_model(**batch)
    ends = (batch["input_ids"] == tokenizer.eos_token_id).nonzero()
    assert ends[:, 0].tolist() == [0, 1]
    expected = hidden.last_hidden_state[ends[:, 0], ends[:, 1]]
    torch.testing.assert_close(hidden.pooler_output, expected)


@pytest.mark.parametrize(
    "text",
    ["a photo of the digit seven.", "ünïcödé", "日本語", "🦊👩‍🚀", "\x00\x7f\ttab\nline", "", " "],
)
def test_tokenizer_takes_any_text(
    model: CLIPModel, tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    ids = tokenizer(text, truncation=True)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in ids
    if len(ids) < tokenizer.model_max_length:
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text.strip()
    assert pooled_text(model, torch.tensor([ids])).isfinite().all()


def test_every_byte_has_a_token(tokenizer: PreTrainedTokenizerBase) -> None:
    every = "".join(map(chr, range(1, 0x3000))) + "".join(map(chr, range(0x1F300, 0x1F700)))
    ids = tokenizer(every, add_special_tokens=False)["input_ids"]
    restored = tokenizer.decode(ids)
    assert "\ufffd" not in restored
    assert len(ids) >= len(every) / 2


def test_long_text_is_cut_and_keeps_its_end(
    model: CLIPModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = tokenizer("seven " * 200, truncation=True, return_tensors="pt")["input_ids"]
    assert ids.shape == (1, 32)
    assert ids[0, -1] == tokenizer.eos_token_id
    assert pooled_text(model, ids).shape == (1, FEATURES)


def test_preprocessor_describes_the_pictures_of_the_model(model: CLIPModel) -> None:
    told = json.loads((FOLDER / "preprocessor_config.json").read_text(encoding="utf-8"))
    size = model.config.vision_config.image_size
    assert size == 32
    assert told["size"] == {"shortest_edge": size}
    assert told["crop_size"] == {"height": size, "width": size}
    assert told["resample"] == 3  # bicubic
    assert told["do_convert_rgb"] is True
    assert len(told["image_mean"]) == len(told["image_std"]) == 3


def test_zero_shot_on_handwritten_digits(
    model: CLIPModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    told = json.loads((FOLDER / "preprocessor_config.json").read_text(encoding="utf-8"))
    data = load_digits()  # 8x8, 0 to 16
    pixels = torch.tensor(data.images * 255 / 16).to(torch.uint8)  # (1797, 8, 8)
    pixels = pixels.unsqueeze(1).expand(-1, 3, -1, -1)
    pixels = functional.interpolate(pixels, size=(32, 32), mode="bicubic", antialias=True)
    mean = torch.tensor(told["image_mean"]).view(3, 1, 1)
    std = torch.tensor(told["image_std"]).view(3, 1, 1)
    with torch.no_grad():
        hidden = model.vision_model(pixel_values=(pixels / 255 - mean) / std).pooler_output
        images = functional.normalize(model.visual_projection(hidden), dim=-1)
    prompts = [template.format(digit) for digit in DIGITS for template in TEMPLATES]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    text = pooled_text(model, batch["input_ids"], batch["attention_mask"])
    text = functional.normalize(text, dim=-1).view(len(DIGITS), len(TEMPLATES), -1).mean(1)
    guess = (images @ functional.normalize(text, dim=-1).T).argmax(1)
    accuracy = (guess == torch.tensor(data.target)).float().mean().item()
    assert len(data.target) == 1797
    assert accuracy >= 0.70
