from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    BlipConfig,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipConfig,
    SiglipModel,
)

from fedlora.errors import FedloraError
from fedlora.main import main
from fedlora.modules.classifier import CLIPLoRAClassifier
from fedlora.modules.config import Bias, LoRAConfig
from fedlora.tools import info
from fedlora.tools.info import IGNORED, RANKS, measure, show

DIM = 512  # of the features that images and texts share


@pytest.fixture(scope="module")
def b32(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder that holds no more than the config.json of ViT-B/32: transformers' defaults."""
    folder = tmp_path_factory.mktemp("hub") / "vit-b-32"
    CLIPConfig().save_pretrained(folder)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    return str(folder)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def per_rank(config: Any, placement: str, blocks: int | None = None) -> int:
    """Of one tower: an adapter of a layer from d_in to d_out has r (d_in + d_out) parameters."""
    width, mlp = config.hidden_size, config.intermediate_size
    of = {"mlp": 2 * (width + mlp), "attention": 4 * (width + width)}
    of["all"] = of["mlp"] + of["attention"]
    return of[placement] * (config.num_hidden_layers if blocks is None else blocks)


def rows(sizes: dict[str, Any], towers: str) -> dict[int, dict[str, Any]]:
    return {row["r"]: row for row in sizes["rows"] if row["towers"] == towers}


def ask(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    """What ``info --json`` prints, which must be one JSON object and nothing else."""
    assert main(["info", "--json", *args]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return dict(json.loads(captured.out))


@pytest.mark.parametrize("placement", ["mlp", "attention", "all"])
def test_vit_b32_against_the_formula(b32: str, placement: str) -> None:
    config = CLIPConfig()
    sizes = measure(b32, lora=LoRAConfig(placement=placement))  # type: ignore[arg-type]
    vision = per_rank(config.vision_config, placement)
    each = {"vision": vision, "both": vision + per_rank(config.text_config, placement)}
    for towers, total in (("both", 151_277_313), ("vision", 87_849_217)):
        found = rows(sizes, towers)
        assert tuple(found) == RANKS
        for r, row in found.items():
            count = r * each[towers]
            assert row["adapter"] == row["trained"] == count
            assert (row["total"], row["full"]) == (total, 0)
            assert row["percent"] == pytest.approx(100 * count / total)
            assert (row["float32_bytes"], row["bfloat16_bytes"]) == (4 * count, 2 * count)
            assert row["whole_float32_bytes"] == 4 * total
            assert row["whole_bfloat16_bytes"] == 2 * total
            assert row["reduction"] == pytest.approx(100 * (1 - count / total))
            assert row["lora_alpha"] == 2 * r
            assert row["asked"] == (r == 16)
    assert sizes["left_out"] == {}


def test_the_figures_that_are_promised(b32: str) -> None:
    sizes = measure(b32)
    both, vision = rows(sizes, "both"), rows(sizes, "vision")
    assert {r: round(both[r]["trained"] / 1e6, 2) for r in (8, 16, 32)} == {
        8: 1.23,
        16: 2.46,
        32: 4.92,
    }
    assert {r: round(both[r]["percent"], 2) for r in (8, 16, 32)} == {8: 0.81, 16: 1.62, 32: 3.25}
    assert {r: round(both[r]["reduction"], 2) for r in (8, 16, 32)} == {
        8: 99.19,
        16: 98.38,
        32: 96.75,
    }
    assert round(vision[16]["trained"] / 1e6, 2) == 1.47


def parsed(text: str) -> list[list[str]]:
    """The lines of the tables: r, adapter, head, percent, float32, bf16, reduction."""
    lines = re.findall(r"^ *(\d+) ([* ]) (.*%) *$", text, re.MULTILINE)
    return [[r, mark, *re.split(r"\s{2,}", rest.strip())] for r, mark, rest in lines]


def test_the_table_says_what_json_says(b32: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = (f"--model.model_name={b32}", "--model.num_classes=10", "--model.lora.r=12")
    sizes = ask(capsys, *options)
    assert (sizes["model"], sizes["num_classes"], sizes["lora"]["r"]) == (b32, 10, 12)
    assert main(["info", *options]) == 0
    text = capsys.readouterr().out
    table = parsed(text)
    assert len(table) == len(sizes["rows"]) == 2 * 6
    units = {"": 1, "k": 1e3, "M": 1e6, "B": 1, "kB": 1e3, "MB": 1e6}
    names = ("adapter", "full", "percent", "float32_bytes", "bfloat16_bytes", "reduction")
    for (r, mark, *cells), row in zip(table, sizes["rows"], strict=True):
        assert (int(r), mark == "*") == (row["r"], row["asked"])
        for cell, name in zip(cells, names, strict=True):
            match = re.fullmatch(r"([\d.]+) ?(\D*)", cell)
            assert match is not None
            value = float(match[1]) * (1 if match[2] == "%" else units[match[2]])
            assert value == pytest.approx(row[name], rel=5e-3, abs=6e-3), (cell, name)
    assert [int(r) for r, *_ in table] == 2 * [4, 8, 12, 16, 32, 64]
    assert text.index("both towers: 151.3M parameters") < text.index(
        "vision only: 87.9M parameters"
    )
    plain = " ".join(text.split())
    assert "A text tower under a linear head gets no gradient" in plain
    assert "exchanged only where asked (towers=both)" in plain


def test_a_linear_head_is_counted_apart(b32: str) -> None:
    for row in measure(b32, num_classes=10)["rows"]:
        assert row["full"] == 10 * DIM + 10
        assert row["trained"] == row["adapter"] + row["full"]
        assert row["float32_bytes"] == 4 * row["trained"]
        assert (
            row["total"] == row["full"] + {"both": 151_277_313, "vision": 87_849_217}[row["towers"]]
        )
    assert {row["full"] for row in measure(b32, num_classes=10, head="text")["rows"]} == {0}


@pytest.mark.parametrize(
    ("components", "r"), [(["encoder", "classifier"], 8), (["classifier"], 64)]
)
def test_an_adapted_head(b32: str, components: list[str], r: int) -> None:
    """Beside the encoder it has the head's own preset, rank 8, whatever the encoder's."""
    sizes = measure(b32, num_classes=10, lora=LoRAConfig(target_components=components))
    config = CLIPConfig()
    encoder = per_rank(config.vision_config, "mlp") if "encoder" in components else 0
    assert rows(sizes, "vision")[64]["adapter"] == 64 * encoder + r * (DIM + 10)
    assert {row["full"] for row in sizes["rows"]} == {0}


def test_layers_and_modules(b32: str) -> None:
    config = CLIPConfig()
    sizes = measure(b32, lora=LoRAConfig(layers=[0, -1]))
    assert rows(sizes, "vision")[8]["adapter"] == 8 * per_rank(config.vision_config, "mlp", 2)
    both = per_rank(config.vision_config, "mlp", 2) + per_rank(config.text_config, "mlp", 2)
    assert rows(sizes, "both")[8]["adapter"] == 8 * both
    sizes = measure(b32, lora=LoRAConfig(target_modules=["q_proj"], layers=[3]))
    assert rows(sizes, "both")[8]["adapter"] == 8 * 2 * (768 + 512)
    # Biases of 12 blocks: fc1 and fc2.
    sizes = measure(b32, lora=LoRAConfig(bias="lora_only"))
    assert rows(sizes, "vision")[8]["full"] == 12 * (768 + 3072)


@pytest.mark.parametrize(("bias", "times"), [("none", 2), ("all", 1)])
def test_normalisation_layers(capsys: pytest.CaptureFixture[str], bias: Bias, times: int) -> None:
    """Two in each of 4 and 2 blocks, one after them, in front of the vision tower one more."""
    config = LoRAConfig(bias=bias)
    without, sizes = (
        measure("tiny-clip", lora=replace(config, train_norm=n)) for n in (False, True)
    )
    held = {"vision": 128 * 10, "both": 128 * 10 + 64 * 5}
    for row, plain in zip(sizes["rows"], without["rows"], strict=True):
        more = times * held[row["towers"]]
        assert row["full"] - plain["full"] == more
        assert row["float32_bytes"] - plain["float32_bytes"] == 4 * more
        assert (row["total"], row["adapter"]) == (plain["total"], plain["adapter"])
    show(sizes)
    text = " ".join(capsys.readouterr().out.split())
    assert f"bias={bias}, target_components=['encoder'], train_norm=True" in text
    assert "r adapter in full trained" in text
    show(without)
    assert "train_norm" not in capsys.readouterr().out


def test_a_block_that_one_tower_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CLIPConfig(text_config={"num_hidden_layers": 3}).save_pretrained(tmp_path / "deep")
    sizes = ask(capsys, "--model.model_name=deep", "--model.lora.layers=[5]")
    assert rows(sizes, "both") == {}
    assert rows(sizes, "vision")[8]["adapter"] == 8 * 2 * (768 + 3072)
    assert "no block 5 in the text tower" in sizes["left_out"]["both"]
    assert main(["info", "--model.model_name=deep", "--model.lora.layers=[5]"]) == 0
    text = capsys.readouterr().out
    assert "both towers: lora.layers: there is no block 5 in the text tower" in text
    assert "gets no gradient" not in text
    assert main(["info", "--model.model_name=deep", "--model.lora.layers=[15]"]) == 1
    assert "no block 15 in the vision tower" in capsys.readouterr().err


def test_siglip(tmp_path: Path) -> None:
    config = SiglipConfig()
    config.save_pretrained(tmp_path / "siglip")
    with torch.device("meta"):
        total = sum(p.numel() for p in SiglipModel(config).parameters())
    sizes = measure("siglip", num_classes=10)
    vision, text = (per_rank(c, "mlp") for c in (config.vision_config, config.text_config))
    head = 10 * config.vision_config.hidden_size + 10
    assert rows(sizes, "both")[16]["total"] == total + head
    assert rows(sizes, "both")[16]["adapter"] == 16 * (vision + text)
    assert rows(sizes, "vision")[16]["adapter"] == 16 * vision
    assert {row["full"] for row in sizes["rows"]} == {head}


def test_a_model_without_text_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        vision = CLIPVisionModelWithProjection(CLIPVisionConfig())
    monkeypatch.setattr("fedlora.modules.loading.empty_clip", lambda name: vision)
    sizes = measure("anything")
    assert {row["towers"] for row in sizes["rows"]} == {"vision"}
    assert rows(sizes, "vision")[16]["adapter"] == 1_474_560
    assert "gradient" not in "".join(info._notes(sizes))
    with pytest.raises(FedloraError, match="matches no layer"):
        measure("anything", lora=LoRAConfig(target_modules=["fc9"]))


def test_lora_off_is_the_whole_model(b32: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = (f"--model.model_name={b32}", "--model.lora.enabled=false")
    (both, _) = ask(capsys, *options)["rows"]
    assert (both["adapter"], both["full"], both["reduction"]) == (0, 151_277_313, 0)
    assert main(["info", *options]) == 0
    assert "off *" in capsys.readouterr().out


def test_nothing_is_allocated_and_the_settings_stay(b32: str) -> None:
    lora = LoRAConfig(r=8, lora_alpha=24)
    made: list[torch.device] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.numel() > 10_000:
                made.append(result.device)
            return result

    with Watch():
        sizes = measure(b32, lora=lora)
    assert {device.type for device in made} == {"meta"}
    assert lora == LoRAConfig(r=8, lora_alpha=24)
    assert {row["lora_alpha"] / row["r"] for row in sizes["rows"]} == {3}


def test_configs_of_fit_and_their_overlays(b32: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("overlay.yaml").write_text("model:\n  lora: {r: 6, placement: attention}\ntrainer: {}\n")
    options = ("--config", "clip_vit_b32.yaml", "--config", "overlay.yaml")
    sizes = ask(capsys, *options, f"--model.model_name={b32}", "--model.lora.layers=[0]")
    assert sizes["lora"] | {"r": 6, "placement": "attention", "layers": [0]} == sizes["lora"]
    assert rows(sizes, "vision")[6]["asked"]
    assert ask(capsys, "--config", "clip_lora.yaml", "--model.lora.r=3")["model"] == "tiny-clip"


def test_what_fit_prints_and_its_options_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "clip_lora.yaml", "--print_config"]) == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    whole = ask(capsys, "-c", "printed.yaml", "--data.num_clients=3", "--trainer.max_rounds", "2")
    assert whole == ask(capsys, "--config", "clip_lora.yaml", "--model.optimizer.lr=3")


def test_the_settings_are_those_of_the_classifier() -> None:
    theirs = inspect.signature(CLIPLoRAClassifier).parameters
    ours = inspect.signature(measure).parameters
    ignored = {name.removeprefix("model.") for name in IGNORED if name.startswith("model.")}
    assert set(theirs) == set(ours) | ignored
    assert not set(ours) & ignored
    assert all(theirs[name].default == parameter.default for name, parameter in ours.items())


def test_the_plain_form(b32: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain = {
        "model": {"type": "clip_lora", "model_name": b32, "num_classes": 10},
        "lora": {"enabled": True, "r": 4, "lora_alpha": 8, "target_components": ["encoder"]},
    }
    Path("mine.yaml").write_text(yaml.safe_dump(plain))
    assert main(["info", "--config", "mine.yaml", "--json"]) == 0
    captured = capsys.readouterr()
    sizes = json.loads(captured.out)
    assert captured.err.count("\n") == 1
    assert (sizes["model"], sizes["num_classes"], sizes["lora"]["r"]) == (b32, 10, 4)


WRONG = [
    (["--model.lora.rr=3"], 2, "Did you mean model.lora.r?"),
    (["--model.num_class=3"], 2, "Did you mean model.num_classes?"),
    (["--model.model_nam=x"], 2, "Did you mean model.model_name?"),
    (["--jsn"], 2, "Did you mean json?"),
    (["extra"], 2, "unrecognized arguments: extra"),
    (["--config", "wrong.yaml"], 2, "Did you mean model.lora.r?"),
    (["--config", "broken.yaml"], 2, "parsing"),
    (["--config", "nothing.yaml"], 1, "Shipped: clip_lora.yaml"),
    (["--model.lora.r=abc"], 2, "model.lora.r: should be of type int but got abc"),
    (["--model.lora.placement=mpl"], 2, "should be one of 'mlp', 'attention', 'all' but got mpl"),
    (["--model.lora.r=0"], 1, "lora.r must be a whole number from 1, got 0"),
    (["--model.num_classes=0"], 1, "model.num_classes must be at least 1, got 0"),
    (["--model.lora.target_components=[classifier]"], 1, "Add --model.num_classes=N"),
    (["--model.lora.target_modules=[fc9]"], 1, "There are: mlp.fc1, mlp.fc2"),
    (["--model.model_name=./nothing"], 1, "there is no such folder"),
    (["--model.model_name=blip"], 1, "is a 'blip' model; supported: CLIP"),
]


@pytest.mark.parametrize(("args", "code", "said"), WRONG, ids=[a[-1] for a, _, _ in WRONG])
def test_a_mistake_is_one_line(
    args: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("wrong.yaml").write_text("model:\n  lora:\n    rr: 3\n")
    Path("broken.yaml").write_text("model: [1\n")
    BlipConfig().save_pretrained("blip")
    assert main(["info", *args]) == code
    captured = capsys.readouterr()
    assert said in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.out == ""


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from fedlora.main import main; main(['info', '--help']); "
    code += "print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "False"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--config", "--model.model_name", "--model.lora.placement", "--json"):
        assert option in text
    assert "--trainer" not in text


def test_lightning_is_not_imported(b32: str) -> None:
    """Nor is what the ignored sections name, let alone made."""
    trainer = {
        "averaging": {"class_path": "fedlora.callbacks.averaging.AdapterAveraging"},
        "callbacks": [{"class_path": "lightning.pytorch.callbacks.EarlyStopping"}],
    }
    Path("run.yaml").write_text(yaml.safe_dump({"trainer": trainer, "data": {"source": "a.B"}}))
    args = ["info", "--config", "run.yaml", f"--model.model_name={b32}", "--json"]
    code = (
        f"import sys; from fedlora.main import main; code = main({args}); "
        "heavy = {m.partition('.')[0] for m in sys.modules} & {'lightning', 'pytorch_lightning'}; "
        "print(code, heavy, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "0 set()"
    assert json.loads(done.stdout)["model"] == b32


def test_the_meta_model_counts_as_the_real_one(tmp_path: Path) -> None:
    small = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2}
    config = CLIPConfig(text_config=small, vision_config=small, projection_dim=20)
    real = CLIPModel(config)
    config.save_pretrained(tmp_path / "small")
    total = sum(p.numel() for p in real.parameters())
    assert {row["total"] for row in measure("small")["rows"] if row["towers"] == "both"} == {total}
