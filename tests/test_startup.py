"""What a command imports before it has an answer; benchmarks/startup.py has the times."""

from __future__ import annotations

import subprocess
import sys

import pytest
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from fedlora.main import main

# In a process of its own, since this one has everything.
CODE = """
import gc, sys
from fedlora.main import main

HEAVY = {"torch", "lightning", "peft", "transformers", "numpy"}
# A run takes them when it comes to them; a parser needs none.
LATER = {"peft", "sklearn", "torch.utils.tensorboard", "transformers.models.clip.modeling_clip"}
collecting = {}

class Watch:
    def find_spec(name, path=None, target=None):
        collecting[name] = gc.isenabled()

sys.meta_path.insert(0, Watch)
assert main(["--version"]) == 0
print("version:", HEAVY & set(sys.modules))
sys.argv = ["fedlora", "fit", "--help"]
assert main() == 0
print("help:", LATER & set(sys.modules))
seen = ("torch", "lightning.pytorch.cli", "fedlora.trainer", "flwr_datasets.partitioner")
print("collecting:", [collecting[name] for name in seen], gc.isenabled(), gc.get_freeze_count() > 0)
"""


def test_a_command_imports_what_it_needs_and_the_collector_waits() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "version: set()" in lines
    assert "help: set()" in lines
    assert "collecting: [False, False, False, False] True True" in lines


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands whose parsers were built in full."""
    built: list[str] = []
    prepare = LightningCLI._prepare_subcommand_parser

    def noted(
        cli: LightningCLI, klass: type, subcommand: str, **kwargs: object
    ) -> LightningArgumentParser:
        built.append(subcommand)
        return prepare(cli, klass, subcommand, **kwargs)

    monkeypatch.setattr(LightningCLI, "_prepare_subcommand_parser", noted)
    return built


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_only_the_parser_that_is_asked_for_is_built(built: list[str], command: str) -> None:
    assert main([command, "--help"]) == 0
    assert built == [command]


def test_what_stands_before_a_command_is_parsed_as_ever(
    built: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", "clip_lora.yaml", "fit"]) == 2
    assert built == ["fit", "validate", "test", "predict"]
    assert "is not accepted before subcommand 'fit'" in capsys.readouterr().err
