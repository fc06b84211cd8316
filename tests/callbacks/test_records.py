from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedlora import FederatedTrainer
from fedlora.aggregation import FedAvg, FedSALoRA
from fedlora.callbacks.records import CLIENTS, METRICS, Records, read_rows
from fedlora.run_folder import RunFolder
from tests.runs import fit


def test_a_line_torn_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "clients.csv"
    whole = dict.fromkeys(CLIENTS, "7") | {"id": "0"}
    path.write_text(f"{','.join(CLIENTS)}\n{','.join(whole.values())}\n1,1,,4")
    assert read_rows(path) == [whole]


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


# What the meter finds.

FIGURES = ("agg/error", "agg/effective_rank", "clients/drift_mean", "clients/drift_max")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FederatedTrainer:
    return fit(tmp_path_factory.mktemp("run"), FedAvg(), max_rounds=2, logger=True)


def test_the_figures_are_in_the_table_of_rounds(run: FederatedTrainer) -> None:
    before, *played = read_rows(run.run.metrics)
    assert {before[name] for name in FIGURES} == {""}
    assert len(played) == 2
    for row, kept in zip(played, run.server.history[1:], strict=True):
        assert [float(row[name]) for name in FIGURES] == [kept[name] for name in FIGURES]
        error, rank, mean_drift, max_drift = (float(row[name]) for name in FIGURES)
        assert 0 < error < 1 <= rank < 12  # 3 clients of rank 4
        assert 0 < mean_drift < max_drift


def test_the_figures_are_in_tensorboard(run: FederatedTrainer) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.run.path / "tensorboard"))
    events.Reload()
    for name in FIGURES:
        scalars = events.Scalars(name)
        assert [event.step for event in scalars] == [1, 2]
        want = [row[name] for row in run.server.history[1:]]
        assert [event.value for event in scalars] == pytest.approx(want, rel=1e-6)


def test_a_personal_rule_leaves_the_figures_empty(tmp_path: Path) -> None:
    trainer = fit(tmp_path, FedSALoRA(), max_rounds=1, limit_train_batches=1)
    table = read_rows(trainer.run.metrics)
    assert len(table) == 2
    assert {row[name] for row in table for name in FIGURES} == {""}


def test_each_client_has_a_row_with_its_rank(run: FederatedTrainer) -> None:
    table = read_rows(run.run.clients_csv)
    assert [(row["round"], row["id"], row["rank"]) for row in table] == [
        (str(number), str(client), "4") for number in (1, 2) for client in (0, 1, 2)
    ]
