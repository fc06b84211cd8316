from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

from fedlora.callbacks.records import CLIENTS, METRICS, Records, read_rows
from fedlora.run_folder import RunFolder


def test_a_line_torn_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "clients.csv"
    whole = "1,0,,57,2,0.5,0.8,10,10,0.1\n"
    path.write_text(",".join(CLIENTS) + "\n" + whole + "1,1,,4")
    assert [row["id"] for row in read_rows(path)] == ["0"]


def test_a_missing_table_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "clients.csv") == []


def test_further_figures_get_columns_at_the_end(tmp_path: Path) -> None:
    history = (
        {"round": 0, "val/acc": 0.5, "val/auroc": None, "test/acc": 0.25, "test/auroc": 0.5},
        {"round": 1, "val/acc": 0.75, "val/auroc": 0.625, "fairness/gap": 0.125},
    )
    run = RunFolder(tmp_path)
    trainer = SimpleNamespace(
        rounds=SimpleNamespace(run=run),
        datamodule=SimpleNamespace(holdings=SimpleNamespace(skipped={})),
        server=SimpleNamespace(history=history[:1], round_idx=0),
        loggers=[],
    )
    records = Records()
    records.on_fit_start(trainer, None)
    assert columns(run.metrics) == [*METRICS, "val/auroc"]
    trainer.server = SimpleNamespace(history=history, round_idx=1)
    records.on_round_end(trainer, None, history[-1])  # type: ignore[arg-type]
    assert columns(run.metrics) == [*METRICS, "val/auroc", "fairness/gap"]
    first, second = read_rows(run.metrics)
    assert (first["val/auroc"], first["fairness/gap"]) == ("", "")
    assert (second["val/auroc"], second["fairness/gap"]) == ("0.625", "0.125")
    assert second["val/acc"] == "0.75"
    again = run.metrics.read_text()
    records.on_fit_start(trainer, None)  # a resume
    assert run.metrics.read_text() == again


def columns(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="") as file:
        return next(csv.reader(file))


def test_pictures_left_out_are_listed(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    skipped = {"north/a, b.png": "truncated", "south/ü.png": "the file is empty"}
    trainer = SimpleNamespace(
        rounds=SimpleNamespace(run=run),
        datamodule=SimpleNamespace(holdings=SimpleNamespace(skipped=skipped)),
        server=SimpleNamespace(history=({"round": 0},), round_idx=0),
        loggers=[],
    )
    Records().on_fit_start(trainer, None)
    assert {row["picture"]: row["reason"] for row in read_rows(run.skipped)} == skipped
