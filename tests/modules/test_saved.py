"""An adapter folder read back: to the bit where it fits, each difference named where not."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPVisionModelWithProjection

from fedlora.errors import FedloraError
from fedlora.export import export_adapter
from fedlora.modules.clip_wrapper import CLIPLoRAWrapper
from fedlora.modules.compatibility import _heads
from fedlora.modules.config import LoRAConfig
from fedlora.modules.lora import LoRAWrapper
from fedlora.modules.saved import load_adapter, read_adapter
from fedlora.state import AdapterState, Residual
from tests.small_clip import adapted, make_folder, pictures, shake
from tests.small_models import OwnClip, SmallResNet

FC1 = "vision_model.encoder.layers.0.mlp.fc1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random CLIP on disk; never written to."""
    return make_folder(tmp_path_factory.mktemp("clip") / "small")


def resnet(**config: Any) -> LoRAWrapper:
    settings = {"r": 2, "lora_alpha": 6, "lora_dropout": 0.0, **config}
    return LoRAWrapper(SmallResNet(), LoRAConfig(**settings)).apply()


def own(folder: Path, classes: int = 3, **config: Any) -> CLIPLoRAWrapper:
    settings = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.0, **config}
    return CLIPLoRAWrapper(OwnClip(folder, classes), LoRAConfig(**settings)).apply()


def save(lora: LoRAWrapper, target: Path) -> Path:
    export_adapter(target, lora, lora.state(), {})
    return target


def assert_same(one: AdapterState, two: AdapterState) -> None:
    first, second = dict(one.tensors()), dict(two.tensors())
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert one.residual.keys() == two.residual.keys()
    for name, residual in one.residual.items():
        other = two.residual[name]
        assert torch.equal(residual.U, other.U)
        assert (residual.V is None) == (other.V is None)
        assert residual.V is None or torch.equal(residual.V, other.V)
    assert {n: one.scaling[n] for n in one.A} == {n: two.scaling[n] for n in two.A}


def residuals(lora: LoRAWrapper, dtype: torch.dtype) -> dict[str, Residual]:
    """By turns thin and dense, none in the last layer."""
    generator, made = torch.Generator().manual_seed(3), {}
    for i, (name, W) in enumerate(list(lora.base_weights().items())[:-1]):
        shapes = [(len(W), 1), (1, W.shape[1])] if i % 2 else [tuple(W.shape)]
        parts = [0.1 * torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
        made[name] = Residual(*(part.to(dtype) for part in parts))
    return made


MODELS: dict[str, Callable[[Path], LoRAWrapper]] = {
    "linear head": adapted,
    "rslora": lambda folder: adapted(folder, use_rslora=True, r=5),
    "odd scaling": lambda folder: adapted(folder, r=3, lora_alpha=7),
    "biases": lambda folder: adapted(folder, bias="all", placement="attention"),
    "norms": lambda folder: adapted(folder, train_norm=True),
    "text head, both towers": lambda folder: adapted(folder, head="text", towers="both"),
    "head with LoRA": lambda f: adapted(f, target_components=["encoder", "classifier"]),
    "head alone": lambda f: adapted(f, target_components=["classifier"]),
    "own class": own,
    "own class, head with LoRA": lambda f: own(f, target_components=["encoder", "classifier"]),
    "resnet": lambda _: resnet(),
    "resnet, biases": lambda _: resnet(bias="all"),
    "resnet, norms and biases": lambda _: resnet(bias="lora_only", train_norm=True),
}


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_what_was_saved_is_loaded_to_the_bit(
    kind: str, dtype: torch.dtype | None, folder: Path, tmp_path: Path
) -> None:
    lora = MODELS[kind](folder)
    shake(lora)
    for name, tensor in lora.exchanged().items():
        if "running" in name:
            tensor.add_(0.5)
    if dtype is not None:
        lora.served.serve(residuals(lora, dtype))
    state = lora.state()
    save(lora, tmp_path / "adapter")
    fresh = MODELS[kind](folder)
    load_adapter(tmp_path / "adapter", fresh)
    assert_same(state, fresh.state())
    assert all(torch.equal(t, lora.base_weights()[n]) for n, t in fresh.base_weights().items())
    # And again, over an adapter and a residual that are there already.
    load_adapter(str(tmp_path / "adapter"), fresh)
    assert_same(state, fresh.state())


def test_the_folder_may_be_in_the_home_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    lora = adapted(folder)
    shake(lora)
    save(lora, tmp_path / "adapter")
    assert_same(read_adapter("~/adapter").state, lora.state())


@pytest.mark.parametrize("written", [".", Path(), "../adapter", "./../adapter/."])
def test_the_folder_may_be_the_working_folder(
    written: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = resnet()
    shake(lora)
    monkeypatch.chdir(save(lora, tmp_path / "adapter"))
    fresh = resnet()
    saved = load_adapter(written, fresh)
    assert saved.folder.is_absolute()
    assert_same(fresh.state(), lora.state())


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("", "adapter must be the path of a folder, got ''"),
        (None, "adapter must be the path of a folder, got None"),
        (b"x", "adapter must be the path of a folder, got b'x'"),
        ("/", "/ is no adapter folder"),
        ("gone", "adapter 'gone': there is no such folder"),
        ("~nosuchuser/x", "adapter '~nosuchuser/x': there is no home folder for '~nosuchuser'"),
        ("x" * 300, "cannot be read: File name too long"),
        ("a\0b", "there is no such folder"),
    ],
)
def test_what_cannot_be_a_folder(written: Any, said: str) -> None:
    with pytest.raises(FedloraError) as error:
        read_adapter(written)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_the_wrapped_object_is_as_good_as_its_wrapper(folder: Path, tmp_path: Path) -> None:
    lora = own(folder)
    shake(lora)
    save(lora, tmp_path / "adapter")
    fresh = own(folder)
    load_adapter(tmp_path / "adapter", fresh.federated)
    assert_same(fresh.state(), lora.state())
    with pytest.raises(FedloraError, match=r"lora\.enabled"):
        load_adapter(tmp_path / "adapter", own(folder, enabled=False).federated)
    with pytest.raises(
        FedloraError, match=r"got OwnClip, which knows of none.*lora\.enabled=false"
    ):
        load_adapter(tmp_path / "adapter", OwnClip(folder, 3))


# What plain PEFT wrote.


def peft_adapter(
    folder: Path, target: Path, cls: Any = CLIPModel, safe: bool = True, **config: Any
) -> Any:
    """Train nothing, but let PEFT write an adapter that is not zero."""
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["fc1", "fc2"], **config}
    base = cls.from_pretrained(folder)
    model = get_peft_model(base, LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(target)
    if not safe:
        weights = load_file(target / "adapter_model.safetensors")
        torch.save(weights, target / "adapter_model.bin")
        (target / "adapter_model.safetensors").unlink()
    return model


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("cls", [CLIPModel, CLIPVisionModelWithProjection])
def test_an_adapter_that_peft_wrote(
    cls: Any, safe: bool, bias: str, folder: Path, tmp_path: Path
) -> None:
    theirs = peft_adapter(folder, tmp_path / "peft", cls, safe, bias=bias)
    towers = "both" if cls is CLIPModel else "vision"
    lora = adapted(folder, towers=towers, bias=bias)
    head = lora.federated.classifier.weight.clone()
    saved = load_adapter(tmp_path / "peft", lora)
    assert saved.told == {}
    assert saved.peft["peft_type"] == "LORA"
    pixels = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        pooled = theirs.vision_model(pixel_values=pixels).pooler_output
        features = torch.nn.functional.normalize(theirs.visual_projection(pooled), dim=-1)
        ours = lora.federated.eval().encode_image(pixels)
    torch.testing.assert_close(ours, features, atol=1e-5, rtol=0)
    assert torch.equal(lora.federated.classifier.weight, head)  # PEFT knows of no head


def test_half_precision_and_patterns_that_match(folder: Path, tmp_path: Path) -> None:
    peft_adapter(
        folder,
        tmp_path / "peft",
        CLIPVisionModelWithProjection,
        r=8,
        rank_pattern={"fc1": 3, "fc2": 3},
        alpha_pattern={
            "fc1": 6,
            r"layers\.0.mlp\.fc2": 6,
            r"^vision_model.encoder.layers.1.mlp.fc2$": 6,
        },
    )
    file = tmp_path / "peft/adapter_model.safetensors"
    save_file({n: t.half() for n, t in load_file(file).items()}, file)
    lora = adapted(folder)
    load_adapter(tmp_path / "peft", lora)
    half = load_file(file)[f"base_model.model.{FC1}.lora_A.weight"]
    assert torch.equal(lora.state().A[FC1], half.float())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["head"]}, "modules_to_save=['head']"),
        ({"layer_replication": [[0, 1]]}, "layer_replication=[[0, 1]]"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"peft_type": "IA3"}, "peft_type 'IA3' (expected 'LORA')"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' (it changes the base weights)"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices=[1]"),
        ({"rank_pattern": {"(a+)+[!?]": 3}}, "rank_pattern '(a+)+[!?]' (only names of layers"),
        ({"alpha_pattern": {"fc1": 6, ".*fc2": 6}}, "alpha_pattern '.*fc2' (only names of layers"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern '(' (only names of layers"),
        ({"rank_pattern": {"": 3}}, "rank_pattern '' (only names of layers"),
        ({"something_new": {"a": 1}}, "something_new={'a': 1}"),
        ({"use_dora": True, "lora_bias": True}, "lora_bias=True, use_dora=True"),
    ],
    ids=str,
)
def test_features_that_we_have_not(
    change: dict[str, Any], said: str, folder: Path, tmp_path: Path
) -> None:
    peft_adapter(folder, tmp_path / "peft")
    file = tmp_path / "peft/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(FedloraError) as error:
        read_adapter(tmp_path / "peft")
    assert said in str(error.value)
    assert "uses what fedlora does not have" in str(error.value)


def test_dora_of_peft_itself(folder: Path, tmp_path: Path) -> None:
    peft_adapter(folder, tmp_path / "peft", use_dora=True)
    with pytest.raises(FedloraError, match="use_dora=True"):
        read_adapter(tmp_path / "peft")
    file = tmp_path / "peft/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": False}))
    with pytest.raises(FedloraError, match="lora_magnitude_vector"):
        read_adapter(tmp_path / "peft")


@pytest.mark.parametrize("bias", ["none", "all"])
def test_peft_does_not_say_whether_norms_were_trained(
    bias: str, folder: Path, tmp_path: Path
) -> None:
    """They are in its file or not; where not, those of the model stay as they are."""
    peft_adapter(folder, tmp_path / "peft", CLIPVisionModelWithProjection, bias=bias)
    lora = adapted(folder, bias=bias, train_norm=True)
    load_adapter(tmp_path / "peft", lora)
    untrained = CLIPModel.from_pretrained(folder).state_dict()
    weights = {n: t for n, t in lora.state().other.items() if "norm" in n and "weight" in n}
    assert len(weights) == 6
    assert all(torch.equal(t, untrained[n]) for n, t in weights.items())

    shake(lora)
    save(lora, tmp_path / "ours")
    copied = tmp_path / "copied"
    copied.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "ours" / name, copied / name)
    again = adapted(folder, bias=bias, train_norm=True)
    load_adapter(copied, again)
    inside = {n: t for n, t in lora.state().other.items() if not n.startswith("classifier")}
    assert all(torch.equal(again.state().other[n], t) for n, t in inside.items())
    message = differences(copied, adapted(folder, bias=bias))
    assert message.endswith(": train_norm is True there, False here (set lora.train_norm=true).")


# What does not fit.


def differences(folder: Path, lora: LoRAWrapper) -> str:
    """The message; nothing is changed."""
    before = lora.state()
    with pytest.raises(FedloraError) as error:
        load_adapter(folder, lora)
    assert_same(before, lora.state())
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        ({"r": 4}, {}, ["4 layers", f"{FC1})", "of rank 4 there, 3 here (set lora.r=4)"]),
        ({"lora_alpha": 9}, {}, ["lora_alpha is 9 there, 6 here (set lora.lora_alpha=9)"]),
        (
            {"use_rslora": True},
            {},
            ["use_rslora is True there, False here", "lora.use_rslora=true"],
        ),
        (
            {"r": 4, "lora_alpha": 8, "use_rslora": True},
            {},
            ["lora.r=4", "lora.lora_alpha=8", "lora.use_rslora=true"],
        ),
        ({"placement": "all"}, {}, ["8 layers", "self_attn.k_proj", "adapted there and not here"]),
        ({"layers": [0]}, {}, ["2 layers", "layers.1.mlp.fc1", "adapted here and not there"]),
        ({"target_modules": ["fc1"], "layers": [0]}, {"target_modules": ["fc1"]}, ["layer vision"]),
        ({"bias": "all"}, {}, ["bias is 'all' there, 'none' here (set lora.bias=all)"]),
        ({}, {"bias": "lora_only"}, ["bias is 'none' there, 'lora_only' here"]),
        (
            {"train_norm": True},
            {},
            [
                "nothing was changed: train_norm is True there",
                "False here (set lora.train_norm=true).",
            ],
        ),
        (
            {},
            {"train_norm": True, "bias": "all"},
            ["train_norm is False there, True here (set lora.train_norm=false); bias is 'none'"],
        ),
        ({"head": "text"}, {}, ["its head is 'text', here 'linear' (set model.head=text)"]),
        (
            {"target_components": ["encoder", "classifier"]},
            {},
            ["'classifier' has LoRA there and none here", "['encoder', 'classifier']"],
        ),
        (
            {},
            {"target_components": ["encoder", "classifier"]},
            ["'classifier' has LoRA here and none there", "=['encoder']"],
        ),
        ({"enabled": False}, {}, ["whole model", "lora.enabled=false", "from_pretrained"]),
        ({}, {"enabled": False}, ["LoRA is off here", "lora.enabled=true"]),
    ],
    ids=str,
)
def test_each_difference_is_named(
    there: dict[str, Any], here: dict[str, Any], said: list[str], folder: Path, tmp_path: Path
) -> None:
    save(adapted(folder, **there), tmp_path / "adapter")
    message = differences(tmp_path / "adapter", adapted(folder, **here))
    for part in said:
        assert part in message
    # Both heads are the same here: no word of what does not differ.
    assert "base weights" not in message
    assert "classes" not in message


def test_several_differences_in_one_line(folder: Path, tmp_path: Path) -> None:
    lora = adapted(folder, r=4, layers=[0], bias="all")
    told_file = save(lora, tmp_path / "adapter") / "fedlora.json"
    told = json.loads(told_file.read_text())
    told |= {"base_model_sha256": "0" * 64, "class_names": ["a", "b"]}
    told_file.write_text(json.dumps(told))
    message = differences(tmp_path / "adapter", adapted(folder))
    for part in ("other base weights", "2 classes, here are 3", "rank 4", "not there", "bias"):
        assert part in message


def test_other_base_weights(folder: Path, tmp_path: Path) -> None:
    save(own(folder), tmp_path / "adapter")
    lora = own(folder)
    lora.unload()
    with torch.no_grad():
        lora.federated.backbone.visual_projection.weight[0, 0] += 1
    again = CLIPLoRAWrapper(lora.federated, lora.config).apply()
    shake(again)
    message = differences(tmp_path / "adapter", again)
    assert "trained on other base weights" in message
    assert message.count(";") == 0
    # The hash is that of the model without its adapter.
    lora = own(folder)
    shake(lora)
    load_adapter(tmp_path / "adapter", lora)


def test_classes_in_another_order_are_other_classes(folder: Path, tmp_path: Path) -> None:
    told_file = save(adapted(folder), tmp_path / "adapter") / "fedlora.json"
    told = json.loads(told_file.read_text())
    told["class_names"].reverse()
    told_file.write_text(json.dumps(told))
    message = differences(tmp_path / "adapter", adapted(folder))
    assert "its class 0 is 'a very round two', here 'zero'" in message


def test_a_head_of_another_shape(folder: Path, tmp_path: Path) -> None:
    save(own(folder, classes=4), tmp_path / "adapter")
    message = differences(tmp_path / "adapter", own(folder))
    todo = "(it has 4 classes: use the data it was trained on)"
    assert f"head.weight has shape (4, 20) there, (3, 20) here {todo}" in message
    assert f"head.bias has shape (4,) there, (3,) here {todo}" in message


def test_other_tensors_of_another_shape(tmp_path: Path) -> None:
    save(resnet(), tmp_path / "adapter")
    lora = resnet()
    state = lora.state()
    name, value = next((n, t) for n, t in state.other.items() if t.ndim)
    wrong = replace(state, other={**state.other, name: torch.cat([value, value])})
    export_adapter(tmp_path / "adapter", lora, wrong, {})
    message = differences(tmp_path / "adapter", lora)
    assert re.search(rf"{name} has shape .* here \(use the model that it was trained on\)", message)


def test_another_weight_below_a_head_with_lora(folder: Path, tmp_path: Path) -> None:
    settings = {"target_components": ["encoder", "classifier"]}
    save(adapted(folder, **settings), tmp_path / "adapter")
    lora = adapted(folder, **settings)
    layer = lora.layers["classifier"].get_base_layer()
    with torch.no_grad():
        layer.weight.add_(1e-6)  # the noise of another machine
        load_adapter(tmp_path / "adapter", lora)
        layer.weight.add_(0.1)
    message = differences(tmp_path / "adapter", lora)
    assert "the weight of the head 'classifier' below LoRA has other values" in message


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("halved", ["there", "here"])
def test_a_head_with_lora_in_half_precision(
    halved: str, half: torch.dtype, folder: Path, tmp_path: Path
) -> None:
    components = ["encoder", "classifier"]
    there, here = (adapted(folder, target_components=components) for _ in range(2))
    shake(there)
    (there if halved == "there" else here).federated.to(half)
    save(there, tmp_path / "adapter")
    assert list(_heads(read_adapter(tmp_path / "adapter"), here)) == []
    with torch.no_grad():
        here.layers["classifier"].get_base_layer().weight.mul_(1.05)
    (message,) = _heads(read_adapter(tmp_path / "adapter"), here)
    assert "has other values" in message


def test_a_text_head_has_no_use_for_a_linear_one(folder: Path, tmp_path: Path) -> None:
    lora = adapted(folder)
    shake(lora)
    save(lora, tmp_path / "adapter")
    text = adapted(folder, head="text")
    load_adapter(tmp_path / "adapter", text)
    assert torch.equal(text.state().A[FC1], lora.state().A[FC1])


def test_a_tower_that_the_head_leaves_idle_may_be_missing(folder: Path, tmp_path: Path) -> None:
    lora = CLIPLoRAWrapper(
        adapted(folder, towers="both", enabled=False).unload(),
        LoRAConfig(r=3, lora_alpha=6, lora_dropout=0.0),
    ).apply()
    assert lora.idle_text
    shake(lora)
    save(lora, tmp_path / "adapter")
    load_adapter(tmp_path / "adapter", adapted(folder))  # vision only
    peft_adapter(folder, tmp_path / "peft")  # both
    load_adapter(tmp_path / "peft", lora)
    assert "adapted there and not here" in differences(tmp_path / "peft", adapted(folder))


def test_layers_of_other_widths(tmp_path: Path) -> None:
    save(resnet(), tmp_path / "adapter")
    model = SmallResNet(classes=5)
    lora = LoRAWrapper(model, LoRAConfig(r=2, lora_alpha=6)).apply()
    message = differences(tmp_path / "adapter", lora)
    assert "layer fc is 4 x 8 there, 5 x 8 here" in message


def test_patterns_that_do_not_match(folder: Path, tmp_path: Path) -> None:
    cls = CLIPVisionModelWithProjection
    peft_adapter(folder, tmp_path / "rank", cls, rank_pattern={"fc1": 5})
    message = differences(tmp_path / "rank", adapted(folder))
    assert "2 layers (such as" in message
    assert "rank_pattern gives its layers different settings" in message
    peft_adapter(folder, tmp_path / "alpha", cls, alpha_pattern={"fc1": 5})
    message = differences(tmp_path / "alpha", adapted(folder))
    assert "alpha_pattern gives its layers different settings" in message


@pytest.mark.parametrize("phase", ["off", "merged", "unloaded"])
def test_an_adapter_that_is_not_on(phase: str, folder: Path, tmp_path: Path) -> None:
    save(adapted(folder), tmp_path / "adapter")
    lora = adapted(folder)
    {
        "off": lora.disable_lora_layers,
        "merged": lora.merge_and_unload,
        "unloaded": lora.unload,
    }[phase]()
    with pytest.raises(FedloraError, match=r"this adapter (is|was)"):
        load_adapter(tmp_path / "adapter", lora)


# What is no adapter, or was damaged.


def test_what_is_no_adapter_folder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FedloraError, match=r"gone': there is no such folder\. Check the path"):
        read_adapter(tmp_path / "gone")
    with pytest.raises(FedloraError, match=r"is no adapter folder: .*Check the path"):
        read_adapter(tmp_path)
    save(adapted(folder), tmp_path / "adapter")
    with pytest.raises(FedloraError, match=rf"Give {tmp_path}/adapter\."):
        read_adapter(tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "classifier.safetensors"])
@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_a_damaged_file_beside_fedlora_json(
    name: str, how: str, folder: Path, tmp_path: Path
) -> None:
    file = save(adapted(folder), tmp_path / "adapter") / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(content if how == "flip" else content[:-9])
    message = differences(tmp_path / "adapter", adapted(folder))
    assert "damaged" in message
    assert f"{name} is missing" in message if how == "gone" else f"{name} is not what" in message


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_a_damaged_file_of_peft(
    content: bytes | None, safe: bool, folder: Path, tmp_path: Path
) -> None:
    peft_adapter(folder, tmp_path / "peft", safe=safe)
    file = tmp_path / "peft" / ("adapter_model.safetensors" if safe else "adapter_model.bin")
    file.write_bytes(file.read_bytes()[:-50] if content is None else content)
    with pytest.raises(FedloraError, match=f"{file.name} is damaged"):
        read_adapter(tmp_path / "peft")
    file.unlink()
    with pytest.raises(FedloraError, match=r"has no adapter_model\.safetensors"):
        read_adapter(tmp_path / "peft")


class Evil:
    def __reduce__(self) -> Any:
        return (open, ("/tmp/fedlora_was_here", "w"))


def test_nothing_is_executed(folder: Path, tmp_path: Path) -> None:
    peft_adapter(folder, tmp_path / "peft", safe=False)
    torch.save({"a": Evil()}, tmp_path / "peft/adapter_model.bin")
    with pytest.raises(FedloraError, match="damaged"):
        read_adapter(tmp_path / "peft")
    assert not Path("/tmp/fedlora_was_here").exists()
    torch.save(["no dict"], tmp_path / "peft/adapter_model.bin")
    with pytest.raises(FedloraError, match="something else than named tensors"):
        read_adapter(tmp_path / "peft")


@pytest.mark.parametrize("name", ["adapter_config.json", "fedlora.json"])
@pytest.mark.parametrize("content", ["", "[]", "{", "\xff"])
def test_damaged_json(name: str, content: str, folder: Path, tmp_path: Path) -> None:
    save(adapted(folder), tmp_path / "adapter")
    (tmp_path / "adapter" / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(FedloraError, match="damaged"):
        read_adapter(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"r": None}, "no usable r"),
        ({"r": 0}, "no usable r"),
        ({"lora_alpha": "much"}, "no usable r"),
        ({"lora_alpha": 10**400}, r"no usable r and lora_alpha \(OverflowError\)"),
        ({"lora_alpha": math.inf}, "no usable r"),
        ({"lora_alpha": math.nan}, "no usable r"),
        ({"rank_pattern": [1]}, "no usable r"),
    ],
    ids=str,
)
def test_a_config_that_makes_no_sense(
    change: dict[str, Any], said: str, folder: Path, tmp_path: Path
) -> None:
    peft_adapter(folder, tmp_path / "peft")
    file = tmp_path / "peft/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(FedloraError, match=said):
        read_adapter(tmp_path / "peft")


@pytest.mark.parametrize("told", [{"format": 2}, {"format": None}, {"sha256": None}])
def test_another_format(told: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    file = save(adapted(folder), tmp_path / "adapter") / "fedlora.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | told))
    with pytest.raises(FedloraError, match=r"this version reads 1\. Use the version of fedlora"):
        read_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_values_must_be_finite(value: float, factor: str, folder: Path, tmp_path: Path) -> None:
    peft_adapter(folder, tmp_path / "peft")
    file = tmp_path / "peft/adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"base_model.model.{FC1}.lora_{factor}.weight"][0, 0] = value
    save_file(tensors, file)
    with pytest.raises(FedloraError, match=f"{FC1}.lora_{factor}.weight has values that are NaN"):
        read_adapter(tmp_path / "peft")


def test_factors_that_are_no_pair(folder: Path, tmp_path: Path) -> None:
    peft_adapter(folder, tmp_path / "peft")
    file = tmp_path / "peft/adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[f"base_model.model.{FC1}.lora_B.weight"]
    save_file(tensors, file)
    with pytest.raises(FedloraError, match=f"the factors of {FC1} are not a pair"):
        read_adapter(tmp_path / "peft")


@pytest.mark.parametrize("shape", [(), (3,), (2, 24), (3, 24, 1, 1)])
def test_factors_of_another_shape(shape: tuple[int, ...], folder: Path, tmp_path: Path) -> None:
    peft_adapter(folder, tmp_path / "peft")
    file = tmp_path / "peft/adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"base_model.model.{FC1}.lora_A.weight"] = torch.ones(shape)
    save_file(tensors, file)
    if len(shape) == 4:  # that of a convolution of 1 x 1, which is the same
        assert read_adapter(tmp_path / "peft").state.A[FC1].shape == (3, 24)
        return
    with pytest.raises(FedloraError, match=f"the factors of {FC1} are not a pair"):
        read_adapter(tmp_path / "peft")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lora": 5}, "lora in fedlora.json is 5"),
        ({"lora": [1]}, "lora in fedlora.json is [1]"),
        ({"lora": {"target_components": 5}}, "lora.target_components in fedlora.json is 5"),
        ({"class_names": 5}, "class_names in fedlora.json is 5"),
        ({"class_names": "abc"}, "class_names in fedlora.json is 'abc'"),
        ({"head_lora": 3}, "head_lora in fedlora.json is 3"),
        ({"head_lora": {"layer": "x", "scaling": 10**400}}, "do not agree on the head"),
        ({"head_lora": {"layer": "x", "scaling": math.nan}}, "do not agree on the head"),
        ({"lora": 5, "class_names": 5}, "lora in fedlora.json is 5; class_names in"),
        ({"sha256": {"x" * 300: ""}}, "cannot be read (File name too long)"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_fedlora_json_with_values_of_other_types(
    change: dict[str, Any], said: str, folder: Path, tmp_path: Path
) -> None:
    lora = adapted(folder, target_components=["encoder", "classifier"])
    file = save(lora, tmp_path / "adapter") / "fedlora.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    message = differences(tmp_path / "adapter", lora)
    assert said in message
    assert "damaged" in message


@pytest.mark.parametrize("change", [{"lora": None}, {"class_names": None}, {"head_lora": None}])
def test_what_fedlora_json_may_leave_open(
    change: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    lora = adapted(folder)
    file = save(lora, tmp_path / "adapter") / "fedlora.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert_same(read_adapter(tmp_path / "adapter").state, lora.state())


def test_no_file_from_outside_of_the_folder(folder: Path, tmp_path: Path) -> None:
    file = save(adapted(folder), tmp_path / "adapter") / "fedlora.json"
    for name in ("../outside", "/dev/zero"):
        told = json.loads(file.read_text())
        told["sha256"][name] = "0" * 64
        (tmp_path / "outside").write_text("x")
        file.write_text(json.dumps(told))
        with pytest.raises(FedloraError, match="is missing"):
            read_adapter(tmp_path / "adapter")


def test_a_file_that_fedlora_json_does_not_know_is_not_read(folder: Path, tmp_path: Path) -> None:
    lora = adapted(folder)
    target = save(lora, tmp_path / "adapter")
    save_file({"x": torch.ones(1)}, target / "other.safetensors")
    assert_same(read_adapter(target).state, lora.state())


def test_what_a_kill_left_of_a_swap_is_read(folder: Path, tmp_path: Path) -> None:
    lora = adapted(folder)
    target = save(lora, tmp_path / "adapter")
    target.rename(tmp_path / ".adapter.old")
    assert_same(read_adapter(target).state, lora.state())
    shutil.rmtree(tmp_path / ".adapter.old")


def test_predictions_are_the_same(folder: Path, tmp_path: Path) -> None:
    lora = adapted(folder, bias="all")
    shake(lora)
    fresh = adapted(folder, bias="all")
    load_adapter(save(lora, tmp_path / "adapter"), fresh)
    with torch.no_grad():
        one, two = (x.federated.eval()(pictures(8)) for x in (lora, fresh))
    assert torch.equal(one, two)
