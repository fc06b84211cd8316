"""One process or two: the same numbers."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from fedlora import SCAFFOLD, Ditto, FedloraError, LoRAConfig
from fedlora.aggregation import FedExLoRA, FedSALoRA, FFALoRA, RoLoRA
from fedlora.callbacks.base import FederatedCallback
from fedlora.checkpoint import load
from fedlora.run_folder import RunFolder
from tests.processes import in_processes
from tests.runs import (
    QUICK,
    assert_same_bits,
    fingerprint,
    fit,
    make_data,
    make_model,
    make_trainer,
    rows,
)

DROPOUT = {"lora": LoRAConfig(r=4, lora_alpha=8, lora_dropout=0.2)}

TEXT = {"head": "text", "towers": "both"}


def unequal() -> dict[str, Any]:
    """Four clients of unequal rows, so of unequal batches, and evaluation in several batches."""
    return QUICK | {
        "num_clients": 4,
        "n_shots": 4,
        "batch_size": 9,
        "client_val_fraction": 0.03,
        "client_test_fraction": 0.03,
        "eval_batch_size": 12,
    }


class Fails(FederatedCallback):
    """A client that breaks off in each round."""

    def on_client_start(self, trainer: Any, pl_module: Any, client: Any) -> None:
        self.client = client.id

    def on_train_batch_end(self, *args: Any) -> None:
        if self.client == 1:
            raise KeyError("lost")


class Fatal(FederatedCallback):
    """Ends one of two processes in round 1, by a signal or an error."""

    def __init__(self, rank: int, how: str) -> None:
        self.rank, self.how, self.idx = rank, how, 0

    def on_round_start(self, trainer: Any, pl_module: Any, rnd: Any, clients: Any) -> None:
        self.idx = rnd.idx

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if self.idx == 1 and trainer.world_size > 1 and trainer.global_rank == self.rank:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyError("lost")


class Told(FederatedCallback):
    """What hooks see, and in which process."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_client_start(self, trainer: Any, pl_module: Any, client: Any) -> None:
        self.seen.append(["start", client.id])

    def on_client_end(self, trainer: Any, pl_module: Any, update: Any) -> None:
        self.seen.append(["end", update.client.id])

    def on_round_end(self, trainer: Any, pl_module: Any, row: Any) -> None:
        self.seen.append(["round", {k: v for k, v in row.items() if v is not None}])

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        name = f"told {trainer.global_rank} of {trainer.world_size}"
        (trainer.run.path / name).write_text(json.dumps(self.seen))


def settings(name: str) -> dict[str, Any]:
    """One of many; each fit has objects of its own."""
    # Adam divides by a gradient's size: of one that is nothing but rounding it makes a whole step.
    sgd = {"optimizer": partial(torch.optim.SGD, lr=0.3)}
    single = {"batch_size": 1, "n_shots": 2}
    scenarios: dict[str, dict[str, Any]] = {
        "FedAvg": {"clients_per_round": 3, "model": DROPOUT, "callbacks": [Told()]},
        "FFALoRA": {"max_rounds": 1, "rule": FFALoRA()},
        "FedExLoRA": {"rule": FedExLoRA()},
        "FedSALoRA": {"rule": FedSALoRA(), "clients_per_round": 3},
        "SCAFFOLD": {"callbacks": [SCAFFOLD()], "model": sgd},
        "Ditto": {"callbacks": [Ditto()], "clients_per_round": 3},
        "lanes": {"lanes": 2, "model": DROPOUT},
        "Fails": {"callbacks": [Fails()], "on_client_error": "skip"},
        "stops": {"callbacks": [EarlyStopping("val/acc", mode="max", stopping_threshold=0.01)]},
        "clipped": {
            "max_rounds": 1,
            "model": DROPOUT | sgd,
            "gradient_clip_val": 0.3,
            "accumulate_grad_batches": 2,
        },
        "RoLoRA": {"rule": RoLoRA(), "model": DROPOUT | sgd},
        "text": {"max_rounds": 1, "rule": FedSALoRA(), "model": DROPOUT | sgd | TEXT},
        "one row": {"max_rounds": 1, "data": unequal() | single, "model": sgd},
    }
    return {"limit_train_batches": None, "max_rounds": 2, "data": unequal()} | scenarios[name]


def play(root: Path, names: list[str], **extra: Any) -> None:
    for name in names:
        fit(root / name, **(settings(name) | extra))


def two(root: Path, names: list[str], extra: dict[str, Any]) -> None:
    play(root, names, devices=2, **extra)


CLIENTS = ["FedAvg", "FFALoRA", "FedExLoRA", "FedSALoRA", "SCAFFOLD", "Ditto", "lanes"]
CLIENTS += ["Fails", "stops"]
ROWS = ["clipped", "RoLoRA", "text", "one row"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every scenario with one process and with two: ``<root>/<1 or 2>/<name>/version_0``."""
    root = tmp_path_factory.mktemp("runs")
    play(root / "1", CLIENTS + ROWS)
    assert in_processes(two, root / "2", CLIENTS, {}) == [0, 0]
    assert in_processes(two, root / "2", ROWS, {"strategy": "ddp"}) == [0, 0]
    return root


@pytest.mark.parametrize("name", CLIENTS)
def test_clients_over_processes_give_the_same_bits(runs: Path, name: str) -> None:
    one, other = (runs / count / name / "version_0" for count in ("1", "2"))
    found = fingerprint(one)
    assert_same_bits(found, fingerprint(other))
    assert len(found["history"]) == (2 if name in ("FFALoRA", "stops") else 3)
    assert rows(one / "client_test.csv") == rows(other / "client_test.csv")
    kept = [key for key in found if key.startswith("client ")]
    assert bool(kept) == (name in ("FedSALoRA", "SCAFFOLD", "Ditto"))
    if name == "Fails":
        statuses = [row["status"] for row in rows(other / "clients.csv")]
        assert statuses == ["answered", "error: KeyError: 'lost'", "answered", "answered"] * 2
        log = (other / "fedlora.log").read_text()
        assert log.count('raise KeyError("lost")') == 2  # where it is from is told across processes


@pytest.mark.parametrize("name", ROWS)
def test_rows_over_processes_give_the_same_up_to_rounding(runs: Path, name: str) -> None:
    one, other = (RunFolder(runs / count / name / "version_0") for count in ("1", "2"))
    adapters = [dict(load(run.checkpoint("last")).server.adapter.tensors()) for run in (one, other)]
    before = dict(load(one.checkpoint("previous")).server.adapter.tensors())
    moved = max(float((adapters[0][key] - tensor).abs().max()) for key, tensor in before.items())
    assert moved > 3e-4
    for key, tensor in adapters[0].items():
        assert torch.allclose(tensor, adapters[1][key], rtol=0, atol=1e-6), key
    for row, same in zip(*(rows(run.metrics) for run in (one, other)), strict=True):
        for key in ("train/loss", "val/loss", "clients/acc_mean", "comm/up_bytes"):
            assert float(row[key] or 0) == pytest.approx(float(same[key] or 0), rel=1e-5), key
    for row, same in zip(*(rows(run.clients_csv) for run in (one, other)), strict=True):
        assert [row[key] for key in ("id", "steps", "acc")] == [
            same[key] for key in ("id", "steps", "acc")
        ]


def test_hooks_are_called_where_things_happen(runs: Path) -> None:
    folder = runs / "2" / "FedAvg" / "version_0"
    alone = json.loads((runs / "1/FedAvg/version_0/told 0 of 1").read_text())
    zero, one = (json.loads((folder / f"told {rank} of 2").read_text()) for rank in (0, 1))
    started, ended, told = (
        [[what for what in seen if what[0] == kind] for seen in (alone, zero, one)]
        for kind in ("start", "end", "round")
    )
    assert sorted(started[0]) == sorted(started[1] + started[2])
    assert started[1]
    assert started[2]
    assert ended == [ended[0], ended[0], []]  # updates arrive at the server, in client order
    assert told[1] == told[2]
    assert [row["round"] for _, row in told[1]] == [0, 1, 2]


def last_of(root: Path, devices: int) -> None:
    for name in ("FedSALoRA", "FedAvg"):
        trainer = make_trainer(root / name, settings(name).get("rule"), devices=devices)
        model = settings(name).get("model", {})
        found = {
            "test": trainer.test(make_model(**model), make_data(**unequal()), "last"),
            "val": trainer.validate(make_model(**model), make_data(**unequal()), "last"),
        }
        predictions = trainer.predict(make_model(**model), make_data(**unequal()), "last")
        text = json.dumps([found, predictions.read_text()])
        (root / f"{name} {trainer.global_rank} of {devices}").write_text(text)


def test_evaluation_is_shared_and_the_same(runs: Path) -> None:
    last_of(runs / "1", 1)
    assert in_processes(last_of, runs / "1", 2) == [0, 0]
    for name in ("FedSALoRA", "FedAvg"):
        alone, zero, one = (
            json.loads((runs / "1" / f"{name} {who}").read_text())
            for who in ("0 of 1", "0 of 2", "1 of 2")
        )
        assert alone == zero == one
        assert len(alone[1].splitlines()) == 1 + 36
        assert ("clients/acc_mean" in alone[0]["val"]) == (name == "FedSALoRA")


def until_it_ends(root: Path, rank: int, how: str, strategy: str) -> None:
    fatal = {"callbacks": [Fatal(rank, how)], "strategy": strategy, "timeout": 30.0}
    try:
        play(root, ["FedSALoRA"], devices=2, **fatal)
    except FedloraError as error:
        (root / "said").write_text(str(error))


@pytest.mark.parametrize(("rank", "strategy"), [(0, "clients"), (1, "clients"), (1, "ddp")])
def test_one_that_is_killed_ends_the_other_and_one_goes_on(
    runs: Path, tmp_path: Path, rank: int, strategy: str
) -> None:
    codes = in_processes(until_it_ends, tmp_path, rank, "kill", strategy)
    assert [bool(code) for code in codes] == [rank == 0, rank == 1]
    assert "is gone. Go on with fit --ckpt_path last." in (tmp_path / "said").read_text()
    run = RunFolder(tmp_path / "FedSALoRA" / "version_0")
    assert load(run.checkpoint("last")).server.round_idx == 1
    play(tmp_path, ["FedSALoRA"], ckpt_path="last")
    if strategy == "clients":
        undisturbed = runs / "1" / "FedSALoRA" / "version_0"
        assert_same_bits(fingerprint(undisturbed), fingerprint(run.path))


def test_an_error_is_told_by_rank_0(tmp_path: Path) -> None:
    in_processes(until_it_ends, tmp_path, 1, "error", "clients")
    assert (tmp_path / "said").read_text() == "rank 1: KeyError: 'lost'"
