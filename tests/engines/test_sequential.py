from __future__ import annotations

import gc
import math
import weakref
from collections import defaultdict
from dataclasses import replace
from functools import partial

import pytest
import torch

from fedlora import LoRAConfig
from fedlora.aggregation import FedAvg, FedExLoRA
from fedlora.callbacks.base import FederatedCallback
from fedlora.checkpoint import load
from fedlora.engines.evaluate import evaluate_clients
from fedlora.errors import FedloraError
from tests.padded_mean import PaddedMean
from tests.runs import fit, make_data, make_model, make_trainer, rows

SCALING = 2.0  # lora_alpha / r of every server here
FACTORS = 4 * 2 * (128 + 512)  # numbers a rank: fc1 and fc2 of 4 blocks of (128, 512)
HEAD = 10 * 64 + 10


class Watch(FederatedCallback):
    """What clients send, and what of the adapter is beyond their rank while they train."""

    def __init__(self):
        self.updates = defaultdict(list)
        self.beyond = []
        self.scaling = defaultdict(set)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        lora, client = pl_module.lora, trainer.lane.client
        self.scaling[client.id] |= {layer.scaling["default"] for layer in lora.layers.values()}
        for name, B in lora.parameters["B"].items():
            A = lora.parameters["A"][name]
            self.beyond += [A.detach()[client.rank :].clone(), B.detach()[:, client.rank :].clone()]

    def on_client_end(self, trainer, pl_module, update):
        self.updates[update.client.id].append(update)


def train(root, rule, rank, watch=None, dropout=0.0, **settings):
    model = make_model(lora=LoRAConfig(r=rank, lora_alpha=SCALING * rank, lora_dropout=dropout))
    model.optimizer = partial(torch.optim.AdamW, lr=5e-3, weight_decay=0.1)
    options = {"max_rounds": 1, "callbacks": [watch] if watch else []} | settings
    trainer = make_trainer(root, rule, **options)
    trainer.fit(model, make_data())
    return trainer


# Unequal ranks.


class From(FedAvg):
    """Starts from a given adapter."""

    def __init__(self, adapter):
        self.adapter = adapter

    def start(self, server, base, rnd):
        return self.adapter


class Remembers(PaddedMean):
    """Knows what it started from."""

    def start(self, server, base, rnd):
        self.first = server
        return server


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_smaller_rank_trains_as_a_plain_adapter_of_that_rank(tmp_path, dropout):
    settings = {"local_steps": 6, "gradient_clip_val": 0.5, "dropout": dropout}
    large, plain, rule = Watch(), Watch(), Remembers()
    train(tmp_path, rule, 8, large, client_ranks=4, **settings)
    train(tmp_path, From(rule.first.cut(4)), 4, plain, **settings)
    assert all(update.num_steps == 6 for [update] in large.updates.values())
    for client, [update] in plain.updates.items():
        [other] = large.updates[client]
        moved = 0.0
        for name, tensor in update.payload.tensors():
            found = dict(other.payload.tensors())[name]
            assert found.shape == tensor.shape, name
            assert (found - tensor).abs().max() < 1e-6, name
            moved = max(moved, float((tensor - dict(update.sent.tensors())[name]).abs().max()))
        assert moved > 1e-2
        assert other.metrics["loss"] == pytest.approx(update.metrics["loss"], rel=1e-6)


def test_unused_slots_stay_zero_to_the_bit(tmp_path):
    watch = Watch()
    train(tmp_path, PaddedMean(), 8, watch, client_ranks=[1, 4, 8], max_rounds=2, dropout=0.1)
    seen = [tensor for tensor in watch.beyond if tensor.numel()]
    assert len(seen) > 100
    assert all(not tensor.any() for tensor in seen)


@pytest.mark.parametrize(
    ("alpha", "scales"), [("scaled", [1.0, 1.0, 1.0]), ("fixed", [8.0, 2.0, 1.0])]
)
def test_a_client_sends_its_own_rank_and_scaling(tmp_path, alpha, scales):
    watch = Watch()
    settings = {"client_ranks": [1, 4, 8], "client_alpha": alpha, "max_rounds": 2}
    trainer = train(tmp_path, PaddedMean(), 8, watch, **settings)
    for client, (rank, scale) in enumerate(zip([1, 4, 8], scales, strict=True)):
        assert watch.scaling[client] == {SCALING * scale}
        for update in watch.updates[client]:
            assert set(update.payload.ranks.values()) == {rank}
            assert set(update.sent.ranks.values()) == {rank}
            assert set(update.adapter.scaling.values()) == {SCALING * scale}
            assert update.nbytes == update.down_nbytes == 4 * (rank * FACTORS + HEAD)
    lora = trainer.lightning_module.lora
    assert set(lora.scaling.values()) == {SCALING}
    assert {layer.scaling["default"] for layer in lora.layers.values()} == {SCALING}
    assert set(trainer.server.adapter.scaling.values()) == {SCALING}


class HoldsB(PaddedMean):
    """B is drawn once, known to all, and never travels."""

    def start(self, server, base, rnd):
        return replace(server, B={name: torch.ones_like(B) for name, B in server.B.items()})

    def trainable(self, rnd):
        return frozenset({"A", "other"})


@pytest.mark.parametrize("rule", [PaddedMean(), HoldsB()], ids=["all travels", "B is known"])
def test_a_client_starts_from_what_its_slots_serve(tmp_path, rule):
    watch, served = Watch(), []

    class Keep(FederatedCallback):
        def on_round_start(self, trainer, pl_module, rnd, clients):
            served.append(trainer.server.adapter)

    settings = {"client_ranks": [1, 4, 8], "client_alpha": "fixed", "max_rounds": 2}
    train(tmp_path, rule, 8, watch, callbacks=[watch, Keep()], **settings)
    before = served[1]
    for client, rank in enumerate([1, 4, 8]):
        sent = watch.updates[client][1].sent
        for name in before.A:
            A, B = before.A[name][:rank].double(), before.B[name][:, :rank].double()
            mine = sent.scaling[name] * sent.B[name].double() @ sent.A[name].double()
            assert B.any()
            torch.testing.assert_close(mine, SCALING * B @ A, rtol=1e-6, atol=1e-7)


# What stays with a client.


class KeepsB(PaddedMean):
    """B stays with its client."""

    def shared(self, rnd):
        return frozenset({"A", "other"})


@pytest.mark.parametrize("alpha", ["scaled", "fixed"])
def test_personal_states_have_their_clients_rank(tmp_path, alpha):
    rule, watch = KeepsB(), Watch()
    settings = {"client_ranks": [1, 4, 8], "client_alpha": alpha, "max_rounds": 2}
    trainer = train(tmp_path, rule, 8, watch, **settings)
    engine, server = trainer.rounds.engine, trainer.server
    rnd = trainer.rounds.round(2)
    for client in trainer.rounds.clients:
        assert all(not update.payload.B for update in watch.updates[client.id])
        kept = engine.store.read(client.id, server.versions).adapter
        assert set(kept.ranks.values()) == {client.rank}
        assert not kept.A
        start = engine.start_of(client, rnd, server, rule)
        engine.lora.load(start.state.padded(server.adapter.ranks))
        assert start.down_nbytes == 4 * (
            client.rank * 4 * (128 + 512) + HEAD
        )  # A of fc1 and of fc2
        loaded = engine.lora.state()
        for name, B in kept.B.items():
            assert torch.equal(loaded.B[name][:, : client.rank], B)
            assert torch.equal(loaded.A[name][: client.rank], server.adapter.A[name][: client.rank])
            assert not loaded.B[name][:, client.rank :].any()
            assert not loaded.A[name][client.rank :].any()
            assert loaded.scaling[name] == SCALING * client.scale
            assert not start.sent.B[name].any()  # the server knows none
    evaluate_clients(engine, trainer.rounds.clients, rnd, server, rule)
    assert set(engine.lora.scaling.values()) == {SCALING}


# Who was sent what.

# Of 2 clients of rank 4 a round adds (2 - 1) 4 columns to the residual.
ADDED = 4 * 4 * FACTORS
PLAIN = 4 * (4 * FACTORS + HEAD)


def table_of(trainer):
    return [
        (int(row["round"]), int(row["id"]), int(row["down_bytes"]))
        for row in rows(trainer.run.clients_csv)
    ]


def told(table):
    """How far behind each client of a table was: rounds ago that it played; None: never."""
    found = []
    for number, client, _ in table:
        past = [before for before, id_, _ in table if id_ == client and before < number]
        found.append(number - max(past) if past else None)
    return found


def expected(number, behind):
    """Bytes down in a round: a client in sync is sent what the last round added."""
    rounds = number - 1  # that added something
    return PLAIN + (ADDED if behind == 1 else rounds * ADDED)


COHORT = {"clients_per_round": 2, "data": {"num_clients": 5}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("undisturbed"), FedExLoRA(), max_rounds=6, **COHORT)


def test_a_client_is_sent_what_it_lacks(undisturbed):
    table = table_of(undisturbed)
    behind = told(table)
    later = {far for (number, _, _), far in zip(table, behind, strict=True) if number > 2}
    assert {None, 1} < later  # new, in sync, and one that missed a round at least
    for (number, client, down), far in zip(table, behind, strict=True):
        assert down == expected(number, far), (number, client, far)


def test_one_step_on_equal_factors_leaves_nothing_to_send(tmp_path):
    # B is zero at first, so A gets no gradient in the first step and stays that of all clients.
    trainer = fit(tmp_path, FedExLoRA(), max_rounds=2, local_steps=1)
    assert {down for _, _, down in table_of(trainer)} == {PLAIN}


def test_the_server_knows_who_was_sent_something(undisturbed):
    last = {}
    for number, client, _ in table_of(undisturbed):
        last[client] = number - 1
    assert undisturbed.server.received == last
    assert load(undisturbed.run.checkpoint("last")).server.received == last


def test_a_resume_remembers_who_was_sent_something(undisturbed, tmp_path):
    fit(tmp_path, FedExLoRA(), max_rounds=3, **COHORT)
    going_on = fit(tmp_path, FedExLoRA(), max_rounds=6, ckpt_path="last", **COHORT)
    assert going_on.server.received == undisturbed.server.received
    assert table_of(going_on) == table_of(undisturbed)


class Explode(FederatedCallback):
    """A loss that is not a number, in one round."""

    def __init__(self, clients, round_idx):
        self.clients, self.round_idx = clients, round_idx

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.lane.client.id in self.clients and trainer.server.round_idx == self.round_idx:
            trainer.lane.loss += math.nan


def test_a_client_that_was_left_out_was_sent_something_all_the_same(tmp_path):
    left_out, whole = Watch(), Watch()
    settings = {"max_rounds": 3, "on_nonfinite": "skip"}
    explode = Explode({1}, 1)
    trainer = fit(tmp_path, FedExLoRA(), callbacks=[explode, left_out], **settings)
    fit(tmp_path, FedExLoRA(), callbacks=[whole], **settings)
    assert [len(left_out.updates[client]) for client in (0, 1, 2)] == [3, 2, 3]
    assert trainer.server.received == {0: 2, 1: 2, 2: 2}
    # It was sent as much as the others of its round, and that is counted.
    told = [row["comm/down_bytes"] for row in trainer.server.history[1:]]
    assert told[1] == 3 * left_out.updates[0][1].down_nbytes
    # 3 clients, then 2, of rank 4: 8 and 4 columns. All have the 8: the 4 are sent.
    assert {update[-1].down_nbytes for update in left_out.updates.values()} == {PLAIN + ADDED}
    for client in (0, 2):  # the client between them left nothing in the model
        one, other = (watch.updates[client][1].payload for watch in (left_out, whole))
        for name, tensor in one.tensors():
            assert torch.equal(tensor, dict(other.tensors())[name]), name


def test_a_round_without_clients_changes_nothing(tmp_path):
    served = []

    class Keep(FederatedCallback):
        def on_round_end(self, trainer, pl_module, row):
            served.append(trainer.server.adapter)

    watch = Watch()
    settings = {"max_rounds": 4, "on_nonfinite": "skip", "min_clients": 0}
    trainer = fit(
        tmp_path, FedExLoRA(), callbacks=[Explode({0, 1, 2}, 2), watch, Keep()], **settings
    )
    before, after = served[2], served[3]
    for name, tensor in before.tensors():
        assert torch.equal(tensor, dict(after.tensors())[name]), name
    assert after.residual == before.residual
    assert after.added == {}
    row = trainer.server.history[3]
    assert (row["train/loss"], row["agg/error"], row["clients/drift_max"]) == (None, None, None)
    assert {updates[-1].down_nbytes for updates in watch.updates.values()} == {PLAIN}


def test_the_last_round_of_a_client_is_told_to_the_rule(tmp_path):
    class Asks(FedAvg):
        def __init__(self):
            self.asked = []

        def distribute(self, server, client, rnd):
            self.asked.append((rnd.idx, client.last_round))
            return super().distribute(server, client, rnd)

        def upload(self, sent, trained, client, rnd):
            self.asked.append((rnd.idx, client.last_round))
            return super().upload(sent, trained, client, rnd)

    rule, watch = Asks(), Watch()
    fit(tmp_path, rule, max_rounds=3, limit_train_batches=1, callbacks=[watch])
    assert len(rule.asked) == 2 + 3 * 3 * 2  # the first are of the table at the start
    assert set(rule.asked) == {(0, None), (1, 0), (2, 1)}
    for updates in watch.updates.values():
        assert [update.client.last_round for update in updates] == [None, 0, 1]


def test_the_clients_of_a_run_are_left_alone(tmp_path):
    trainer = fit(tmp_path, max_rounds=2, limit_train_batches=1)
    clients = trainer.rounds.clients
    assert clients == [replace(c, rank=4, scale=1.0, last_round=None) for c in clients]


class Breaks(FederatedCallback):
    """An error in the middle of an optimizer step, in each round."""

    def __init__(self, client):
        self.client, self.graphs = client, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.lane.client.id == self.client:
            self.graphs.append(weakref.ref(outputs["losses"]))
            raise RuntimeError("the disk of this client is gone")

    def on_round_end(self, trainer, pl_module, row):
        gc.collect()
        assert [graph() for graph in self.graphs if graph() is not None] == []


def test_a_client_that_breaks_off_leaves_nothing_to_the_next(tmp_path):
    watch, whole = Watch(), Watch()
    settings = {"max_rounds": 1, "accumulate_grad_batches": 2, "on_client_error": "skip"}
    trainer = fit(tmp_path, callbacks=[watch, Breaks(0)], **settings)
    fit(tmp_path, callbacks=[whole], **settings)
    assert [len(watch.updates[client]) for client in (0, 1, 2)] == [0, 1, 1]
    for client in (1, 2):
        one, other = (dict(seen.updates[client][0].payload.tensors()) for seen in (watch, whole))
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), (client, name)
    said = [row["status"] for row in rows(trainer.run.clients_csv) if row["id"] == "0"]
    assert said == ["error: RuntimeError: the disk of this client is gone"]


def test_a_trainer_plays_one_run(tmp_path):
    trainer = fit(tmp_path, max_rounds=1, limit_train_batches=1)
    with pytest.raises(FedloraError, match="has played a run"):
        trainer.fit(make_model(), make_data())
    assert not (tmp_path / "version_1").exists()
