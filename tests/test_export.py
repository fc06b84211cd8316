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
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import (
    AutoTokenizer,
    CLIPModel,
    CLIPVisionModelWithProjection,
    SiglipModel,
    SiglipVisionModel,
)

from fedlora.export import export_adapter
from fedlora.modules.clip_wrapper import CLIPLoRAWrapper
from fedlora.modules.config import LoRAConfig
from fedlora.modules.lora import LoRAWrapper
from fedlora.modules.saved import load_adapter, read_adapter
from fedlora.state import AdapterState, Residual
from tests.small_clip import NAMES, TEMPLATES, TINY, adapted, make_folder, pictures, shake
from tests.small_models import OwnClip, SmallResNet
from tests.small_siglip import make_siglip

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
    return lora.federated.eval().encode_image(pixels())


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
        lora.served.serve(residuals(lora, residual))
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
        {"train_norm": True},
        {"train_norm": True, "bias": "lora_only", "residual": "thin"},
        {"train_norm": True, "bias": "all", "head": "text"},
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


@pytest.mark.parametrize("train_norm", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_peft_on_the_embedded_model(
    cls: Any, train_norm: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lora = adapted(TINY, train_norm=train_norm)
    shake(lora, size=0.05)
    export_adapter(tmp_path / "adapter", lora, lora.state(), {})
    told = json.loads((tmp_path / "adapter/fedlora.json").read_text())
    assert told["lora"]["train_norm"] is train_norm
    # Four blocks of two layers, one before and one after them, 128 wide; the head 64 x 3 + 3.
    assert told["counts"]["full"] == train_norm * 2 * 128 * (4 * 2 + 2) + 64 * 3 + 3
    model = load_peft(cls, TINY, tmp_path / "adapter", caplog)
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        ours = lora.federated.eval().encode_image(images)
    features = image_features(model, images)
    torch.testing.assert_close(features, ours, atol=1e-5, rtol=0)
    merged = lora.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged.encode_image(images), ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize("residual", ["", "mixed"])
@pytest.mark.parametrize("full", [{}, {"bias": "all"}, {"train_norm": True}], ids=str)
def test_both_towers(
    residual: str,
    full: dict[str, Any],
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lora = trained(folder, residual, head="text", towers="both", placement="all", **full)
    export_adapter(tmp_path / "adapter", lora, lora.state(), {})
    model = load_peft(CLIPModel, folder, tmp_path / "adapter", caplog)
    images, text = image_features(model, pixels()), text_features(model, folder)
    untrained = text_features(CLIPModel.from_pretrained(folder), folder)
    assert (text - untrained).abs().max() > 0.01
    torch.testing.assert_close(images, our_features(lora), atol=1e-5, rtol=0)
    scale = json.loads((tmp_path / "adapter/fedlora.json").read_text())["logit_scale"]
    with torch.no_grad():
        logits = lora.federated(pixels())
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
        ours = lora.federated.eval()(pictures(8))
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
    assert told["base_model_sha256"] == lora.federated.base_sha256
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
            ours = lora.federated.encode_text(lora.federated._tokenize())
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
    for leftover in (target, tmp_path / ".adapter.tmp", tmp_path / ".adapter.old"):
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
    monkeypatch.setattr("fedlora.export.sha256", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_adapter(tmp_path / "adapter", lora, lora.state(), {"round": 2})
    assert json.loads((tmp_path / "adapter/fedlora.json").read_text())["round"] == 1


# What is not ours.


def exported(target: Path, lora: LoRAWrapper) -> tuple[set[str], dict[str, Any]]:
    """The files in the folder, and what fedlora.json tells."""
    export_adapter(target, lora, lora.state(), {})
    names = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    return names, json.loads((target / "fedlora.json").read_text())


PEFT_FILES = {"adapter_config.json", "adapter_model.safetensors", "fedlora.json"}


@pytest.mark.parametrize("bias", ["none", "all"])
def test_an_object_of_somebody_elses_class(
    bias: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    thing = OwnClip(folder)
    config = LoRAConfig(r=3, lora_dropout=0.0, bias=bias)  # type: ignore[arg-type]
    lora = CLIPLoRAWrapper(thing, config).apply()
    shake(lora)
    files, told = exported(tmp_path / "adapter", lora)
    assert files == PEFT_FILES | {"other.safetensors"}
    head = load_file(tmp_path / "adapter/other.safetensors")
    assert set(head) == {"head.weight", "head.bias"}
    plain = OwnClip(folder)
    plain.backbone = load_peft(CLIPModel, folder, tmp_path / "adapter", caplog)
    plain.load_state_dict(head, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(plain(pixels()), thing(pixels()), atol=1e-4, rtol=1e-4)
    ours = adapted(folder, towers="both").federated
    assert told["base_model_sha256"] == ours.base_sha256
    assert told["base_model"] == str(folder)
    counts = told["counts"]
    assert counts["exchanged"] == sum(t.numel() for t in thing.lora_wrapper.exchanged().values())
    assert told["bytes"] == 4 * counts["exchanged"]
    assert counts["total"] == sum(p.numel() for p in OwnClip(folder).parameters())


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_resnet_in_peft_alone(
    residual: bool, bias: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Convolutions, and running statistics that moved in training."""
    model = SmallResNet()
    config = LoRAConfig(r=2, lora_alpha=6, lora_dropout=0.0, bias=bias)  # type: ignore[arg-type]
    lora = LoRAWrapper(model, config, targets=["conv", "block.conv"]).apply()
    shake(lora)
    images = torch.randn(5, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    model.train()(3 * images + 1)
    model.eval()
    if residual:
        lora.served.serve(residuals_of(lora))
    with torch.no_grad():
        expected = model(images)
    files, told = exported(tmp_path / "adapter", lora)
    assert files == PEFT_FILES | {"other.safetensors"} | (
        {"residual.safetensors"} if residual else set()
    )
    statistics = {f"{n}.running_{what}" for n in ("bn", "block.bn") for what in ("mean", "var")}
    assert set(load_file(tmp_path / "adapter/other.safetensors")) == statistics
    assert told["base_model"] == "SmallResNet"
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    r = 2 + 1 if residual else 2
    assert tensors["base_model.model.block.conv.lora_A.weight"].shape == (r, 8, 3, 3)
    assert tensors["base_model.model.block.conv.lora_B.weight"].shape == (8, r, 1, 1)
    caplog.clear()
    with no_warning(caplog):
        loaded = PeftModel.from_pretrained(SmallResNet(), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), expected, atol=1e-5, rtol=1e-5)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(images), expected, atol=1e-5, rtol=1e-5)


# A rank that is smaller than what is served.


def served(state: AdapterState, name: str) -> np.ndarray:
    """``R + s B A``, float64."""
    A, B = (part[name].double().numpy() for part in (state.A, state.B))
    change = state.scaling[name] * B @ A
    if name in state.residual:
        beside = state.residual[name]
        U = beside.U.double().numpy()
        change = change + (U if beside.V is None else U @ beside.V.double().numpy())
    return change


def peft_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def in_peft(folder: Path, name: str) -> np.ndarray:
    """What PEFT's two files say of one layer: ``alpha / r B A``; float64."""
    config = peft_config(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{name}.lora_{f}.weight"].double().numpy() for f in "AB")
    assert len(A) == B.shape[1] == config["r"]
    return config["lora_alpha"] / config["r"] * B.reshape(len(B), -1) @ A.reshape(len(A), -1)


@pytest.mark.parametrize("limit", [3, 4, 9])
@pytest.mark.parametrize("kind", ["thin", "dense", "mixed"])
def test_what_has_a_larger_rank_is_exported_as_its_best_approximation(
    kind: str, limit: int, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lora, target = trained(folder, kind), tmp_path / "adapter"
    state = lora.state()
    export_adapter(target, lora, state, {}, rank=limit)
    told = json.loads((target / "fedlora.json").read_text())["peft"]
    # Factors of rank 3 and a thin residual of rank 2 fit in 9, a dense one (24 x 40) does not.
    fits = kind == "thin" and limit == 9
    assert told["rank"] == peft_config(target)["r"] == (5 if fits else limit)
    assert told["exact"] is fits
    gap = tail = whole = 0.0
    for name in state.A:
        want, got = served(state, name), in_peft(target, name)
        values = np.linalg.svd(want, compute_uv=False)
        tail += np.sum(values[limit:] ** 2)
        gap += np.linalg.norm(want - got) ** 2
        whole += np.linalg.norm(want) ** 2
    assert told["error"] == pytest.approx(0 if fits else (gap / whole) ** 0.5, rel=1e-9)
    assert gap == pytest.approx(tail, rel=1e-6, abs=1e-9)
    # PEFT serves what its files say.
    model = load_peft(CLIPVisionModelWithProjection, folder, target, caplog)
    for name in state.A:
        weight = model.base_model.model.get_submodule(name).get_delta_weight("default")
        np.testing.assert_allclose(weight.detach().numpy(), in_peft(target, name), atol=1e-5)
    features = image_features(model, pixels())
    distance = (features - our_features(lora)).abs().max()
    assert distance < 1e-5 if fits else distance > 1e-3
    merged = image_features(model.merge_and_unload(), pixels())
    torch.testing.assert_close(merged, features, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["thin", "dense", "mixed"])
def test_a_folder_of_limited_rank_brings_all_back(kind: str, folder: Path, tmp_path: Path) -> None:
    lora = trained(folder, kind, target_components=["encoder", "classifier"])
    state = lora.state()
    export_adapter(tmp_path / "adapter", lora, state, {}, rank=3)
    fresh = adapted(folder, target_components=["encoder", "classifier"])
    load_adapter(tmp_path / "adapter", fresh)
    for name in state.A:
        np.testing.assert_array_equal(served(fresh.state(), name), served(state, name))
    assert torch.equal(our_features(fresh), our_features(lora))
    base = {name: W.double().numpy() for name, W in adapted(folder).base_weights().items()}
    merged = fresh.merge_and_unload().state_dict()
    for name, W0 in base.items():
        want = (W0 + served(state, name)).astype(np.float32)
        np.testing.assert_array_equal(merged[f"clip.{name}.weight"].numpy(), want)


@pytest.mark.parametrize("limit", [None, 3, 5])
@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
def test_a_rank_that_is_enough_is_exact(
    kept: float, limit: int | None, folder: Path, tmp_path: Path
) -> None:
    """What is stacked may cancel: the residual takes all, half or nothing of the factors back."""
    lora = trained(folder, lora_alpha=7)
    state = lora.state()
    residual = {
        name: Residual((kept - 1) * state.scaling[name] * B, state.A[name])
        for name, B in state.B.items()
    }
    state = replace(state, residual=residual)
    export_adapter(tmp_path / "adapter", lora, state, {}, rank=limit)
    told = json.loads((tmp_path / "adapter/fedlora.json").read_text())["peft"]
    assert told == {"rank": 6 if limit is None else limit, "exact": True, "error": 0.0}
    for name in state.A:
        want = kept * state.scaling[name] * state.B[name].double() @ state.A[name].double()
        np.testing.assert_allclose(in_peft(tmp_path / "adapter", name), want, atol=2e-6)


def test_without_a_residual_no_rank_is_cut(folder: Path, tmp_path: Path) -> None:
    lora = trained(folder)
    for rank, name in ((None, "whole"), (2, "limited")):
        export_adapter(tmp_path / name, lora, lora.state(), {}, rank=rank)
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "limited" / file.name).read_bytes()
    assert "peft" not in json.loads((tmp_path / "whole/fedlora.json").read_text())


def test_convolutions_of_limited_rank(tmp_path: Path) -> None:
    lora = LoRAWrapper(
        SmallResNet(), LoRAConfig(r=2, lora_dropout=0.0), targets=["conv", "block.conv"]
    ).apply()
    shake(lora)
    lora.served.serve(residuals_of(lora))
    state = lora.state()
    export_adapter(tmp_path / "adapter", lora, state, {}, rank=2)
    told = json.loads((tmp_path / "adapter/fedlora.json").read_text())["peft"]
    loaded = PeftModel.from_pretrained(SmallResNet(), tmp_path / "adapter").base_model.model
    gap = whole = 0.0
    for name in state.A:
        delta = loaded.get_submodule(name).get_delta_weight("default").detach().numpy()
        want = served(state, name)
        gap += np.linalg.norm(delta.reshape(want.shape) - want) ** 2
        whole += np.linalg.norm(want) ** 2
    assert told["error"] == pytest.approx((gap / whole) ** 0.5, rel=1e-5)
    assert told["rank"] == 2
    assert not told["exact"]


# A rank and a scaling that are not the model's: those of a client.


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(("rank", "scale"), [(2, 1.0), (2, 1.5), (1, 3.0), (0, 0.7)])
def test_a_clients_adapter_has_its_own_rank_and_scaling(
    rank: int,
    scale: float,
    use_rslora: bool,
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lora, target = trained(folder, use_rslora=use_rslora), tmp_path / "adapter"
    state = lora.state().cut(rank, scale)
    lora.load(state.padded(lora.state().ranks))
    export_adapter(target, lora, state, {})
    model = load_peft(CLIPVisionModelWithProjection, folder, target, caplog)
    torch.testing.assert_close(
        image_features(model, pixels()), our_features(lora), atol=1e-5, rtol=0
    )
    told, config = json.loads((target / "fedlora.json").read_text()), peft_config(target)
    r = rank or 3
    alpha = scale * 6 * ((r / 3) ** 0.5 if use_rslora else r / 3)
    for settings in (told["lora"], config):
        assert settings["r"] == r
        assert settings["lora_alpha"] == pytest.approx(alpha, rel=1e-12)
        assert settings["use_rslora"] is use_rslora
    # A model with the settings that it names takes it, and counts the same.
    fresh = adapted(folder, r=r, lora_alpha=told["lora"]["lora_alpha"], use_rslora=use_rslora)
    load_adapter(target, fresh)
    for name in state.A:
        assert torch.equal(fresh.state().A[name], state.A[name])
        assert torch.equal(fresh.state().B[name], state.B[name])
    torch.testing.assert_close(our_features(fresh), our_features(lora), atol=1e-6, rtol=0)
    _, again = exported(tmp_path / "again", fresh)
    assert (told["counts"], told["bytes"]) == (again["counts"], again["bytes"])


@pytest.mark.parametrize("alpha", [7, 7.0, 0.3])
def test_the_settings_are_written_as_they_were_given(
    alpha: float, folder: Path, tmp_path: Path
) -> None:
    lora = trained(folder, lora_alpha=alpha)
    _, told = exported(tmp_path / "adapter", lora)
    for settings in (told["lora"], peft_config(tmp_path / "adapter")):
        assert repr(settings["lora_alpha"]) == repr(alpha)
    assert told["lora"] == lora.config.to_dict()
    state = read_adapter(tmp_path / "adapter").state
    assert {name: state.scaling[name] for name in lora.scaling} == lora.scaling


def test_layers_that_scale_differently(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lora, target = trained(folder, placement="all"), tmp_path / "adapter"
    scaling = {name: 1.0 + i % 3 for i, name in enumerate(lora.layers)}
    lora.load(replace(lora.state(), scaling=scaling))
    state = lora.state()
    exported(target, lora)
    assert read_adapter(target).state.scaling == scaling
    model = load_peft(CLIPVisionModelWithProjection, folder, target, caplog)
    for name in state.A:
        delta = model.base_model.model.get_submodule(name).get_delta_weight("default")
        np.testing.assert_allclose(delta.detach().numpy(), served(state, name), atol=1e-5)


def test_a_scaling_is_meant_for_no_layer_whose_name_only_ends_alike(tmp_path: Path) -> None:
    lora = LoRAWrapper(
        SmallResNet(), LoRAConfig(r=2, lora_dropout=0.0), targets=["conv", "block.conv", "fc"]
    ).apply()
    shake(lora)
    scaling = {"conv": 3.0, "block.conv": 5.0, "fc": 5.0}
    lora.load(replace(lora.state(), scaling=scaling))
    exported(tmp_path / "adapter", lora)
    assert read_adapter(tmp_path / "adapter").state.scaling == scaling
    loaded = PeftModel.from_pretrained(SmallResNet(), tmp_path / "adapter").base_model.model
    layers = {name: loaded.get_submodule(name) for name in scaling}
    assert {name: layer.scaling["default"] for name, layer in layers.items()} == scaling


def residuals_of(lora: LoRAWrapper) -> dict[str, Residual]:
    return {
        name: Residual(0.1 * torch.ones(len(W), 1), 0.1 * torch.ones(1, W.shape[1]))
        for name, W in lora.base_weights().items()
    }


def test_peft_adapts_no_layer_whose_name_only_ends_alike(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """To PEFT "conv" means "block.conv" too, which has groups and so is not adapted by us."""

    def grouped() -> SmallResNet:
        model = SmallResNet()
        torch.manual_seed(3)
        model.block.conv = torch.nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        return model.eval()

    lora = LoRAWrapper(grouped(), LoRAConfig(r=2, lora_dropout=0.0), targets=["conv"]).apply()
    assert list(lora.layers) == ["conv"]
    shake(lora)
    exported(tmp_path / "adapter", lora)
    with no_warning(caplog):
        loaded = PeftModel.from_pretrained(grouped(), tmp_path / "adapter").eval()
    assert type(loaded.base_model.model.block.conv) is torch.nn.Conv2d
    images = torch.randn(5, 3, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), lora.model(images))


@pytest.mark.parametrize("components", [["encoder", "classifier"], ["classifier"]])
@pytest.mark.parametrize("residual", [False, True])
def test_a_head_with_lora_is_written_as_it_is_served(
    components: list[str], residual: bool, folder: Path, tmp_path: Path
) -> None:
    lora = adapted(folder, target_components=components)
    shake(lora)
    state, base = lora.state(), lora.base_weights()["classifier"].clone()
    if residual:
        lora.served.serve(residuals_of(lora))
        state = lora.state()
    files, told = exported(tmp_path / "adapter", lora)
    head = load_file(tmp_path / "adapter/classifier.safetensors")
    assert set(head) == {"weight", "bias", "base_weight", "lora_A", "lora_B"}
    assert torch.equal(head["base_weight"], base)
    assert torch.equal(head["lora_A"], state.A["classifier"])
    assert torch.equal(head["lora_B"], state.B["classifier"])
    s = state.scaling["classifier"]
    weight = base.double() + s * state.B["classifier"].double() @ state.A["classifier"].double()
    if residual:
        weight += 0.01
    torch.testing.assert_close(head["weight"], weight.float(), atol=1e-6, rtol=1e-6)
    features = our_features(lora)
    with torch.no_grad():
        logits = lora.federated(pixels())
    torch.testing.assert_close(
        features @ head["weight"].T + head["bias"], logits, atol=1e-4, rtol=1e-4
    )
    assert told["head_lora"]["layer"] == "classifier"
    if components == ["classifier"]:
        assert "adapter_config.json" not in files
        assert "adapter_model.safetensors" not in files
    else:
        tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
        assert tensors
        assert not any("classifier" in name for name in tensors)


@pytest.mark.parametrize("towers", ["vision", "both"])
def test_siglip(towers: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = make_siglip(tmp_path / "siglip")
    lora = trained(base, towers=towers, head="text")
    exported(tmp_path / "adapter", lora)
    model = load_peft(SiglipModel, base, tmp_path / "adapter", caplog)
    with torch.no_grad():
        features = normalize(model.vision_model(pixel_values=pixels()).pooler_output, dim=-1)
    torch.testing.assert_close(features, our_features(lora), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("towers", "cls"), [("vision", SiglipVisionModel), ("both", SiglipModel)])
def test_siglip_without_lora(towers: str, cls: Any, tmp_path: Path) -> None:
    base = make_siglip(tmp_path / "siglip")
    lora = adapted(base, towers=towers, head="text", enabled=False)
    shake(lora, size=0.02)
    exported(tmp_path / "adapter", lora)
    model = cls.from_pretrained(tmp_path / "adapter/model").eval()
    with torch.no_grad():
        tower = model if towers == "vision" else model.vision_model
        features = normalize(tower(pixel_values=pixels()).pooler_output, dim=-1)
    torch.testing.assert_close(features, our_features(lora), atol=1e-5, rtol=0)


def test_without_lora_what_is_not_transformers(folder: Path, tmp_path: Path) -> None:
    thing = OwnClip(folder)
    lora = CLIPLoRAWrapper(thing, LoRAConfig(enabled=False)).apply()
    shake(lora, size=0.02)
    exported(tmp_path / "own", lora)
    head = load_file(tmp_path / "own/other.safetensors")
    assert set(head) == {"head.weight", "head.bias"}
    assert torch.equal(head["head.weight"], thing.head.weight)
    loaded = CLIPModel.from_pretrained(tmp_path / "own/model").state_dict()
    assert all(torch.equal(t, loaded[n]) for n, t in thing.backbone.state_dict().items())
    model = SmallResNet()
    lora = LoRAWrapper(model, LoRAConfig(enabled=False)).apply()
    shake(lora)
    files, _ = exported(tmp_path / "resnet", lora)
    assert files == {"model/model.safetensors", "fedlora.json"}
    floats = model.state_dict()
    written = load_file(tmp_path / "resnet/model/model.safetensors")
    assert written.keys() == floats.keys()
    assert all(torch.equal(t, written[n]) for n, t in floats.items())
