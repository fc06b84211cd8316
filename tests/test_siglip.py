"""SigLIP and SigLIP 2 folders go through everything that CLIP does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import normalize
from transformers import AutoProcessor, SiglipModel

from fedlora import CLIPLoRAWrapper, FederatedCLIPModel, FedloraError, LoRAConfig, quick_clip_lora
from fedlora.main import main
from tests.small_siglip import SIZE, TEXT, VISION, make_siglip

NAMES = ["zero", "one", "two", "three"]


@pytest.fixture(scope="module", params=["siglip", "siglip2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("siglip") / request.param
    return make_siglip(path, gemma=request.param == "siglip2")


def pictures(count: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 20, 30), generator=generator, dtype=torch.uint8)


@torch.no_grad()
def test_the_text_head_answers_as_transformers_does(folder: Path) -> None:
    model = FederatedCLIPModel(folder, head="text", class_names=NAMES).eval()
    plain, processor = (
        SiglipModel.from_pretrained(folder).eval(),
        AutoProcessor.from_pretrained(folder),
    )
    prompts = [f"a photo of a {name}." for name in NAMES]
    inputs = processor(
        text=prompts,
        images=list(pictures()),
        padding="max_length",
        max_length=plain.config.text_config.max_position_embeddings,
        return_tensors="pt",
    )
    out = plain(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
    # The bias is the same for every class.
    expected = out.logits_per_image - plain.logit_bias
    torch.testing.assert_close(model(inputs["pixel_values"]), expected, atol=1e-4, rtol=1e-4)
    close = model(model.preprocess.resize(pictures())) - expected  # resized by us, not by PIL
    assert close.abs().max() < 0.05 * expected.abs().max()


def test_wrapping_training_merging(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = quick_clip_lora(str(folder), class_names=NAMES, lora_r=3, head="text")
    wrapper = model.lora_wrapper
    # fc1 and fc2 of both towers, two blocks each.
    assert wrapper.report().adapter == 3 * 2 * 2 * (VISION + 40 + TEXT + 36)
    labels = torch.arange(4)
    untrained = model.evaluate(pictures(), labels)
    losses = [model.train_step(pictures(), labels, lr=1e-2) for _ in range(6)]
    assert losses[-1] < losses[0]
    moved = {n: t for n, t in model.get_parameters().items() if "lora_B" in n}
    assert all((t != 0).any() for t in moved.values())  # both towers get gradients
    with wrapper.lora_disabled():
        assert model.evaluate(pictures(), labels) == untrained
    tuned = model.evaluate(pictures(), labels)["loss"]
    merged = wrapper.merge_and_unload()
    assert merged.evaluate(pictures(), labels)["loss"] == pytest.approx(tuned, abs=1e-5)
    merged.clip.save_pretrained(tmp_path / "merged")
    again = SiglipModel.from_pretrained(tmp_path / "merged")
    pixels = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(
            again.eval().vision_model(pixel_values=pixels).pooler_output,
            merged.clip.eval().vision_model(pixel_values=pixels).pooler_output,
        )


def test_a_run_from_the_command_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [
        f"--model.model_name={folder}",
        "--trainer.max_rounds=1",
        "--trainer.limit_train_batches=1",
        "--data.num_clients=2",
        "--quiet",
    ]
    assert main(["fit", "--config", "clip_lora.yaml", *options]) == 0
    adapter = Path("runs/version_0/adapter")
    told = json.loads((adapter / "fedlora.json").read_text())
    assert told["preprocessing"]["crop"] is False
    plain = SiglipModel.from_pretrained(folder).eval()
    with torch.no_grad():
        before = plain.vision_model(pixel_values=torch.ones(1, 3, SIZE, SIZE)).pooler_output
        loaded = PeftModel.from_pretrained(plain, adapter).eval()
        after = loaded.vision_model(pixel_values=torch.ones(1, 3, SIZE, SIZE)).pooler_output
    assert not torch.allclose(normalize(before, dim=-1), normalize(after, dim=-1), atol=1e-6)


def test_full_training_exports_what_transformers_loads(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--trainer.max_rounds=1", "--trainer.limit_train_batches=1", "--quiet"]
    options += [f"--model.model_name={folder}", "--model.lora.enabled=false"]
    assert main(["fit", "--config", "clip_lora.yaml", "--data.num_clients=2", *options]) == 0
    from transformers import SiglipVisionModel

    loaded, info = SiglipVisionModel.from_pretrained(
        "runs/version_0/adapter/model", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert loaded.config.hidden_size == VISION


def test_naflex_is_refused_with_the_list(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip2"}))
    (tmp_path / "preprocessor_config.json").write_text(
        (folder / "preprocessor_config.json").read_text()
    )
    with pytest.raises(FedloraError, match=r"CLIP \(clip\), SigLIP and fixed-resolution SigLIP 2"):
        FederatedCLIPModel(tmp_path, num_classes=3)


def test_an_own_class_around_siglip(folder: Path) -> None:
    class Mine(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = SiglipModel.from_pretrained(folder)

        def get_parameters(self) -> dict[str, torch.Tensor]:
            return {name: tensor.clone() for name, tensor in self.state_dict().items()}

    mine = Mine()
    CLIPLoRAWrapper(mine, LoRAConfig(r=2), towers="vision").apply_lora_to_federated_model()
    given = mine.get_parameters()
    assert len(given) == 2 * 2 * 2
    assert all("vision_model.encoder.layers" in name for name in given)
