# ruff: noqa: E501  (a table of command lines)
from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from fedlora.arguments import TOOLS, complete, find_config, shipped_configs
from fedlora.errors import FedloraError
from fedlora.main import main

QUICK = [
    "--trainer.max_rounds=1",
    "--trainer.limit_train_batches=1",
    "--trainer.logger=false",
    "--data.num_clients=3",
]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_fit_then_everything_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "clip_lora.yaml", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "round 0/1" in out
    assert "zero-shot" in out
    assert "round 1/1" in out
    assert "runs/version_0" in out
    config = yaml.safe_load((tmp_path / "runs" / "version_0" / "config.yaml").read_text())
    assert config["trainer"]["max_rounds"] == 1
    assert config["data"]["num_clients"] == 3
    for command in ("validate", "test"):
        assert main([command, "--ckpt_path", "last"]) == 0
        assert ("val/acc" if command == "validate" else "test/acc") in capsys.readouterr().out
    assert main(["predict", "--ckpt_path", "best"]) == 0
    assert (tmp_path / "runs" / "version_0" / "predictions.csv").is_file()
    assert main(["fit", "--ckpt_path", "last", "--trainer.max_rounds=2"]) == 0
    folder = tmp_path / "runs" / "version_0"
    assert (folder / "config.resume1.yaml").is_file()
    assert json.loads((folder / "summary.json").read_text())["round"] == 2
    assert main(["fit", "--ckpt_path", "last", "--trainer.max_rounds=3", "--model.lora.r=2"]) == 1
    assert "model.lora.r: 8 -> 2" in capsys.readouterr().err


def test_quiet_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "clip_lora.yaml", "--quiet", *QUICK]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    assert (tmp_path / "runs" / "version_0" / "summary.json").is_file()


def test_the_overrides_of_every_section_work_together() -> None:
    overrides = [
        "--model.lora.r=4",
        "--trainer.max_rounds=2",
        "--data.num_clients=5",
        "--trainer.averaging.precision=bf16-mixed",
        "--trainer.averaging.gradient_checkpointing=true",
    ]
    assert main(["fit", "--config", "clip_lora.yaml", *overrides]) == 0
    config = yaml.safe_load(Path("runs/version_0/config.yaml").read_text())
    averaging = config["trainer"]["averaging"]["init_args"]
    assert averaging["precision"] == "bf16-mixed"
    assert averaging["gradient_checkpointing"] is True
    exported = json.loads(Path("runs/version_0/adapter/adapter_config.json").read_text())
    assert exported["r"] == 4
    about = json.loads(Path("runs/version_0/adapter/fedlora.json").read_text())
    assert about["round"] == 2


def test_overlays_are_merged_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overlay = tmp_path / "fedex.yaml"
    overlay.write_text("trainer:\n  averaging:\n    aggregator: fedlora.aggregation.FedExLoRA\n")
    args = ["fit", "--config", "clip_lora.yaml", "--config", str(overlay), "--print_config"]
    assert main(args) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    rule = config["trainer"]["averaging"]["init_args"]["aggregator"]
    assert rule["class_path"] == "fedlora.aggregation.FedExLoRA"
    assert config["model"]["lora"]["r"] == 8


def test_print_config_can_be_used_as_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "clip_lora.yaml", "--print_config"]) == 0
    first = capsys.readouterr().out
    Path("printed.yaml").write_text(first)
    assert main(["fit", "--config", "printed.yaml", "--print_config"]) == 0
    assert capsys.readouterr().out == first


WRONG = [
    (["fit", "--config", "clip_lora.yaml", "--trainer.max_round=3"], 2, "Did you mean trainer.max_rounds?"),
    (["fit", "--config", "clip_lora.yaml", "--trainer.max_rounds=abc"], 2, "trainer.max_rounds: should be of type int but got abc"),
    (["fit", "--config", "clip_lora.yaml", "--trainer.max_ro=3"], 2, "max_ro"),
    (["fit", "--config", "clip_lora.yaml", "--model.lora.target_components=classifier"], 2, "should be a list such as [classifier] but got classifier"),
    (["fit", "--config", "clip_lora.yaml", "--model.head=linera"], 2, "should be one of 'linear', 'text' but got linera"),
    (["fit", "--config", "clip_lora.yaml", "--trainer.averaging.precision=bf17"], 2, "trainer.averaging.precision: should be one of"),
    (["fit", "--config", "clip_lora.yaml", "--trainer.averaging.precison=32-true"], 2, "Did you mean precision?"),
    (["fit", "--config", "clip_lora.yaml", "--trainer.averaging.aggregator=FedEx"], 2, "Did you mean FedExLoRA?"),
    (["fit", "--config", "clip_lora.yaml", "--data.partitioner=Dirichlet"], 2, "Did you mean DirichletPartitioner?"),
    (["fit", "--config", "clip_lora.yaml", "--data.partitioner=DirichletPartitioner", "--data.partitioner.alpa=0.3"], 2, "Did you mean alpha?"),
    (["ft"], 2, "Did you mean fit?"),
    (["inof"], 2, "Did you mean info?"),
    ([], 2, "subcommand"),
    (["fit", "--config", "wrong.yaml"], 2, "Did you mean model.lora.r?"),
    (["fit", "--config", "broken.yaml"], 2, "parsing"),
    (["fit", "--config", "clip_lara.yaml"], 1, "Shipped: clip_lora.yaml, clip_vit_b32.yaml"),
    (["fit", "--config", "clip_lora.yaml", "--model.lora.r=0"], 1, "lora.r must be a whole number from 1, got 0"),
    (["fit", "--config", "clip_lora.yaml", "--trainer.clients_per_round=12"], 1, "between 1 and 10 (the number of clients), got 12"),
    (["fit", "--config", "clip_lora.yaml", "--trainer.averaging.precision=16-mixed", "--trainer.accelerator=cpu"], 1, "needs a GPU"),
    (["fit", "--config", "clip_lora.yaml", "--trainer.devices=0"], 1, "trainer.devices must be at least 1 or auto, got 0"),
    (["fit", "--config", "clip_lora.yaml", "--model.lora.target_modules=[fc9]"], 1, "There are: mlp.fc1, mlp.fc2"),
    (["fit", "--config", "clip_lora.yaml", "--model.model_name=openai/clip-vit-base-patch32"], 1, "use 'tiny-clip'"),
    (["fit", "--config", "clip_lora.yaml", "--model.model_name=./nothing"], 1, "there is no such folder"),
    (["fit", "--config", "clip_lora.yaml", "--model.num_classes=7"], 1, "model.num_classes is 7 but the data has 10 classes"),
    (["fit", "--config", "clip_lora.yaml", "--data.num_clients=2000"], 1, "num_clients must be at most"),
    (["fit", "--config", "clip_lora.yaml", "--trainer.default_root_dir=/proc/nothing"], 1, "cannot write /proc/nothing"),
    (["fit", "--ckpt_path", "last"], 1, "there is no run under runs"),
    (["test", "--config", "clip_lora.yaml", "--ckpt_path", "nothing.ckpt"], 1, "ckpt_path 'nothing.ckpt'"),
    (["fit", "--config", "clip_lora.yaml", "--model.optimizer.lr=1e30", "--trainer.max_rounds=1"], 1, "became NaN or infinite in round 0"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("args", "code", "said"), WRONG, ids=[" ".join(a[-1:]) for a, _, _ in WRONG]
)
def test_a_mistake_is_one_line(
    args: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("wrong.yaml").write_text("model:\n  lora:\n    rr: 3\n")
    Path("broken.yaml").write_text("model: [1\n")
    assert main(args) == code
    err = capsys.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err
    leftovers = [path for path in Path.cwd().rglob("*") if ".tmp" in path.name]
    assert leftovers == []


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_DEBUG", "1")
    with pytest.raises(FedloraError, match=r"lora\.r must be"):
        main(["fit", "--config", "clip_lora.yaml", "--model.lora.r=0"])


def test_configs_are_found_in_the_folder_first(tmp_path: Path) -> None:
    shipped = shipped_configs()
    assert Path(find_config("clip_lora.yaml")) == shipped / "clip_lora.yaml"
    assert Path(find_config("configs/clip_lora.yaml")) == shipped / "clip_lora.yaml"
    (tmp_path / "clip_lora.yaml").write_text("{}")
    assert Path(find_config("clip_lora.yaml")) == Path("clip_lora.yaml")


def test_a_checkpoint_alone_brings_its_own_config(tmp_path: Path) -> None:
    run = tmp_path / "elsewhere" / "version_3"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("{}")
    args = ["fit", "--trainer.default_root_dir", "elsewhere", "--ckpt_path", "last"]
    assert complete(args) == ["fit", "--config", "elsewhere/version_3/config.yaml", *args[1:]]
    given = complete([*args, "--config", "clip_lora.yaml"])
    assert "elsewhere/version_3/config.yaml" not in given


def test_the_module_and_the_script_are_the_same_command() -> None:
    for command in (
        [sys.executable, "-m", "fedlora"],
        [str(Path(sys.executable).parent / "fedlora")],
    ):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("fedlora ")
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    for name in ("fit", "validate", "test", "predict"):
        assert name in done.stdout
    assert "info                Show how much of a model is trained" in done.stdout


def test_every_side_tool_is_there() -> None:
    for name, (module, description) in TOOLS.items():
        assert callable(import_module(module).run), name
        assert description.endswith("."), name
