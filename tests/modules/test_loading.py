from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedlora.errors import FedloraError
from fedlora.modules.families import SUPPORTED_TEXT
from fedlora.modules.loading import (
    empty_clip,
    load_clip,
    load_config,
    load_preprocess_config,
    load_tokenizer,
    resolve,
    weights_sha256,
)
from tests.small_siglip import make_siglip

LOADERS = [load_clip, load_tokenizer, load_preprocess_config]


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random SigLIP on disk; never written to."""
    return make_siglip(tmp_path_factory.mktemp("siglip") / "small")


def line(load: Callable[[str], object], name: str | Path) -> str:
    """The one line that a failing load ends with."""
    with pytest.raises(FedloraError) as error:
        load(str(name))
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"model_name {str(name)!r}")
    assert message.endswith(".")
    return message


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_the_embedded_model_loads() -> None:
    model = load_clip("tiny-clip")
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.text_model is not None
    assert len(load_tokenizer("tiny-clip")) == model.config.text_config.vocab_size
    size = load_preprocess_config("tiny-clip")["crop_size"]["height"]
    assert size == model.config.vision_config.image_size


def test_a_local_folder_loads(folder: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    loaded = load_clip(str(folder)).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    assert load_tokenizer(str(folder))("zero")["input_ids"]
    assert load_preprocess_config(str(folder))["size"] == {"shortest_edge": 16}


def test_a_folder_under_home_loads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve(f"~/{folder.name}") == str(folder)
    assert load_clip(f"~/{folder.name}").config.projection_dim == 20


@pytest.mark.parametrize("load", [*LOADERS, load_config, empty_clip])
def test_a_home_folder_that_nobody_has(load: Callable[[str], object]) -> None:
    assert "there is no home folder for '~nosuchuser'" in line(load, "~nosuchuser/x")


def test_settings_inside_a_processor_config_are_found(copy: Path) -> None:
    inner = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").unlink()
    (copy / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
    assert load_preprocess_config(str(copy)) == inner


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "~/nothing"])
def test_a_missing_folder(load: Callable[[str], object], name: str) -> None:
    assert "there is no such folder" in line(load, name)


@pytest.mark.parametrize(
    ("load", "file", "reason"),
    [
        (load_clip, "config.json", "config.json"),
        (empty_clip, "config.json", "config.json"),
        (load_clip, "model.safetensors", "no file named model.safetensors"),
        (load_tokenizer, "tokenizer*.json", "tokenizer.json"),
        (load_preprocess_config, "preprocessor_config.json", "no preprocessor_config.json"),
    ],
)
def test_a_folder_that_lacks_a_file(
    load: Callable[[str], object], file: str, reason: str, copy: Path
) -> None:
    for path in copy.glob(file):
        path.unlink()
    message = line(load, copy)
    assert reason in message
    assert "CLIPModel.save_pretrained" in message


@pytest.mark.parametrize("text", ["", "{oops", "[1, 2]"])
@pytest.mark.parametrize(
    ("load", "file"),
    [
        (load_clip, "config.json"),
        (load_tokenizer, "tokenizer.json"),
        (load_preprocess_config, "preprocessor_config.json"),
    ],
)
def test_a_file_that_is_not_what_it_should_be(
    load: Callable[[str], object], file: str, text: str, copy: Path
) -> None:
    (copy / file).write_text(text)
    assert "cannot be loaded" in line(load, copy)


@pytest.mark.parametrize("kept", [0, 5, 1000])
def test_damaged_weights(kept: int, copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert "deserializing header" in line(load_clip, copy)


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        ({"num_hidden_layers": 3}, "vision_model.encoder.layers.2.layer_norm1.bias"),  # missing
        ({"intermediate_size": 48}, "vision_model.encoder.layers.0.mlp.fc1.bias"),  # other shape
    ],
)
def test_weights_that_do_not_fit_the_config(
    change: dict[str, int], tensor: str, copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    vision = json.loads((copy / "config.json").read_text())["vision_config"]
    edit(copy / "config.json", vision_config=vision | change)
    assert f"such as {tensor}" in line(load_clip, copy)
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("load", [load_clip, load_config, empty_clip])
@pytest.mark.parametrize("kind", ["bert", "siglip2", "clip_vision_model"])
def test_another_kind_of_model(load: Callable[[str], object], kind: str, copy: Path) -> None:
    edit(copy / "config.json", model_type=kind)
    assert line(load, copy) == (
        f"model_name '{copy}' is a '{kind}' model; supported: {SUPPORTED_TEXT}. Choose one of "
        "these."
    )


def test_a_kind_of_model_that_transformers_does_not_know(copy: Path) -> None:
    edit(copy / "config.json", model_type="nonsense")
    assert "nonsense" in line(load_clip, copy)


def test_a_bert_folder(tmp_path: Path) -> None:
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path)
    assert f"is a 'bert' model; supported: {SUPPORTED_TEXT}" in line(load_config, tmp_path)


def test_a_siglip_folder_loads(siglip: Path) -> None:
    from safetensors.torch import load_file
    from transformers import SiglipModel

    model = load_clip(str(siglip))
    assert isinstance(model, SiglipModel)
    assert not model.training
    weights, loaded = load_file(siglip / "model.safetensors"), model.state_dict()
    assert weights.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    assert load_config(str(siglip)).text_config.max_position_embeddings == 24
    assert load_preprocess_config(str(siglip))["size"] == {"height": 16, "width": 16}


def test_a_siglip_without_a_pooling_head(siglip: Path, tmp_path: Path) -> None:
    shutil.copytree(siglip, tmp_path / "copy")
    vision = json.loads((siglip / "config.json").read_text())["vision_config"]
    edit(tmp_path / "copy/config.json", vision_config=vision | {"vision_use_head": False})
    for load in (load_clip, load_config, empty_clip):
        assert "has no pooling head (vision_use_head is false" in line(load, tmp_path / "copy")


@pytest.mark.parametrize("family", ["folder", "siglip"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_empty_model_needs_only_its_config(
    family: str, dtype: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from safetensors.torch import load_file

    full: Path = request.getfixturevalue(family)
    shutil.copy(full / "config.json", tmp_path)
    vision = json.loads((full / "config.json").read_text())["vision_config"]
    edit(tmp_path / "config.json", dtype=dtype, vision_config=vision | {"dtype": dtype})
    random = torch.get_rng_state()
    model = empty_clip(str(tmp_path))
    assert torch.equal(torch.get_rng_state(), random)
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    # As many numbers as transformers wrote into the file, under the same names.
    saved = load_file(full / "model.safetensors")
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: t.shape for n, t in saved.items()
    }
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("name", ["openai/clip-vit-base-patch32", "nobody/nothing", "a/b/c"])
def test_a_hub_name_that_cannot_be_had_offline(load: Callable[[str], object], name: str) -> None:
    message = line(load, name)
    assert "could not be had" in message
    assert "'tiny-clip'" in message


def test_an_unreachable_hub_is_not_asked_again_and_again() -> None:
    """A process of its own: HF_HUB_OFFLINE is read once, and here it must not be set."""
    script = """if True:
        import time

        def wait(seconds):
            raise SystemExit(f"waited for {seconds} s to ask again")

        time.sleep = wait
        from fedlora.errors import FedloraError
        from fedlora.modules import loading
        for load in (loading.load_clip, loading.load_preprocess_config, loading.load_tokenizer):
            try:
                load("openai/clip-vit-base-patch32")
            except FedloraError as error:
                assert "could not be had" in str(error), error
            else:
                raise SystemExit("loaded")
    """
    surroundings = {
        name: value
        for name, value in os.environ.items()
        if name not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") and "proxy" not in name.lower()
    }
    # A port where nobody listens, and an empty cache: the same on every machine.
    surroundings |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=surroundings,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Retrying" not in done.stderr


def test_equal_weights_have_equal_hashes_and_one_bit_makes_another(folder: Path) -> None:
    model, again = load_clip(str(folder)), load_clip(str(folder))
    digest = weights_sha256(model)
    assert len(digest) == 64
    assert weights_sha256(again) == digest
    weight = again.vision_model.encoder.layers[1].mlp.fc1.weight.detach()
    bits = weight.view(torch.int32)
    bits[3, 2] ^= 1
    assert weights_sha256(again) != digest
    bits[3, 2] ^= 1
    assert weights_sha256(again) == digest


def test_the_hash_sees_names_types_and_shapes_but_not_storage() -> None:
    def digest(**tensors: torch.Tensor) -> str:
        module = torch.nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return weights_sha256(module)

    x = torch.arange(6.0).view(2, 3)
    transposed = x.T.contiguous().T  # equal values, another order in memory
    assert digest(a=x) == digest(a=transposed)
    assert digest(a=x, b=x + 1) == digest(b=x + 1, a=x)
    others = [digest(b=x), digest(a=x.view(3, 2)), digest(a=x.int()), digest(a=x.double())]
    assert len({digest(a=x), *others}) == 5
