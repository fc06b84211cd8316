from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedlora import FederatedDataModule
from fedlora.engines.evaluate import evaluate_split
from fedlora.modules.metrics import Scores
from tests.runs import fit, make_data, make_model, make_trainer, rows

ASKED = ["macro_f1", "auroc", "per_class"]


class Threes(FederatedDataModule):
    """Its test split is of one class."""

    def test_dataloader(self) -> Iterator[dict[str, torch.Tensor]]:  # type: ignore[override]
        for batch in super().test_dataloader():
            kept = batch["label"] == 3
            yield {name: value[kept] for name, value in batch.items()}


def test_clients_evaluate_accuracy_and_loss_only_and_classes_come_at_the_end(
    tmp_path: Path,
) -> None:
    asked: list[tuple[str, ...]] = []
    model = make_model(metrics=ASKED)
    whole = model.make_metrics

    def counted(names: Any = (), sync: bool = False) -> Any:
        asked.append(tuple(names))
        return whole(names, sync)

    model.make_metrics = counted  # type: ignore[method-assign]
    make_trainer(tmp_path, max_rounds=1, limit_train_batches=1).fit(model, make_data())
    each = ("macro_f1", "auroc")
    start, end = [each, (), (), (), each], [each, (), (), (), (*each, "per_class")]
    assert asked == start + end  # validation, three clients, test


def test_a_split_without_rows_has_no_figures() -> None:
    data: Any = SimpleNamespace(val_dataloader=list)
    fabric: Any = SimpleNamespace(device="cpu")
    model = make_model(metrics=ASKED)
    model.build(["a", "b"])
    assert evaluate_split(fabric, model, data, "val") == Scores({})


def test_what_is_not_defined_is_null_and_empty_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(tmp_path, max_rounds=1, limit_train_batches=1, logger=True)
    trainer.fit(make_model(metrics=ASKED), Threes(num_clients=3))
    assert trainer.run is not None
    folder = trainer.run.path
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["test/auroc"] is summary["zero_shot"]["test/auroc"] is None
    assert summary["test/macro_f1"] > 0
    table = rows(folder / "per_class.csv")
    assert {row["auroc"] for row in table} == {""}
    assert [row["samples"] for row in table if row["recall"]] == [table[3]["samples"]]
    trainer = make_trainer(tmp_path, progress="plain")
    found = trainer.test(make_model(metrics=ASKED), Threes(num_clients=3), str(folder))
    assert set(found) == {"test/acc", "test/loss", "test/macro_f1"}
    assert set(trainer.callback_metrics) == set(found)
    assert "not defined" in capsys.readouterr().out


def test_the_best_round_can_be_judged_by_them(tmp_path: Path) -> None:
    from fedlora import RoundCheckpoint

    keep = RoundCheckpoint("val/macro_f1")
    model, data = {"metrics": ["macro_f1"]}, {"val_fraction": 0.2}
    trainer = fit(tmp_path, callbacks=[keep], model=model, data=data, max_rounds=2)
    values = [row["val/macro_f1"] for row in trainer.server.history]
    assert keep.best_value == max(values) > values[0]
