"""What the documentation shows runs as it stands."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from fedlora.data import FederatedDataModule
from fedlora.data.partition import link_partitioner

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAID = {
    "federated_loop.py": "round 3:",
    "wrap_your_own_model.py": "merged: a plain HospitalCLIP again",
}


def test_every_example_is_known() -> None:
    assert {path.name for path in EXAMPLES} == set(SAID)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs(
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    runpy.run_path(str(path), run_name="__main__")
    assert SAID[path.name] in capsys.readouterr().out


def test_the_blocks_of_the_api_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 8
    namespace: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/api.md, block {number}", "exec"), namespace)
    assert (tmp_path / "merged" / "model.safetensors").is_file()


DATA = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def data_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--seed_everything", type=int, default=0)
    parser.add_class_arguments(FederatedDataModule, "data")
    parser.add_argument("--data_file", action="config")
    link_partitioner(parser)
    return parser


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", DATA, re.DOTALL))
def test_a_config_of_the_guide_is_one(block: str, tmp_path: Path) -> None:
    file = tmp_path / "data.yaml"
    file.write_text(block)
    parser = data_parser()
    # Constructors look at no disk: what is built has the settings of the block.
    data = parser.instantiate(parser.parse_args([f"--data_file={file}"])).data
    section = yaml.safe_load(block)["data"]
    for name, settings in section.items():
        built = getattr(data, name)
        assert type(built).__name__ == settings["class_path"].rpartition(".")[2]


LINES = re.findall(r"^(--data\..*?)(?: +#.*)?$", DATA, re.MULTILINE)


@pytest.mark.parametrize("line", LINES)
def test_an_option_of_the_guide_is_one(line: str) -> None:
    parser = data_parser()
    parser.instantiate(parser.parse_args(line.split()))


def test_the_guide_has_options() -> None:
    assert len(LINES) == 5


def test_the_rule_of_the_guide_runs_and_passes_its_test(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "new_rule.md").read_text(encoding="utf-8")
    rule, test = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    [command] = re.findall(r"^python -m (fedlora fit .*)$", text, re.MULTILINE)
    (tmp_path / "mylab").mkdir()
    (tmp_path / "mylab" / "median.py").write_text(rule)
    (tmp_path / "test_median.py").write_text(test)
    assert len(rule.splitlines()) <= 45
    small = ["--trainer.max_rounds=1", "--data.num_clients=3", "--trainer.limit_train_batches=1"]
    for args in ([*command.split(), *small], ["pytest", "-q", "-p", "no:cacheprovider"]):
        done = subprocess.run(
            [sys.executable, "-m", *args], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "mylab.median.MedianLoRA" in (tmp_path / "runs/version_0/config.yaml").read_text()
