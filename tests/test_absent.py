"""Clients that are not there, not in time or not well: what is written, sent, kept and counted."""

from __future__ import annotations

import errno
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora import FederatedDataModule, FederatedTrainer, FedloraError
from fedlora.aggregation import Aggregator, FedAvgM, FedSALoRA, LocalHead
from fedlora.callbacks.base import FederatedCallback
from fedlora.callbacks.ditto import Ditto
from fedlora.checkpoint import load
from fedlora.personal import ClientStore
from fedlora.sampling import Sampling
from fedlora.state import AdapterState
from tests.runs import (
    QUICK,
    assert_same_bits,
    fingerprint,
    make_data,
    make_model,
    make_trainer,
    rows,
)


def play(
    root: Path,
    rule: Aggregator | None = None,
    *,
    ckpt_path: str | None = None,
    clients: int = 3,
    **settings: Any,
) -> FederatedTrainer:
    usual: dict[str, Any] = {"limit_train_batches": 2, "val_every_n_rounds": 9}
    trainer = make_trainer(root, rule, **(usual | settings))
    trainer.fit(make_model(), make_data(num_clients=clients, **QUICK), ckpt_path=ckpt_path)
    return trainer


def same_bits(one: AdapterState, other: AdapterState) -> bool:
    first, second = dict(one.tensors()), dict(other.tensors())
    assert first.keys() == second.keys()
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


class Keep(FederatedCallback):
    """The adapter after each round."""

    def __init__(self) -> None:
        self.adapters: dict[int, AdapterState] = {}

    def on_round_end(self, trainer: Any, pl_module: Any, row: Any) -> None:
        self.adapters[trainer.server.round_idx] = trainer.server.adapter


class Killed(BaseException):
    """Stands for a kill inside this process: nothing catches it."""


class KillAtRound(FederatedCallback):
    def __init__(self, idx: int) -> None:
        self.idx = idx

    def on_client_end(self, trainer: Any, *args: Any) -> None:
        if trainer.server.round_idx == self.idx:
            raise Killed


# Who is not there.

SAMPLING = Sampling(
    availability=0.7, dropout=0.2, over_selection=0.5, deadline_steps=4, slowness=0.7
)
MANY: dict[str, Any] = {
    "clients": 8,
    "clients_per_round": 3,
    "local_steps": 3,
    "max_rounds": 6,
    "min_clients": 0,
    "sampling": SAMPLING,
}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> FederatedTrainer:
    return play(tmp_path_factory.mktemp("many"), FedSALoRA(), **MANY)


def test_each_client_that_was_wanted_has_a_row(many: FederatedTrainer) -> None:
    table = rows(many.run.clients_csv)
    statuses = {"answered", "unavailable", "dropped out", "late", "not needed"}
    assert {row["status"] for row in table} == statuses
    state = many.server.adapter.only({"A", "other"})
    nbytes = str(state.nbytes)
    for row in table:
        down = "0" if row["status"] == "unavailable" else nbytes
        up, steps = (nbytes, "3") if row["status"] == "answered" else ("", "")
        assert (row["down_bytes"], row["up_bytes"], row["steps"]) == (down, up, steps), row
        measured = [row[name] != "" for name in ("loss", "acc", "seconds")]
        assert measured == [row["status"] == "answered"] * 3
        client = many.rounds.clients[int(row["id"])]
        assert (row["samples"], row["rank"]) == (str(client.num_samples), "4")


def test_the_rows_of_a_round_add_up(many: FederatedTrainer) -> None:
    table, received = rows(many.run.clients_csv), {}
    full = 0
    for number, row in enumerate(many.server.history[1:], 1):
        mine = [each for each in table if each["round"] == str(number)]
        count = Counter(each["status"] for each in mine)
        assert len({each["id"] for each in mine}) == len(mine)
        assert row["clients/answered"] == count["answered"] <= 3
        assert len(mine) - count["unavailable"] <= 5  # 3 and half as many, rounded up
        if count["not needed"]:  # only once there are enough
            full += 1
            assert count["answered"] == 3
        assert row["comm/up_bytes"] == sum(int(each["up_bytes"] or 0) for each in mine)
        assert row["comm/down_bytes"] == sum(int(each["down_bytes"]) for each in mine)
        received |= {int(e["id"]): number - 1 for e in mine if e["status"] != "unavailable"}
    assert full
    assert many.server.received == received
    # Only who answered keeps anything.
    last = {int(e["id"]): int(e["round"]) for e in table if e["status"] == "answered"}
    assert many.server.versions == last
    assert received.keys() > last.keys() or received != {k: v - 1 for k, v in last.items()}


def test_the_same_are_absent_after_a_resume(tmp_path: Path, many: FederatedTrainer) -> None:
    with pytest.raises(Killed):
        play(tmp_path, FedSALoRA(), callbacks=[KillAtRound(2)], **MANY)
    resumed = play(tmp_path, FedSALoRA(), ckpt_path="last", **MANY)
    assert_same_bits(fingerprint(many.run.path), fingerprint(resumed.run.path))


class Steps(FederatedCallback):
    """Optimizer steps begun in each lane."""

    def __init__(self) -> None:
        self.steps: dict[tuple[int, int, bool], int] = defaultdict(int)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.steps[trainer.server.round_idx, trainer.lane.client.id, trainer.lane.own] += 1


def test_who_is_late_sends_what_it_has(tmp_path: Path) -> None:
    steps = Steps()
    sampling = Sampling(deadline_steps=3, slowness=0.7, late="partial")
    trainer = play(
        tmp_path,
        sampling=sampling,
        clients=5,
        local_steps=4,
        max_rounds=2,
        callbacks=[Ditto(), steps],
    )
    table = rows(trainer.run.clients_csv)
    taken = {int(row["id"]): int(row["steps"]) for row in table if row["steps"]}
    assert min(taken.values()) < 3
    assert max(taken.values()) == 4
    for row in table:
        id_ = int(row["id"])
        if id_ in taken:  # each as fast in both rounds and both lanes
            assert (row["status"], int(row["steps"])) == ("answered", taken[id_])
            for own in (False, True):
                assert steps.steps[int(row["round"]) - 1, id_, own] == taken[id_]
        else:  # not even one step
            assert row["status"] == "late"
    weights = {c.id: c.num_samples for c in trainer.rounds.clients}
    loss = sum(
        weights[int(r["id"])] * float(r["loss"]) for r in table if r["round"] == "2" and r["loss"]
    ) / sum(weights[id_] for id_ in taken)
    assert trainer.server.history[2]["train/loss"] == pytest.approx(loss, rel=1e-6)


def test_too_few_others(tmp_path: Path) -> None:
    keep, rule = Keep(), FedAvgM()
    sampling = Sampling(dropout=0.5)
    trainer = play(tmp_path, rule, sampling=sampling, min_clients=2, callbacks=[keep], max_rounds=5)
    table = rows(trainer.run.clients_csv)
    void = {int(row["round"]) for row in table if row["status"] == "too few others"}
    assert 0 < len(void) < 5
    nbytes = trainer.server.adapter.nbytes
    for number, row in enumerate(trainer.server.history[1:], 1):
        mine = [each for each in table if each["round"] == str(number)]
        assert len(mine) == 3
        assert same_bits(keep.adapters[number], keep.adapters[number - 1]) is (number in void)
        assert row["comm/down_bytes"] == 3 * nbytes
        if number in void:
            assert (row["clients/answered"], row["comm/up_bytes"]) == (0, 0)
            assert row["train/loss"] is None
            assert {each["status"] for each in mine} <= {"too few others", "dropped out"}
            assert not any(each["steps"] for each in mine)
        else:
            assert row["clients/answered"] >= 2
    assert trainer.server.round_idx == 5
    said = trainer.run.log.read_text()
    assert f"round {min(void)} passes without effect: " in said
    assert "trainer.min_clients is 2" in said


# Who is not well.


class Explode(FederatedCallback):
    """A loss that is not a number, of client 1 in the second round."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.lane.client.id == 1 and trainer.server.round_idx == 1:
            trainer.lane.loss += math.nan


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The pictures of client 1 end in the second round, after a batch."""
    whole = FederatedDataModule.client_batches

    def batches(self: Any, client: Any, rnd: Any, epoch: int) -> Iterator[Any]:
        for batch in whole(self, client, rnd, epoch):
            yield batch
            if client.id == 1 and rnd.idx == 1:
                raise OSError("the disk is gone\nand more")

    monkeypatch.setattr(FederatedDataModule, "client_batches", batches)
    return monkeypatch


def check_left_out(trainer: FederatedTrainer, status: str) -> None:
    table = rows(trainer.run.clients_csv)
    found = [(row["round"], row["id"]) for row in table if row["status"] != "answered"]
    assert found == [("2", "1")]
    assert len(table) == 9
    row = next(row for row in table if row["status"] == status)
    assert (row["up_bytes"], row["steps"]) == ("", "")
    assert row["down_bytes"] == table[0]["down_bytes"]
    history = trainer.server.history
    assert [each["clients/answered"] for each in history[1:]] == [3, 2, 3]
    assert history[2]["comm/down_bytes"] == history[1]["comm/down_bytes"]
    assert history[2]["comm/up_bytes"] * 3 == history[1]["comm/up_bytes"] * 2


def test_not_finite(tmp_path: Path) -> None:
    trainer = play(tmp_path, callbacks=[Explode()], on_nonfinite="skip")
    check_left_out(trainer, "not finite")
    log = trainer.run.log.read_text()
    assert "left out of the round: the loss of client 1 became NaN" in log
    assert "Traceback" not in log


def test_not_finite_is_no_other_error(tmp_path: Path) -> None:
    with pytest.raises(FedloraError, match="the loss of client 1 became NaN"):
        play(tmp_path, callbacks=[Explode()], on_client_error="skip")


def test_an_error_ends_the_run_unless_asked(tmp_path: Path, broken: Any) -> None:
    with pytest.raises(OSError, match="the disk is gone"):
        play(tmp_path, on_nonfinite="skip")
    assert load(tmp_path / "version_0/checkpoints/last.ckpt").server.round_idx == 1


class Kept(FederatedCallback):
    """The file of client 1 after each round."""

    def __init__(self) -> None:
        self.files: list[tuple[int, bytes]] = []

    def on_round_end(self, trainer: Any, pl_module: Any, row: Any) -> None:
        version = trainer.server.versions.get(1)
        if version is not None:
            path = trainer.run.clients / "1" / f"{version}.safetensors"
            self.files.append((version, path.read_bytes()))


def test_an_error_leaves_its_client_out(tmp_path: Path, broken: Any) -> None:
    kept = Kept()
    trainer = play(tmp_path, LocalHead(), on_client_error="skip", callbacks=[kept])
    check_left_out(trainer, "error: OSError: the disk is gone")
    log = trainer.run.log.read_text()
    assert "left out of the round: client 1, error: OSError: the disk is gone" in log
    assert 'raise OSError("the disk is gone' in log  # where it came from
    assert log.count("Traceback") == 1
    first, second, third = kept.files
    assert first == second
    assert third[0] == 3
    assert third != first
    assert not list(trainer.run.clients.glob("1/2.*"))


def test_a_full_disk_is_no_clients_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ClientStore, "write", full)
    with pytest.raises(OSError, match="No space left on device"):
        play(tmp_path, LocalHead(), on_client_error="skip", min_clients=0, max_rounds=1)


def test_too_few_answers_leave_all_as_it_was(tmp_path: Path, broken: Any) -> None:
    rule = FedAvgM(LocalHead())
    settings: dict[str, Any] = {"on_client_error": "skip", "min_clients": 3}
    trainer = make_trainer(tmp_path / "broken", rule, limit_train_batches=2, **settings)
    model = make_model()
    with pytest.raises(
        FedloraError,
        match=r"2 clients answered in round 1, fewer than trainer.min_clients=3; of "
        r"client 1: error: OSError: the disk is gone\. Mend that, and go on with fit --ckpt_path",
    ) as caught:
        trainer.fit(model, make_data(**QUICK))
    assert isinstance(caught.value.__cause__, OSError)
    saved = load(trainer.run.checkpoint("last"))
    assert saved.server.round_idx == 1
    memory, now = saved.rule["state"]["memory"], rule.state_dict()["memory"]
    assert memory.keys() == now.keys()
    assert memory
    for name, values in memory.items():
        assert torch.equal(values["v"], now[name]["v"]), name
    assert same_bits(trainer.server.adapter, saved.server.adapter)
    assert same_bits(model.lora.state(), saved.server.adapter)

    broken.undo()
    plain: dict[str, Any] = {"val_every_n_rounds": 1, **settings}
    whole = play(tmp_path / "whole", FedAvgM(LocalHead()), **plain)
    mended = play(tmp_path / "broken", FedAvgM(LocalHead()), ckpt_path="last", **plain)
    assert_same_bits(fingerprint(whole.run.path), fingerprint(mended.run.path))


# What is refused.


def test_more_than_all() -> None:
    with pytest.raises(FedloraError, match=r"over_selection chooses more than .*clients_per_round"):
        make_trainer(Path("runs"), sampling=Sampling(over_selection=0.5))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"min_clients": 3, "clients_per_round": 2}, "must be at most 2, the clients of a round"),
        ({"min_clients": 4}, "must be at most 3, the clients of a round, got 4"),
    ],
)
def test_more_answers_than_clients(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    root = tmp_path / "runs"
    with pytest.raises(FedloraError, match=f"trainer.min_clients {words}"):
        play(root, **settings)
    assert not root.exists()
