"""Every shipped config runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.arguments import shipped_configs
from fedlora.main import main
from fedlora.modules.loading import resolve

FOLDER = shipped_configs()
CONFIGS = sorted(FOLDER.rglob("*.yaml"))


def test_there_are_configs() -> None:
    assert {"clip_lora.yaml", "clip_vit_b32.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_config_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = [
        "--trainer.max_rounds=1",
        "--trainer.limit_train_batches=1",
        "--data.num_clients=2",
        # A local folder in the hub's layout in the place of the hub's model.
        f"--model.model_name={resolve('tiny-clip')}",
    ]
    # An overlay is merged over the main config, which stands in the folder above it.
    overlay = [] if path.parent == FOLDER else ["--config", str(FOLDER / "clip_lora.yaml")]
    assert main(["fit", *overlay, "--config", str(path), *small]) == 0
    assert (tmp_path / "runs" / "version_0" / "adapter" / "adapter_config.json").is_file()
