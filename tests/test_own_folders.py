"""Runs on pictures of one's own."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from fedlora.data.sources.files_on_disk import PICTURE_ENDINGS, printable
from fedlora.main import main
from fedlora.modules.clip import FederatedCLIPModel
from fedlora.run_folder import RunFolder
from tests.data.odd_pictures import OddPicture, write_odd_pictures
from tests.drawn_pictures import draw_sites

FIT = ["fit", "--config", "clip_lora.yaml", "--trainer.logger=false", "--trainer.progress=plain"]
FOLDER = ["--data.source=ImageFolder", "--data.source.root=pictures"]


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_two_settings_are_enough(capsys: pytest.CaptureFixture[str]) -> None:
    draw_sites(Path("pictures"), ("åbo", "north", "south"), count=12)
    assert main([*FIT, *FOLDER, "--trainer.max_rounds=3"]) == 0
    out = capsys.readouterr().out
    assert "read 72 pictures" in out
    run = RunFolder(Path("runs/version_0"))
    first = rows(run.clients_csv)[:3]
    # 24 pictures a site: a fifth, then a tenth, then a tenth are for testing and validation.
    assert [(row["id"], row["name"]) for row in first] == [
        ("0", "north"),
        ("1", "south"),
        ("2", "åbo"),
    ]
    summary = json.loads(run.summary.read_text())
    assert summary["test/acc"] > summary["zero_shot"]["test/acc"]
    assert not run.skipped.exists()
    # The second run finds the pictures where the first one left them.
    assert main([*FIT, *FOLDER, "--trainer.max_rounds=3"]) == 0
    assert "read 72 pictures" not in capsys.readouterr().out
    adapters = [Path(f"runs/version_{i}/adapter/adapter_model.safetensors") for i in (0, 1)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert main(["predict", "--ckpt_path", "last"]) == 0
    predicted = rows(Path("runs/version_1/predictions.csv"))
    assert all(Path("pictures", row["picture"]).is_file() for row in predicted)
    assert {row["label"] for row in predicted} <= {"cat", "dog"}


def test_with_and_without_kept_pixels_the_same_bits() -> None:
    draw_sites(Path("pictures"))
    once = [*FIT, *FOLDER, "--trainer.max_rounds=1"]
    assert main([*once, "--data.cache_gb=0"]) == 0
    assert main(once) == 0
    adapters = [Path(f"runs/version_{i}/adapter/adapter_model.safetensors") for i in (0, 1)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_odd_pictures_are_read_or_listed() -> None:
    draw_sites(Path("pictures"), count=10)
    folder = Path("pictures/north/odd").resolve()
    folder.mkdir()
    written = write_odd_pictures(folder)
    shutil.copytree("pictures/north/cat", "pictures/south/odd")
    once = [*FIT, *FOLDER, "--trainer.max_rounds=1", "--trainer.limit_train_batches=1"]
    assert main([*once, "--data.on_bad_image=skip"]) == 0
    skipped = {row["picture"]: row["reason"] for row in rows(Path("runs/version_0/skipped.csv"))}
    expected = {printable(f"north/odd/{odd.name}") for odd in written if is_refused(odd)}
    assert len(expected) > 20
    assert set(skipped) == expected
    assert all(skipped.values())
    about = Path("runs/version_0/fedlora.log").read_text()
    assert f"{len(expected)} unreadable, left out" in about


def is_refused(odd: OddPicture) -> bool:
    """Whether an odd picture is found by its name and cannot be used."""
    path = odd.path or Path()
    if path.suffix.lower().lstrip(".") not in PICTURE_ENDINGS or path.name.startswith("."):
        return False
    if not os.path.lexists(path) or path.is_dir() or path.is_fifo():
        return False
    if odd.pixels is None:
        return True
    height, width = odd.pixels.shape[1:]
    return max(height, width) > 100 * min(height, width)


def test_a_hundred_and_twenty_classes_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"kind_{i:03d}" for i in range(120)]
    draw_sites(Path("pictures"), classes=names, count=4)
    encoded = []
    encode = FederatedCLIPModel.encode_text

    def counting(self, tokens):  # type: ignore[no-untyped-def]
        encoded.append(len(tokens["input_ids"]))
        return encode(self, tokens)

    monkeypatch.setattr(FederatedCLIPModel, "encode_text", counting)
    assert (
        main(
            [
                *FIT,
                *FOLDER,
                "--trainer.max_rounds=2",
                "--model.head=text",
                "--model.metrics=[per_class]",
            ]
        )
        == 0
    )
    # One template; encoded once, whatever the number of clients, rounds and evaluations.
    assert encoded == [120]
    about = json.loads(Path("runs/version_0/adapter/fedlora.json").read_text())
    assert about["class_names"] == names
    assert len(rows(Path("runs/version_0/per_class.csv"))) == 120


def test_a_site_held_out_and_few_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    draw_sites(Path("pictures"), ("a", "b", "c"), count=9)
    few = ["--data.hold_out=c", "--data.n_shots=2", "--trainer.max_rounds=1"]
    assert main([*FIT, *FOLDER, *few]) == 0
    clients = rows(Path("runs/version_0/clients.csv"))
    assert [(row["name"], row["samples"]) for row in clients] == [("a", "4"), ("b", "4")]
    assert main(["predict", "--ckpt_path", "last"]) == 0
    predicted = rows(Path("runs/version_0/predictions.csv"))
    assert len(predicted) == 18
    assert {row["picture"].split("/")[0] for row in predicted} == {"c"}


def test_a_run_goes_on_with_its_pictures_elsewhere_kept(
    capsys: pytest.CaptureFixture[str],
) -> None:
    draw_sites(Path("pictures"))
    assert main([*FIT, *FOLDER, "--trainer.max_rounds=1"]) == 0
    more = ["--trainer.max_rounds=2", "--data.cache_dir=other", "--data.cache_gb=0"]
    assert main(["fit", "--ckpt_path", "last", *more]) == 0
    assert len(rows(Path("runs/version_0/metrics.csv"))) == 3
    capsys.readouterr()
    # Other pictures are another run.
    Image.new("RGB", (9, 9)).save("pictures/north/cat/new.png")
    assert main(["fit", "--ckpt_path", "last", "--trainer.max_rounds=3"]) == 1
    err = capsys.readouterr().err
    assert "cannot go on with other settings" in err
    assert "pictures" in err


def test_cpu_threads_are_as_before() -> None:
    draw_sites(Path("pictures"))
    before = torch.get_num_threads()
    assert main([*FIT, *FOLDER, "--trainer.max_rounds=1", "--trainer.threads=1"]) == 0
    assert torch.get_num_threads() == before == 1
