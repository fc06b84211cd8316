from __future__ import annotations

import csv
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedlora import FederatedTrainer
from fedlora.aggregation import FedAvg, FedSALoRA
from fedlora.callbacks.records import CLIENTS, METRICS, Records, read_rows
from fedlora.run_folder import RunFolder
from tests.runs import fit

WHOLE = dict.fromkeys(CLIENTS, "7") | {"id": "0", "name": 'north, "old"\nquay'}


def line(row: dict[str, str]) -> str:
    quoted = (value.replace('"', '""') for value in row.values())
    return ",".join(f'"{value}"' for value in quoted) + "\n"


def table(path: Path, text: str) -> Path:
    path.write_text(f"{','.join(CLIENTS)}\n{text}", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "torn",
    [b"", b"8,1,,4", *(line(WHOLE).encode()[:end] for end in (-1, -2, 20)), "8,1,ø".encode()[:-1]],
)
def test_a_line_torn_by_a_kill_is_left_out(tmp_path: Path, torn: bytes) -> None:
    path = table(tmp_path / "clients.csv", line(WHOLE))
    with path.open("ab") as file:
        file.write(torn)
    assert list(read_rows(path)) == [WHOLE]


def test_a_missing_table_has_no_rows(tmp_path: Path) -> None:
    assert list(read_rows(tmp_path / "clients.csv")) == []
    (tmp_path / "clients.csv").touch()
    assert list(read_rows(tmp_path / "clients.csv")) == []


def stub(run: RunFolder, first: bool = True, **server: Any) -> Any:
    """As much of a trainer as the records look at."""
    skipped = server.pop("skipped", {})
    return SimpleNamespace(
        is_global_zero=first,
        rounds=SimpleNamespace(run=run),
        datamodule=SimpleNamespace(holdings=SimpleNamespace(skipped=skipped)),
        server=SimpleNamespace(**{"history": ({"round": 0},), "round_idx": 0, **server}),
        loggers=[],
    )


def test_a_resume_drops_what_will_be_played_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    rounds = [WHOLE | {"round": str(number), "id": str(number)} for number in (1, 1, 2, 2, 3, 3)]
    text = "".join(map(line, rounds))
    table(run.clients_csv, f"{text}4,0,,7,4,answ")
    Records().on_fit_start(stub(run, round_idx=2), None)
    assert list(read_rows(run.clients_csv)) == rounds[:4]
    again = run.clients_csv.read_bytes()
    Records().on_fit_start(stub(run, round_idx=2), None)
    assert run.clients_csv.read_bytes() == again
    assert sorted(tmp_path.iterdir()) == [run.clients_csv, run.metrics]


def test_a_resume_holds_one_row_at_a_time(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    table(run.clients_csv, line(WHOLE) * 5_000)
    tracemalloc.start()
    try:
        Records().on_fit_start(stub(run, round_idx=7), None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(1 for _ in read_rows(run.clients_csv)) == 5_000
    assert peak < run.clients_csv.stat().st_size  # as dictionaries the rows take many times that


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    trainer, records = stub(RunFolder(tmp_path), first=False, skipped={"a.png": "empty"}), Records()
    update: Any = SimpleNamespace()
    records.on_fit_start(trainer, None)
    # What clients send arrives there only: no other process has the hooks of its arrival called.
    records.on_round_end(trainer, update, {"round": 0})
    assert list(tmp_path.iterdir()) == []


def test_further_figures_get_columns_at_the_end(tmp_path: Path) -> None:
    history = (
        {"round": 0, "val/acc": 0.5, "val/auroc": None, "test/acc": 0.25, "test/auroc": 0.5},
        {"round": 1, "val/acc": 0.75, "val/auroc": 0.625, "fairness/gap": 0.125},
    )
    run = RunFolder(tmp_path)
    trainer, records = stub(run, history=history[:1]), Records()
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
    Records().on_fit_start(stub(run, skipped=skipped), None)
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
    rows = list(read_rows(trainer.run.metrics))
    assert len(rows) == 2
    assert {row[name] for row in rows for name in FIGURES} == {""}


def test_each_client_has_a_row_with_its_rank(run: FederatedTrainer) -> None:
    rows = read_rows(run.run.clients_csv)
    assert [(row["round"], row["id"], row["rank"]) for row in rows] == [
        (str(number), str(client), "4") for number in (1, 2) for client in (0, 1, 2)
    ]
