"""The calls that users write, one after the other, on the embedded model and at ViT-B/32's size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.vit_folder import PARAMETERS, make_vit_b32_folder
from PIL import Image
from torch import Tensor
from transformers import CLIPModel

from fedlora import (
    CLIPLoRAWrapper,
    FederatedCLIPModel,
    FedloraError,
    LoRAConfig,
    LoRAConfigManager,
    LoRAModelManager,
    create_model,
    quick_clip_lora,
)
from fedlora.modules.loading import resolve

SIZES = {"tiny": "tiny-clip", "folder": resolve("tiny-clip"), "vit-b32": ""}


@pytest.fixture(
    scope="module", params=["tiny", "folder", pytest.param("vit-b32", marks=pytest.mark.slow)]
)
def model_name(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    if request.param != "vit-b32":
        return SIZES[request.param]
    return str(make_vit_b32_folder(tmp_path_factory.mktemp("vit") / "b32"))


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def pictures(count: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (count, 3, 40, 30), generator=generator, dtype=torch.uint8)
    return data, torch.arange(count) % 10


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_every_call_as_it_is_written(model_name: str, tmp_path: Path) -> None:
    data, labels = pictures()
    torch.manual_seed(0)

    # 1. One line
    model = quick_clip_lora(model_name=model_name, num_classes=10, lora_r=16)
    assert isinstance(model, FederatedCLIPModel)
    report = model.lora_wrapper.report()
    # r (d_in + d_out) of fc1 and fc2 in each block of both towers, and the head apart.
    vision, text = model.clip.config.vision_config, model.clip.config.text_config
    per_rank = sum(
        c.num_hidden_layers * 2 * (c.hidden_size + c.intermediate_size) for c in (vision, text)
    )
    assert report.adapter == 16 * per_rank
    if report.total > PARAMETERS:
        assert report.total == PARAMETERS + 10 * 513
        assert report.adapter == 2_457_600
        assert report.percent == pytest.approx(1.63, abs=0.01)
        assert report.reduction > 98

    # 5. The federated interface
    params = model.get_parameters()
    assert all(t.device.type == "cpu" for t in params.values())
    exchanged = sum(t.numel() for t in params.values())
    assert exchanged == report.exchanged < report.trained  # the text tower is idle: it stays
    model.set_parameters(params)
    before = model.get_parameters()
    losses = [model.train_step(data, labels) for _ in range(2)]
    assert losses[1] < losses[0]
    assert not same(before, model.get_parameters())
    metrics = model.evaluate(data, labels)
    assert metrics["num_samples"] == 2
    assert metrics["accuracy"] == metrics["num_correct"] / 2
    assert 0 < metrics["loss"] < losses[0]
    del model

    # 2. Wrap an existing model; its interface stays what it was
    original = FederatedCLIPModel(model_name=model_name, num_classes=10)
    full = original.get_parameters()
    kind, loss = type(original), original.evaluate(data, labels)["loss"]
    config = LoRAConfig.for_clip_model(r=16, lora_alpha=32)
    config.save_only_trainable = True
    wrapper = CLIPLoRAWrapper(
        federated_clip_model=original, lora_config=config, target_components=["encoder"]
    )
    wrapper.apply_lora_to_federated_model()
    assert type(original) is kind
    assert original.evaluate(data, labels)["loss"] == loss  # B is zero
    assert original.get_parameters().keys() == params.keys()
    original.train_step(data, labels, lr=1e-2)

    # 3. Named configs
    manager = LoRAConfigManager()
    manager.save_config(LoRAConfig.for_clip_model(r=8, lora_alpha=16), "clip_small")
    config = manager.load_config("clip_small")
    assert config == LoRAConfig.small()

    # 4. Named adapters
    models = LoRAModelManager()
    models.save_model(wrapper, "my_clip_lora_model")
    trained = original.get_parameters()
    original.set_parameters(params)
    models.load_model("my_clip_lora_model", wrapper)
    assert same(original.get_parameters(), trained)
    info = models.get_model_info("my_clip_lora_model")
    assert info["base_model"] == model_name
    assert info["config"]["r"] == 16
    assert info["counts"]["adapter"] == report.adapter

    # 6. Advanced
    wrapper.enable_gradient_checkpointing()
    original.train_step(data, labels)
    wrapper.disable_gradient_checkpointing()
    trained, tuned = original.get_parameters(), original.evaluate(data, labels)
    wrapper.disable_lora_layers()
    assert original.evaluate(data, labels)["loss"] == loss  # the original weights answer
    assert same(original.get_parameters(), full)  # the full model when LoRA is off
    del full
    wrapper.enable_lora_layers()
    assert same(original.get_parameters(), trained)
    assert original.evaluate(data, labels) == tuned
    logits = original.eval()(data_for(original, data))
    merged = wrapper.merge_and_unload()
    torch.testing.assert_close(merged(data_for(original, data)), logits, atol=1e-5, rtol=1e-5)
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert not any("lora" in name or "base_layer" in name for name in merged.state_dict())
    merged.clip.save_pretrained(tmp_path / "merged")
    pixels = merged.preprocess.normalise(data_for(merged, data))
    plain = CLIPModel.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(
        plain.visual_projection(plain.vision_model(pixel_values=pixels).pooler_output),
        merged.clip.visual_projection(merged.clip.vision_model(pixel_values=pixels).pooler_output),
    )


def data_for(model: FederatedCLIPModel, data: Tensor) -> Tensor:
    return model.preprocess.resize(data)


def test_the_factory_takes_the_configuration_of_existing_projects(model_name: str) -> None:
    # 7. The factory
    model = create_model(
        {
            "model": {"type": "clip_lora", "model_name": model_name, "num_classes": 10},
            "lora": {
                "enabled": True,
                "r": 16,
                "lora_alpha": 32,
                "target_components": ["encoder"],
                "save_only_trainable": True,
            },
        }
    )
    assert isinstance(model, FederatedCLIPModel)
    assert model.lora_wrapper.config.r == 16
    assert all("lora_" in name or "classifier." in name for name in model.get_parameters())


@pytest.mark.parametrize("components", [["encoder"], ["encoder", "classifier"]])
def test_the_head_travels_or_its_adapter_does(components: list[str]) -> None:
    model = quick_clip_lora("tiny-clip", 10, lora_r=4, target_components=components)
    head = {name for name in model.get_parameters() if name.startswith("classifier.")}
    if components == ["encoder"]:
        assert head == {"classifier.weight", "classifier.bias"}
    else:  # with the head's own preset
        assert head == {f"classifier.lora_{factor}.default.weight" for factor in "AB"}
        assert model.get_parameters()["classifier.lora_A.default.weight"].shape[0] == 8
        assert model.lora_wrapper.scaling["classifier"] == 2


def test_pictures_in_every_form_are_the_same_pictures() -> None:
    model = quick_clip_lora("tiny-clip", 10, lora_r=2)
    data, labels = pictures(3)
    arrays = data.permute(0, 2, 3, 1).numpy()
    images = [Image.fromarray(array) for array in arrays]
    expected = model.evaluate(data, labels)
    for form in (arrays, images, list(arrays), list(data)):
        assert model.evaluate(form, labels) == expected
    for given in (labels.tolist(), labels.numpy(), np.int32(labels.numpy())):
        assert model.evaluate(data, given) == expected
    normalised = model.preprocess.normalise(model.preprocess.resize(data))
    assert model.evaluate(normalised, labels) == expected


def test_the_optimizer_is_reset_by_set_parameters() -> None:
    def two_steps(reset: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = quick_clip_lora("tiny-clip", 10, lora_r=2, lora_dropout=0.0)
        for _ in range(2):
            model.train_step(*pictures(), lr=1e-2)
            if reset:
                model.set_parameters(model.get_parameters())
        return model.get_parameters()

    assert not same(two_steps(True), two_steps(False))
    assert same(two_steps(True), two_steps(True))


def test_without_save_only_trainable_everything_travels() -> None:
    model = FederatedCLIPModel("tiny-clip", 10)
    full = sum(t.numel() for t in model.get_parameters().values())
    config = LoRAConfig(r=4, save_only_trainable=False)
    wrapper = CLIPLoRAWrapper(model, config)
    wrapper.apply_lora_to_federated_model()
    params = model.get_parameters()
    assert sum(t.numel() for t in params.values()) == full + wrapper.report().adapter
    model.train_step(*pictures())
    model.set_parameters(params)
    assert same(model.get_parameters(), params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("classifier.bias"), "'classifier.bias' is missing"),
        (lambda p: p.update(more=torch.zeros(1)), "'more' is unknown here"),
        (
            lambda p: p.update({"classifier.bias": torch.zeros(9)}),
            r"shape \(9,\), expected \(10,\)",
        ),
        (lambda p: p.update({"classifier.bias": torch.zeros(10).half()}), "float16, expected"),
        (lambda p: p["classifier.bias"].fill_(float("nan")), "'classifier.bias' has values that"),
        (lambda p: p.update({"classifier.bias": [0.0] * 10}), "'classifier.bias' is a list"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_half_set(change: object, message: str) -> None:
    model = quick_clip_lora("tiny-clip", 10, lora_r=2)
    model.train_step(*pictures())
    before = model.get_parameters()
    given = {name: t + 1 for name, t in before.items()}
    change(given)  # type: ignore[operator]
    with pytest.raises(FedloraError, match=message):
        model.set_parameters(given)
    assert same(model.get_parameters(), before)


def test_nothing_to_train_is_said() -> None:
    model = FederatedCLIPModel("tiny-clip", 10).requires_grad_(False)
    with pytest.raises(FedloraError, match="nothing in this model wants gradients"):
        model.train_step(*pictures())
    with pytest.raises(FedloraError, match="lr must be a number from 0, got -1"):
        FederatedCLIPModel("tiny-clip", 10).train_step(*pictures(), lr=-1)
