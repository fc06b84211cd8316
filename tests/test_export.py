"""What is exported loads with the libraries it is meant for, without a warning, and says the same.

Everything that is compared with our model is computed here with peft and transformers alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPModel, CLIPVisionModelWithProjection

from fedlora.export import export_adapter
from fedlora.modules.clip_wrapper import CLIPLoRAWrapper
from fedlora.state import AdapterState, Residual
from tests.small_clip import NAMES, TEMPLATES, adapted, make_folder, pictures, shake

CLASSES = [CLIPModel, CLIPVisionModelWithProjection]
# Raised by PEFT's constructor itself, about its own use of transformers, whatever it loads.
PEFT_OWN = "`is_gradient_checkpointing` is deprecated"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random CLIP on disk; never written to."""
    return make_folder(tmp_path_factory.mktemp("clip") / "small")


@contextmanager
def no_warning(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Any warning, or any logged one of peft or transformers, fails the test."""
    loggers = [logging.getLogger(name) for name in ("peft", "transformers")]
    before = [(logger.propagate, logger.level) for logger in loggers]
    for logger in loggers:
        logger.propagate = True
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", PEFT_OWN)
            yield
    finally:
        for logger, (propagate, level) in zip(loggers, before, strict=True):
            logger.propagate = propagate
            logger.setLevel(level)
    assert [record.getMessage() for record in caplog.records] == []


def load_peft(
    cls: Any, folder: Path, adapter: Path, caplog: pytest.LogCaptureFixture
) -> torch.nn.Module:
    base = cls.from_pretrained(folder)  # the vision half reports the text weights it leaves out
    caplog.clear()
    with no_warning(caplog):
        return PeftModel.from_pretrained(base, adapter).eval()


@torch.no_grad()
def image_features(model: Any, pixels: Tensor) -> Tensor:
    pooled = model.vision_model(pixel_values=pixels).pooler_output
    return normalize(model.visual_projection(pooled), dim=-1)


@torch.no_grad()
def text_features(model: Any, folder: Path) -> Tensor:
    """One prompt at a time, averaged over templates: (classes, dim)."""
    tokenizer, features = AutoTokenizer.from_pretrained(folder), []
    for name in NAMES:
        each = []
        for template in TEMPLATES:
            ids = tokenizer(template.format(name), return_tensors="pt")["input_ids"]
            pooled = model.text_model(input_ids=ids).pooler_output
            each.append(normalize(model.text_projection(pooled), dim=-1))
        features.append(normalize(torch.cat(each).mean(0), dim=0))
    return torch.stack(features)


@torch.no_grad()
def our_features(lora: CLIPLoRAWrapper) -> Tensor:
    return lora.classifier.eval().encode_image(pixels())


def pixels() -> Tensor:
    return torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def residuals(lora: CLIPLoRAWrapper, kind: str) -> dict[str, Residual]:
    """In one layer none, in the others thin, of full rank, or both by turns."""
    generator, made = torch.Generator().manual_seed(3), {}
    for i, (name, W) in enumerate(list(lora.base_weights().items())[1:]):
        out_features, in_features = W.shape
        if kind == "thin" or (kind == "mixed" and i % 2):
            U = 0.2 * torch.randn(out_features, 2, generator=generator)
            made[name] = Residual(U, torch.randn(2, in_features, generator=generator))
        else:
            made[name] = Residual(0.2 * torch.randn(W.shape, generator=generator))
    return made


def trained(folder: Path, residual: str = "", **settings: Any) -> CLIPLoRAWrapper:
    """An adapter far from its start, with a residual beside it where ``residual`` names a kind."""
    lora = adapted(folder, **settings)
    untrained = our_features(lora)
    shake(lora)
    if residual:
        lora.serve(residuals(lora, residual))
    assert (our_features(lora) - untrained).abs().max() > 0.01
    return lora


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"placement": "all", "layers": [-1]},
        {"use_rslora": True, "r": 5},
        {"bias": "lora_only"},
        {"bias": "all", "placement": "attention"},
        {"residual": "thin"},
        {"residual": "dense"},
        {"residual": "mixed", "placement": "all", "use_rslora": True},
        {"residual": "thin", "bias": "all"},
        {"lora_dropout": 0.5},
        {"head": "text"},
    ],
    ids=str,
)
def test_peft_loads_the_adapter_without_a_warning(
    cls: Any,
    settings: dict[str, Any],
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lora = trained(folder, **settings)
    export_adapter(tmp_path / "adapter", lora, lora.state(), {})
    model = load_peft(cls, folder, tmp_path / "adapter", caplog)
    features = image_features(model, pixels())
    torch.testing.assert_close(features, our_features(lora), atol=1e-5, rtol=0)
    # Merged into the base, as it would be deployed, it is the same again.
    merged = image_features(model.merge_and_unload(), pixels())
    torch.testing.assert_close(merged, features, atol=1e-5, rtol=0)


@pytest.mark.parametrize("residual", ["", "mixed"])
@pytest.mark.parametrize("bias", ["none", "all"])
def test_both_towers(
    residual: str, bias: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lora = trained(folder, residual, head="text", towers="both", placement="all", bias=bias)
    export_adapter(tmp_path / "adapter", lora, lora.state(), {})
    model = load_peft(CLIPModel, folder, tmp_path / "adapter", caplog)
    images, text = image_features(model, pixels()), text_features(model, folder)
    untrained = text_features(CLIPModel.from_pretrained(folder), folder)
    assert (text - untrained).abs().max() > 0.01
    torch.testing.assert_close(images, our_features(lora), atol=1e-5, rtol=0)
    scale = json.loads((tmp_path / "adapter/fedlora.json").read_text())["logit_scale"]
    with torch.no_grad():
        logits = lora.classifier(pixels())
    torch.testing.assert_close(scale * images @ text.T, logits, atol=1e-4, rtol=1e-4)


def test_classifier_and_adapter_make_the_logits(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lora = trained(folder, "mixed")
    export_adapter(tmp_path / "adapter", lora, lora.state(), {})
    model = load_peft(CLIPVisionModelWithProjection, folder, tmp_path / "adapter", caplog)
    told = json.loads((tmp_path / "adapter/fedlora.json").read_text())["preprocessing"]
    mean, std = (torch.tensor(told[name]).view(3, 1, 1) for name in ("mean", "std"))
    head = load_file(tmp_path / "adapter/classifier.safetensors")
    assert set(head) == {"weight", "bias"}
    features = image_features(model, (pictures(8) / 255 - mean) / std)
    logits = features @ head["weight"].T + head["bias"]
    with torch.no_grad():
        ours = lora.classifier.eval()(pictures(8))
    torch.testing.assert_close(logits, ours, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(
    transformers.__version__.startswith("5.0."),
    reason="transformers 5.0 does not find PEFT's names in load_adapter; PEFT itself does",
)
def test_transformers_loads_the_adapter_too(folder: Path, tmp_path: Path) -> None:
    lora = trained(folder, "thin")
    export_adapter(tmp_path / "adapter", lora, lora.state(), {})
    model = CLIPModel.from_pretrained(folder).eval()
    model.load_adapter(str(tmp_path / "adapter"))
    features = image_features(model.eval(), pixels())
    torch.testing.assert_close(features, our_features(lora), atol=1e-5, rtol=0)


def test_what_is_written_is_the_given_adapter(folder: Path, tmp_path: Path) -> None:
    lora = adapted(folder, r=4)
    state = lora.state()
    given = AdapterState(
        {n: torch.full_like(t, 2) for n, t in state.A.items()},
        {n: torch.full_like(t, 3) for n, t in state.B.items()},
        {n: torch.full_like(t, 4) for n, t in state.other.items()},
        state.scaling,
    )
    export_adapter(tmp_path / "adapter", lora, given, {})
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(tensors) == 8
    for name, tensor in tensors.items():
        assert name.startswith("base_model.model.vision_model.encoder.layers.")
        assert (tensor == (2 if "lora_A" in name else 3)).all()
    head = load_file(tmp_path / "adapter/classifier.safetensors")
    assert all((tensor == 4).all() for tensor in head.values())


@pytest.mark.parametrize("kind", ["thin", "dense"])
def test_the_product_in_the_file_is_all_that_is_served(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    lora = trained(folder, kind, use_rslora=True)
    export_adapter(tmp_path / "adapter", lora, lora.state(), {})
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    state, pristine = lora.state(), adapted(folder).base_weights()
    for name, W0 in pristine.items():
        prefix = f"base_model.model.{name}"
        A, B = (tensors[f"{prefix}.lora_{factor}.weight"] for factor in "AB")
        assert A.shape[0] == B.shape[1] == config["r"]
        served = 6 / 3**0.5 * state.B[name] @ state.A[name]  # rsLoRA: alpha / sqrt(r)
        if name in state.residual:
            served = served + state.residual[name].dense()
        torch.testing.assert_close(config["lora_alpha"] / config["r"] * B @ A, served)
        assert W0.shape == served.shape
    if kind == "thin":
        assert config["r"] == 3 + 2


def test_the_configs_say_what_it_is(folder: Path, tmp_path: Path) -> None:
    lora = trained(folder, r=3, lora_alpha=6)
    export_adapter(tmp_path / "adapter", lora, lora.state(), {"round": 7, "rule": "FedAvg"})
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 6)
    assert config["base_model_name_or_path"] == str(folder)
    assert sorted(config["target_modules"]) == sorted(lora.layers)
    told = json.loads((tmp_path / "adapter/fedlora.json").read_text())
    assert (told["round"], told["rule"]) == (7, "FedAvg")
    assert (told["class_names"], told["templates"]) == (NAMES, TEMPLATES)
    assert (told["head"], told["towers"]) == ("linear", "vision")
    assert told["base_model_sha256"] == lora.classifier.base_sha256
    assert told["preprocessing"]["size"] == 16
    assert told["lora"]["r"] == 3


@pytest.mark.parametrize("settings", [{}, {"enabled": False}, {"head": "text"}], ids=str)
def test_the_hashes_are_those_of_all_other_files(
    settings: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    lora = trained(folder, **settings)
    export_adapter(tmp_path / "adapter", lora, lora.state(), {})
    root = tmp_path / "adapter"
    files = {str(p.relative_to(root)): p for p in root.rglob("*") if p.is_file()}
    told = json.loads(files.pop("fedlora.json").read_text())["sha256"]
    assert told == {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in files.items()}
    assert ("classifier.safetensors" in told) == (settings.get("head") != "text")
    assert any(name.endswith("model.safetensors") for name in told)


@pytest.mark.parametrize(
    ("towers", "cls"), [("vision", CLIPVisionModelWithProjection), ("both", CLIPModel)]
)
def test_without_lora_the_model_loads_with_transformers_alone(
    towers: str, cls: Any, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head = "text" if towers == "both" else "linear"
    lora = adapted(folder, head=head, towers=towers, enabled=False)
    untrained = lora.state()
    shake(lora, size=0.02)
    given = lora.state()
    lora.load(untrained)  # what is written is what is given, not what the model holds
    export_adapter(tmp_path / "adapter", lora, given, {})
    lora.load(given)
    assert not (tmp_path / "adapter/adapter_config.json").exists()
    with no_warning(caplog):
        model = cls.from_pretrained(tmp_path / "adapter/model").eval()
    torch.testing.assert_close(
        image_features(model, pixels()), our_features(lora), atol=1e-5, rtol=0
    )
    if towers == "both":
        with torch.no_grad():
            ours = lora.classifier.encode_text(lora.classifier._tokenize())
        torch.testing.assert_close(text_features(model, folder), ours, atol=1e-5, rtol=0)


def test_without_lora_from_a_folder_that_names_its_width_once(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Both sub-configs may lack ``projection_dim``; CLIPModel itself reads that of the whole."""
    base = make_folder(tmp_path / "clip")
    config = json.loads((base / "config.json").read_text())
    del config["vision_config"]["projection_dim"], config["text_config"]["projection_dim"]
    (base / "config.json").write_text(json.dumps(config))
    lora = adapted(base, enabled=False)
    export_adapter(tmp_path / "adapter", lora, lora.state(), {})
    with no_warning(caplog):
        model = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "adapter/model").eval()
    torch.testing.assert_close(
        image_features(model, pixels()), our_features(adapted(folder)), atol=1e-5, rtol=0
    )


def test_an_adapter_folder_is_replaced_as_a_whole(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    for leftover in (target, tmp_path / "adapter.tmp", tmp_path / "adapter.old"):
        leftover.mkdir()
        (leftover / "stale.txt").write_text("from before")
    for number in (1, 2):
        lora = adapted(folder)
        export_adapter(target, lora, lora.state(), {"round": number})
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
        assert sorted(path.name for path in target.iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "classifier.safetensors",
            "fedlora.json",
        ]
        assert json.loads((target / "fedlora.json").read_text())["round"] == number


def test_a_failing_export_leaves_the_old_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = adapted(folder)
    export_adapter(tmp_path / "adapter", lora, lora.state(), {"round": 1})
    monkeypatch.setattr("fedlora.export.asdict", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_adapter(tmp_path / "adapter", lora, lora.state(), {"round": 2})
    assert json.loads((tmp_path / "adapter/fedlora.json").read_text())["round"] == 1
