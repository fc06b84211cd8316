"""A vision tower that computes less against transformers' own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, CLIPModel, SiglipModel
from transformers.activations import ACT2FN, QuickGELUActivation
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from fedlora.modules import families
from fedlora.modules.tower import FirstTokenLayer, QuickGELU, leave_out_unread
from tests.small_clip import LAYERS, VISION, pictures
from tests.small_siglip import make_siglip


def load(folder: Path, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    return CLIPModel.from_pretrained(folder, **options).to(dtype)


def pixels(dtype: torch.dtype = torch.float64) -> Tensor:
    return (pictures() / 127.5 - 1).to(dtype)


def quick(clip: Any) -> Any:
    twin = copy.deepcopy(clip)
    leave_out_unread(twin)
    return twin


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def features(clip: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Image features, and the gradients of the picture and of every parameter that they reach."""
    clip.zero_grad()
    pixels = pixels.clone().requires_grad_()
    found = families.image_features(clip, pixels)
    (found * torch.arange(found.numel(), dtype=found.dtype).sin().view_as(found)).sum().backward()
    gradients = {n: p.grad.clone() for n, p in clip.named_parameters() if p.grad is not None}
    return {"features": found.detach(), "pixels": pixels.grad} | gradients


def activate(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    y.backward(x.detach().flip(0))
    return y.detach(), x.grad


@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str
)
def test_quick_gelu_is_transformers(dtype: torch.dtype, close: float) -> None:
    x = torch.linspace(-30, 30, 4001, dtype=dtype)
    found, expected = activate(QuickGELU(), x), activate(QuickGELUActivation(), x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=close, atol=close)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_quick_gelu_in_16_bits_is_near_to_the_truth(dtype: torch.dtype) -> None:
    x = torch.linspace(-10, 10, 4001).to(dtype)
    exact = activate(QuickGELUActivation(), x.double())
    found, theirs = (activate(each, x) for each in (QuickGELU(), QuickGELUActivation()))
    errors = [(one.double() - truth).abs() for one, truth in zip(found, exact, strict=True)]
    assert {one.dtype for one in found} == {dtype}
    step = torch.finfo(dtype).eps
    # Rounded three times, by half a step each.
    assert (errors[0] <= 1.5 * step * (exact[0].abs() + 0.1)).all()
    assert errors[1].norm() < (theirs[1].double() - exact[1]).norm()  # rounded less often


def test_a_second_derivative_of_quick_gelu_is_refused() -> None:
    """Instead of given as zero."""
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="silu_backward is not implemented"):
        torch.autograd.grad(QuickGELU()(x).square().sum(), x, create_graph=True)[0].sum().backward()


def test_quick_gelu_leaves_its_input_alone() -> None:
    x = torch.randn(5, 3)
    before = x.clone()
    with torch.no_grad():
        QuickGELU()(x)
    assert torch.equal(x, before)


def test_the_first_token_and_its_gradients_are_those_of_the_whole_block(folder: Path) -> None:
    clip = load(folder)
    found, expected = features(quick(clip), pixels()), features(clip, pixels())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-9)
    # q, k, v and out of the last block among them.
    last = f"vision_model.encoder.layers.{LAYERS - 1}.self_attn"
    assert all(expected[f"{last}.{name}_proj.weight"].abs().max() > 1e-3 for name in "qkv")


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_with_recomputation_gradients_are_the_same_to_the_bit(autocast: bool, folder: Path) -> None:
    clip = quick(load(folder, torch.float32)).train()
    found = []
    for recompute in (False, True):
        if recompute:
            clip.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(features(clip, pixels(torch.float32)))
    plain, recomputed = found
    assert all(torch.equal(recomputed[name], tensor) for name, tensor in plain.items())


def test_under_autocast_it_is_as_near_to_the_truth(folder: Path) -> None:
    exact, clip = load(folder), load(folder, torch.float32)
    truth = features(exact, pixels())["features"]

    def error(clip: Any) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            return float((features(clip, pixels(torch.float32))["features"] - truth).norm())

    assert 0 < error(quick(clip)) < 1.5 * error(clip)


def test_what_nobody_reads_is_not_computed(folder: Path) -> None:
    shapes: dict[str, torch.Size] = {}
    clip = quick(load(folder))
    for number, block in enumerate(clip.vision_model.encoder.layers):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.out_proj", "mlp.fc1"):
            block.get_submodule(name).register_forward_hook(
                lambda _, args, __, key=f"{number}.{name}": shapes.update({key: args[0].shape})
            )
    clip.vision_model(pixel_values=pixels())
    last, tokens = LAYERS - 1, 1 + 4  # of pictures of 2 x 2 patches
    one = [name for name, shape in shapes.items() if shape == (4, 1, VISION)]
    assert one == [f"{last}.self_attn.q_proj", f"{last}.self_attn.out_proj", f"{last}.mlp.fc1"]
    assert all(shape == (4, tokens, VISION) for n, shape in shapes.items() if n not in one)


def test_what_changes_its_class(folder: Path) -> None:
    clip = load(folder)
    twin = quick(clip)
    names = [name for name, _ in clip.named_modules()]
    assert [name for name, _ in twin.named_modules()] == names
    changed = {n: type(twin.get_submodule(n)) for n in names}
    changed = {n: kind for n, kind in changed.items() if kind is not type(clip.get_submodule(n))}
    blocks = [f"{tower}_model.encoder.layers.{i}" for tower in ("text", "vision") for i in range(2)]
    assert changed == {f"{block}.mlp.activation_fn": QuickGELU for block in blocks} | {
        f"vision_model.encoder.layers.{LAYERS - 1}": FirstTokenLayer
    }
    again = quick(twin)
    assert kinds(again) == kinds(twin)
    assert twin.state_dict().keys() == clip.state_dict().keys()


@torch.no_grad()
def test_the_text_tower_reads_as_before(folder: Path) -> None:
    clip = load(folder)
    tokens = {"input_ids": torch.tensor([[357, 5, 9, 358], [357, 6, 358, 0]])}
    tokens["attention_mask"] = tokens["input_ids"].ne(0).long()
    found, expected = (families.text_features(each, tokens) for each in (quick(clip), clip))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_model_without_its_text_tower(folder: Path) -> None:
    clip = load(folder)
    expected = families.image_features(clip, pixels())
    families.drop_text_tower(clip)
    leave_out_unread(clip)
    found = families.image_features(clip, pixels())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# What is left alone.


def test_siglip_pools_all_tokens(tmp_path: Path) -> None:
    clip = SiglipModel.from_pretrained(make_siglip(tmp_path / "siglip"))
    clip.vision_model.encoder.layers[0].mlp.activation_fn = QuickGELUActivation()
    twin = quick(clip)
    assert kinds(twin) == kinds(clip)
    x = pixels(torch.float32)
    with torch.no_grad():
        found, expected = (families.image_features(each, x) for each in (twin, clip))
    assert torch.equal(found, expected)


def test_another_kind_of_attention(folder: Path) -> None:
    clip = load(folder, attn_implementation="eager")
    twin = quick(clip)
    assert {type(block) for block in twin.vision_model.encoder.layers} == {CLIPEncoderLayer}
    with torch.no_grad():
        found, expected = (families.image_features(each, pixels()) for each in (twin, clip))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_attention_with_dropout(folder: Path) -> None:
    clip = load(folder)
    clip.vision_model.encoder.layers[-1].self_attn.dropout = 0.1
    twin = quick(clip).train()
    assert {type(block) for block in twin.vision_model.encoder.layers} == {CLIPEncoderLayer}


def test_a_block_of_somebodys_own(folder: Path) -> None:
    class Own(CLIPEncoderLayer):
        pass

    clip = load(folder)
    clip.vision_model.encoder.layers[-1].__class__ = Own
    assert type(quick(clip).vision_model.encoder.layers[-1]) is Own


@pytest.mark.parametrize("name", ["gelu", "gelu_pytorch_tanh", "quick_gelu"])
def test_another_activation(name: str, folder: Path) -> None:
    clip = load(folder)
    mlp = clip.vision_model.encoder.layers[0].mlp
    mlp.activation_fn = ACT2FN[name]
    kept = type(mlp.activation_fn)
    found = type(quick(clip).vision_model.encoder.layers[0].mlp.activation_fn)
    assert found is (QuickGELU if name == "quick_gelu" else kept)


@torch.no_grad()
def test_what_is_saved_transformers_loads(folder: Path, tmp_path: Path) -> None:
    clip = load(folder, torch.float32)
    twin, x = quick(clip), pixels(torch.float32)
    twin.save_pretrained(tmp_path)
    expected = families.image_features(twin, x)
    for kind in (CLIPModel, AutoModel):
        model, info = kind.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        assert type(model) is CLIPModel
        assert kinds(model) == kinds(clip)
        assert all(map(torch.equal, model.state_dict().values(), clip.state_dict().values()))
        found = families.image_features(model, x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
