from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from fedlora.errors import FedloraError
from fedlora.modules.clip import FederatedCLIPModel
from fedlora.modules.clip_targets import targets_in
from fedlora.modules.clip_wrapper import CLIPLoRAWrapper
from fedlora.modules.config import LoRAConfig
from fedlora.state import AdapterState
from tests.small_clip import DIM, LAYERS, NAMES, TEXT, VISION, adapted, pictures, shake

MLP = ["mlp.fc1", "mlp.fc2"]
ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"]
QKV = ["q_proj", "k_proj", "v_proj"]
BOTH = ("vision", "text")


def names(tower: str, kinds: list[str], blocks: tuple[int, ...] = (0, 1)) -> set[str]:
    return {f"{tower}_model.encoder.layers.{block}.{kind}" for block in blocks for kind in kinds}


@pytest.fixture(scope="module")
def vit_b32() -> CLIPModel:
    """OpenAI's sizes are transformers' defaults; no memory is taken."""
    with torch.device("meta"):
        return CLIPModel(CLIPConfig())


@pytest.mark.parametrize(
    ("placement", "kinds"), [("mlp", MLP), ("attention", ATTENTION), ("all", MLP + ATTENTION)]
)
@pytest.mark.parametrize("towers", ["vision", "both"])
def test_placement_and_towers(folder: Path, placement: str, kinds: list[str], towers: str) -> None:
    lora = adapted(folder, towers=towers, placement=placement)
    expected = names("vision", kinds)
    if towers == "both":
        expected |= names("text", kinds)
    assert set(lora.layers) == expected
    # Paths as in CLIPModel: get_submodule finds a plain linear layer under each of them.
    clip = CLIPModel.from_pretrained(folder)
    assert all(isinstance(clip.get_submodule(name), torch.nn.Linear) for name in lora.layers)
    state = lora.state()
    for name in lora.layers:
        out_features, in_features = clip.get_submodule(name).weight.shape
        assert state.A[name].shape == (3, in_features)
        assert state.B[name].shape == (out_features, 3)


@pytest.mark.parametrize(
    ("layers", "blocks"), [(None, (0, 1)), ([0], (0,)), ([-1], (1,)), ([-2, 1], (0, 1))]
)
def test_layers(folder: Path, layers: list[int] | None, blocks: tuple[int, ...]) -> None:
    assert set(adapted(folder, layers=layers).layers) == names("vision", MLP, blocks)


@pytest.mark.parametrize("index", [2, -3, 12])
def test_a_block_that_does_not_exist(folder: Path, index: int) -> None:
    message = (
        f"lora.layers: there is no block {index} in the vision tower, which has 2 "
        "(0 to 1, or -1 to -2 from the end)."
    )
    with pytest.raises(FedloraError) as error:
        adapted(folder, layers=[0, index])
    assert str(error.value) == message


def test_towers_of_different_depth_count_each_from_its_end() -> None:
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(text_config={"num_hidden_layers": 3}))
    found = targets_in(clip, LoRAConfig(layers=[-1]), BOTH)
    assert set(found) == names("vision", MLP, (11,)) | names("text", MLP, (2,))
    with pytest.raises(FedloraError, match="no block 5 in the text tower, which has 3"):
        targets_in(clip, LoRAConfig(layers=[5]), BOTH)


def test_target_modules_by_ending_or_full_name(folder: Path) -> None:
    assert set(adapted(folder, target_modules=["q_proj", "mlp.fc2"]).layers) == names(
        "vision", ["self_attn.q_proj", "mlp.fc2"]
    )
    full = "vision_model.encoder.layers.1.mlp.fc1"
    assert list(adapted(folder, target_modules=[full]).layers) == [full]
    with pytest.raises(FedloraError, match="leaves no layer to adapt"):
        adapted(folder, target_modules=[full], layers=[0])
    with pytest.raises(FedloraError, match="leaves no layer to adapt"):
        adapted(folder, layers=[])


@pytest.mark.parametrize(
    "name", ["fc3", "c1", "visual_projection", "text_model.encoder.layers.0.mlp.fc1", "encoder"]
)
def test_target_modules_that_match_nothing(folder: Path, name: str) -> None:
    """Also what exists, but outside of the adapted encoder blocks."""
    with pytest.raises(FedloraError) as error:
        adapted(folder, target_modules=["fc1", name])
    assert str(error.value) == (
        f"lora.target_modules: {name!r} matches no layer of the vision encoder blocks. There are: "
        "mlp.fc1, mlp.fc2, self_attn.k_proj, self_attn.out_proj, self_attn.q_proj, "
        "self_attn.v_proj."
    )


@pytest.mark.parametrize("placement", ["mlp", "attention", "all"])
@pytest.mark.parametrize(("head", "towers"), [("linear", "vision"), ("text", "both")])
def test_every_lora_tensor_gets_a_gradient(
    folder: Path, placement: str, head: str, towers: str
) -> None:
    lora = adapted(folder, head=head, towers=towers, placement=placement)
    shake(lora)
    lora.federated.train()
    logits = lora.federated(pictures())
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    trained = lora.trainable()
    per_block = {"mlp": 2, "attention": 4, "all": 6}[placement]
    adapters = 2 * per_block * LAYERS * (2 if towers == "both" else 1)
    assert len(trained) == adapters + (2 if head == "linear" else 0)
    assert [n for n, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_a_text_tower_that_is_trained_moves_the_classes(folder: Path) -> None:
    lora = adapted(folder, head="text", towers="both")
    assert not lora.federated.text_frozen
    before = lora.federated(pictures())
    B = {n: torch.ones_like(t) for n, t in lora.state().B.items() if n.startswith("text_model.")}
    lora.load(AdapterState(B=B))
    assert not torch.allclose(lora.federated(pictures()), before)
    assert adapted(folder, head="text", towers="vision").federated.text_frozen


def test_a_linear_head_travels_and_a_text_head_does_not(folder: Path) -> None:
    other = adapted(folder).state().other
    assert {n: tuple(t.shape) for n, t in other.items()} == {
        "classifier.weight": (len(NAMES), DIM),
        "classifier.bias": (len(NAMES),),
    }
    assert adapted(folder, head="text", towers="both").state().other == {}


def test_target_components_may_be_given_as_an_argument(folder: Path) -> None:
    model = FederatedCLIPModel(folder, class_names=NAMES)
    config = LoRAConfig(r=2)
    lora = CLIPLoRAWrapper(model, config, target_components=["encoder"], towers="vision").apply()
    assert set(lora.layers) == names("vision", MLP)
    with pytest.raises(FedloraError, match=r"lora\.target_components"):
        CLIPLoRAWrapper(model, config, target_components=["decoder"])


def test_switched_off_vision_trains_what_the_picture_goes_through(folder: Path) -> None:
    clip = CLIPModel.from_pretrained(folder)
    vision = {n for n, _ in clip.named_parameters() if n.startswith("vis")}
    lora = adapted(folder, enabled=False)
    assert set(lora.state().other) == vision | {"classifier.weight", "classifier.bias"}
    lora.federated(pictures()).sum().backward()
    assert [n for n, p in lora.trainable().items() if p.grad is None] == []
    assert not lora.federated.clip.logit_scale.requires_grad


def test_switched_off_with_both_towers_trains_all(folder: Path) -> None:
    lora = adapted(folder, head="text", towers="both", enabled=False)
    clip = CLIPModel.from_pretrained(folder)
    assert set(lora.state().other) == {n for n, _ in clip.named_parameters()}
    assert not lora.federated.text_frozen
    lora.federated(pictures()).sum().backward()
    # The scale is a constant of the head.
    assert [n for n, p in lora.trainable().items() if p.grad is None] == ["other/logit_scale"]


@pytest.mark.parametrize(
    ("settings", "per_rank"),
    # A layer of width d to m has r (d + m) parameters. Vision 768 and 3072, text 512 and 2048,
    # 12 blocks each: 12 * 2 * (3840 + 2560) = 153,600; 12 * 4 * 2 * (768 + 512) = 122,880.
    [
        ({"placement": "mlp"}, 153_600),
        ({"placement": "attention"}, 122_880),
        ({"placement": "all"}, 276_480),
        ({"target_modules": QKV}, 92_160),
    ],
)
def test_sizes_of_vit_b32(vit_b32: CLIPModel, settings: dict[str, object], per_rank: int) -> None:
    assert sum(p.numel() for p in vit_b32.parameters()) == 151_277_313
    found = targets_in(vit_b32, LoRAConfig(**settings), BOTH)  # type: ignore[arg-type]
    assert sum(sum(vit_b32.get_submodule(name).weight.shape) for name in found) == per_rank


@pytest.mark.parametrize("r", [1, 3, 8])
def test_an_adapter_has_the_parameters_that_the_formula_says(folder: Path, r: int) -> None:
    lora = adapted(folder, head="text", towers="both", placement="all", r=r)
    count = sum(p.numel() for p in lora.trainable().values())
    mlp = 2 * (VISION + 40) + 2 * (TEXT + 36)
    attention = 4 * 2 * (VISION + TEXT)
    assert count == r * LAYERS * (mlp + attention)
