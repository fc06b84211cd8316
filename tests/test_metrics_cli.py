from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from fedlora.callbacks.records import METRICS
from fedlora.main import main
from tests.drawn_pictures import draw_sites
from tests.runs import rows

QUICK = [
    *("--trainer.max_rounds=1", "--trainer.limit_train_batches=1", "--trainer.logger=false"),
    "--data.num_clients=3",
]
ASKED = ["--model.metrics=[macro_f1,balanced_acc,auroc,per_class]"]
NAMES = ("macro_f1", "balanced_acc", "auroc")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_asked_for_they_are_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    config = ["--config", "clip_lora.yaml"]
    assert main(["fit", *config, *QUICK, *ASKED, "--model.class_weights=balanced"]) == 0
    run = Path("runs/version_0")
    saved = yaml.safe_load((run / "config.yaml").read_text())["model"]
    assert saved["metrics"] == ["macro_f1", "balanced_acc", "auroc", "per_class"]
    assert saved["class_weights"] == "balanced"
    table = rows(run / "metrics.csv")
    assert list(table[0]) == [*METRICS, *(f"val/{name}" for name in NAMES)]
    assert all(0 < float(row[f"val/{name}"]) <= 1 for row in table for name in NAMES)
    summary = json.loads((run / "summary.json").read_text())
    for name in NAMES:
        assert 0 < summary[f"test/{name}"] <= 1
        assert summary["zero_shot"][f"test/{name}"] != summary[f"test/{name}"]
        assert summary["final"][f"val/{name}"] == float(table[-1][f"val/{name}"])
    classes = rows(run / "per_class.csv")
    assert list(classes[0]) == ["class", "samples", "precision", "recall", "f1", "auroc"]
    assert len(classes) == 10
    for column, name in (("recall", "balanced_acc"), ("f1", "macro_f1"), ("auroc", "auroc")):
        mean = sum(float(row[column]) for row in classes) / 10  # all classes occur
        assert mean == pytest.approx(summary[f"test/{name}"])
    hits = sum(float(row["recall"]) * int(row["samples"]) for row in classes)
    assert hits / sum(int(row["samples"]) for row in classes) == pytest.approx(summary["test/acc"])

    capsys.readouterr()
    assert main(["validate", "--ckpt_path", "last"]) == 0
    out = capsys.readouterr().out
    assert all(f"val/{name}" in out for name in NAMES)
    assert not (run / "test_per_class.csv").exists()
    assert main(["test", "--ckpt_path", "last"]) == 0
    out = capsys.readouterr().out
    assert all(f"test/{name}" in out for name in NAMES)
    assert "lowest recall first" in out
    assert f"all 10 classes shown; the figures are in {run / 'test_per_class.csv'}" in out
    assert (run / "test_per_class.csv").read_text() == (run / "per_class.csv").read_text()

    assert main(["fit", "--ckpt_path", "last", "--trainer.max_rounds=2"]) == 0
    resumed = rows(run / "metrics.csv")
    assert [row["round"] for row in resumed] == ["0", "1", "2"]
    assert resumed[:2] == table
    assert 0 < float(resumed[2]["val/auroc"]) <= 1
    assert (run / "test_per_class.csv").read_text() != (run / "per_class.csv").read_text()
    capsys.readouterr()
    other = ["fit", "--ckpt_path", "last", "--trainer.max_rounds=3", "--model.class_weights=null"]
    assert main(other) == 1
    assert "model.class_weights: 'balanced' -> None" in capsys.readouterr().err


def test_not_asked_for_they_are_nowhere() -> None:
    assert main(["fit", "--config", "clip_lora.yaml", *QUICK]) == 0
    run = Path("runs/version_0")
    assert tuple(rows(run / "metrics.csv")[0]) == METRICS
    assert not list(Path().rglob("*per_class*"))


def test_without_a_checkpoint_the_classes_are_under_the_root() -> None:
    assert main(["test", "--config", "clip_lora.yaml", "--quiet", *QUICK, *ASKED]) == 0
    assert [str(path) for path in Path().rglob("*.csv")] == ["runs/test_per_class.csv"]


WRONG = [
    ("--model.metrics=[macro_f1,auorc]", 2, "model.metrics", "auorc"),
    ("--model.metrics=auroc", 2, "model.metrics", "[auroc]"),
    ("--model.class_weights=balancd", 2, "model.class_weights", "'balanced'"),
    ("--model.class_weights=[1,x]", 2, "model.class_weights", "x"),
    ("--model.class_weights=[1,2]", 1, "model.class_weights", "one number per class (10), got 2"),
    ("--model.class_weights=[1,-2]", 1, "model.class_weights", "numbers above 0, got -2.0"),
]


@pytest.mark.parametrize(("arg", "code", "name", "said"), WRONG)
def test_a_mistake_is_one_line(
    arg: str, code: int, name: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", "clip_lora.yaml", *QUICK, arg]) == code
    err = capsys.readouterr().err
    assert name in err
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_a_checkpoint_is_not_tested_on_classes_in_another_order(
    capsys: pytest.CaptureFixture[str],
) -> None:
    draw_sites(Path("pictures"), ("north", "south"), count=10)
    source = ["--data.source=ImageFolder", "--data.source.root=pictures"]
    assert main(["fit", *source, *QUICK[:3]]) == 0
    names = yaml.safe_load(Path("runs/version_0/adapter/fedlora.json").read_text())["class_names"]
    turned = f"--data.source.class_names=[{','.join(reversed(names))}]"
    capsys.readouterr()
    for command in ("validate", "test", "predict"):
        assert main([command, "--ckpt_path=last", turned]) == 1
        said = capsys.readouterr().err
        assert f"trained on the classes {', '.join(names)}; the data has {names[-1]}, " in said
