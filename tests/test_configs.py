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


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the hub's layout with the columns of CIFAR-10 and drawn pictures."""
    import datasets
    from PIL import Image

    folder = tmp_path_factory.mktemp("cifar10")
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["airplane", "bird", "cat"])}
    )
    for split, count in (("train", 120), ("test", 12)):
        rows = [
            {"img": Image.new("RGB", (32, 32), (i, 0, 0)), "label": i % 3} for i in range(count)
        ]
        table = datasets.Dataset.from_list(rows, features=features)
        table.to_parquet(folder / f"plain_text/{split}-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_config_runs(
    path: Path, cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = [
        "--trainer.max_rounds=1",
        "--trainer.limit_train_batches=1",
        "--data.num_clients=2",
        "--data.val_fraction=0.05",
        "--data.test_fraction=0.05",
        # A local folder in the hub's layout in the place of the hub's model.
        f"--model.model_name={resolve('tiny-clip')}",
    ]
    if "HuggingFaceImages" in path.read_text():
        small.append(f"--data.source.name={cifar}")
    # An overlay is merged over the main config, which stands in the folder above it.
    overlay = [] if path.parent == FOLDER else ["--config", str(FOLDER / "clip_lora.yaml")]
    assert main(["fit", *overlay, "--config", str(path), *small]) == 0
    assert (tmp_path / "runs" / "version_0" / "adapter" / "adapter_config.json").is_file()
