"""The frozen base in bfloat16, in a float32 model."""

from __future__ import annotations

import copy
import gc
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedlora.export import export_adapter
from fedlora.modules.clip_wrapper import CLIPLoRAWrapper
from fedlora.modules.frozen import _seen_by, keep_frozen_in
from fedlora.modules.saved import load_adapter
from fedlora.state import Residual
from tests.small_clip import adapted, pictures, shake
from tests.small_nets import make_net, wrap

MAPS = Path("/proc/self/maps")
SETTINGS: list[dict[str, Any]] = [
    {},
    {"towers": "both"},
    {"head": "text"},
    {"head": "text", "towers": "both"},
    {"bias": "all", "train_norm": True},
    {"target_components": ["encoder", "classifier"]},
]


def types(lora: CLIPLoRAWrapper) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in lora.federated.state_dict().items()}


def answers(lora: CLIPLoRAWrapper, autocast: bool) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits: Tensor = lora.federated.eval()(pictures())
    return logits


def rounded(lora: CLIPLoRAWrapper) -> list[str]:
    """Names of what is kept in bfloat16, from what the layers are."""
    learned = {id(p) for part in lora.parameters.values() for p in part.values()}
    return [
        f"clip.{path}.{key}"
        for path, module in lora.model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        for key, parameter in module.named_parameters(recurse=False)
        if id(parameter) not in learned
    ]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_only_what_autocast_casts_is_kept_in_16_bits(
    settings: dict[str, Any], folder: Path
) -> None:
    plain, lora = adapted(folder, **settings), adapted(folder, **settings)
    names = rounded(lora)
    towers = {name.split(".")[1] for name in names}
    both = settings.get("towers") == "both"
    assert towers == {"vision_model", "visual_projection"} | (
        {"text_model", "text_projection"} if both else set()
    )
    sha256, text, sets = lora.federated.base_sha256, lora.federated.text_features, lora.state()
    before = {n: id(p) for n, p in lora.federated.named_parameters()}
    lora.set_base_dtype(torch.bfloat16)
    assert {n for n, dtype in types(lora).items() if dtype == torch.bfloat16} == set(names)
    assert all(lora.federated.state_dict()[n].isfinite().all() for n in names)
    assert {n: id(p) for n, p in lora.federated.named_parameters()} == before
    factors = (each for layer in lora.layers.values() for each in (layer.lora_A, layer.lora_B))
    assert all(type(factor["default"]) is nn.Linear for factor in factors)
    assert lora.describe()["base_model_sha256"] == sha256 == plain.federated.base_sha256
    assert text is None or torch.equal(text, lora.federated.text_features)
    assert all(torch.equal(t, dict(sets.tensors())[n]) for n, t in lora.state().tensors())
    # Autocast computes with the same rounded weights as before, to the bit.
    assert torch.equal(answers(lora, autocast=True), answers(plain, autocast=True))


def patches_in_16_bits(lora: CLIPLoRAWrapper) -> None:
    """transformers casts pictures to the type of the kernel: the one product in 16 bits."""

    def conv(layer: Any, args: tuple[Tensor], _: Tensor) -> Tensor:
        y: Tensor = layer._conv_forward(args[0].bfloat16(), layer.weight.bfloat16(), None)
        return y.float()

    lora.model.vision_model.embeddings.patch_embedding.register_forward_hook(conv)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_nothing_fails_outside_of_autocast(settings: dict[str, Any], folder: Path) -> None:
    """The rounded weights are computed with in float32."""
    torch.manual_seed(0)
    plain = adapted(folder, **settings)
    torch.manual_seed(0)
    lora = adapted(folder, **settings)
    for each in (plain, lora):
        shake(each)
    with torch.no_grad():
        for name in rounded(plain):
            parameter = plain.federated.get_parameter(name)
            parameter.copy_(parameter.bfloat16())
    patches_in_16_bits(plain)
    lora.set_base_dtype(torch.bfloat16)

    def compare() -> None:
        one, two = answers(lora, autocast=False), answers(plain, autocast=False)
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)

    compare()
    with plain.lora_disabled(), lora.lora_disabled():
        compare()
    compare()
    if "text_model" in dict(lora.model.named_children()):
        tokens = {"input_ids": torch.tensor([[1, 5, 2], [1, 6, 2]])}
        found = [each.federated.encode_text(tokens) for each in (lora, plain)]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    for frozen in (True, False):  # of use to a text head whose tower is there
        for each in (plain, lora):
            each.federated.freeze_text(frozen)
        compare()
    lora.federated(pictures()).square().mean().backward()
    reached = [p.grad for p in lora.trainable().values() if p.grad is not None]
    assert reached
    assert all(gradient.dtype == torch.float32 for gradient in reached)


def test_it_comes_back_in_float32(folder: Path) -> None:
    lora = adapted(folder)
    classes = [type(module) for module in lora.federated.modules()]
    shake(lora)
    W0 = {n: w.clone() for n, w in lora.base_weights().items()}
    lora.set_base_dtype(torch.bfloat16)
    twin = copy.deepcopy(lora.federated)
    torch.testing.assert_close(twin(pictures()), lora.federated(pictures()))
    for _ in range(2):  # a second time changes nothing
        lora.set_base_dtype(torch.float32)
        assert set(types(lora).values()) == {torch.float32}
        assert [type(module) for module in lora.federated.modules()] == classes
        for name, weight in lora.base_weights().items():
            assert torch.equal(weight, W0[name].bfloat16().float())
    answer = answers(lora, autocast=False)
    merged = lora.merge_and_unload().eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(pictures()), answer, rtol=1e-4, atol=1e-4)


def test_a_residual_goes_beside_and_back(folder: Path, tmp_path: Path) -> None:
    lora = adapted(folder)
    W0 = {name: weight.clone() for name, weight in lora.base_weights().items()}
    R = {name: torch.randn(weight.shape) * 1e-3 for name, weight in W0.items()}
    lora.load(replace(lora.state(), residual={name: Residual(r) for name, r in R.items()}))
    export_adapter(tmp_path / "adapter", lora, lora.state(), {})
    for dtype in (torch.bfloat16, torch.float32):
        lora.set_base_dtype(dtype)
        for name, weight in lora.base_weights().items():
            assert lora.served.pristine(name).dtype == dtype
            assert torch.equal(weight, W0[name].bfloat16().float() + R[name])
    fresh = adapted(folder)
    fresh.set_base_dtype(torch.bfloat16)
    load_adapter(tmp_path / "adapter", fresh)
    for name, weight in fresh.base_weights().items():
        assert torch.equal(weight, W0[name].bfloat16().float() + R[name])


def test_layers_that_read_their_weight_themselves_are_left_alone() -> None:
    lora = wrap(make_net("mixed"), target_modules=["head"])
    lora.set_base_dtype(torch.bfloat16)
    kept = {n for n, p in lora.model.named_parameters() if p.dtype == torch.bfloat16}
    # No Conv1d, no attention with its out_proj, no normalisation.
    assert kept == {
        "first.weight",
        "first.bias",
        "head.base_layer.weight",
        "head.base_layer.bias",
    }
    lora.model.eval()(torch.randn(4, 4, 10))


@pytest.mark.skipif(not MAPS.exists(), reason="Linux says which files are in memory")
def test_the_file_that_was_loaded_does_not_stay_in_memory(folder: Path, tmp_path: Path) -> None:
    own = shutil.copytree(folder, tmp_path / "own")
    lora = adapted(own)
    gc.collect()
    if str(own) not in MAPS.read_text():
        pytest.skip("this version of transformers reads files instead of mapping them")
    lora.set_base_dtype(torch.bfloat16)
    gc.collect()
    assert str(own) not in MAPS.read_text()
    lora.federated(pictures())


def test_under_autocast_a_step_casts_nothing() -> None:
    x, weight = torch.ones(1, 2), torch.ones(2, 2, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert _seen_by(x, weight, None)[0] is weight
    assert _seen_by(x, weight, None)[0].dtype == torch.float32


def test_a_weight_that_an_embedding_shares_keeps_its_type() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False))
    model[2].weight = model[0].weight
    keep_frozen_in(torch.bfloat16, model, set())
    assert [p.dtype for p in (model[0].weight, model[1].weight)] == [torch.float32, torch.bfloat16]
    assert model(torch.tensor([1])).dtype == torch.float32
