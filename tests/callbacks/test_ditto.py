from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor

from fedlora import FederatedTrainer, FedloraError
from fedlora.aggregation import (
    Aggregator,
    FedAvg,
    FedAvgM,
    FedExLoRA,
    FedSALoRA,
    FFALoRA,
    FLoRA,
    HetLoRA,
    LocalHead,
    LocalOnly,
    RoLoRA,
)
from fedlora.callbacks.base import FederatedCallback
from fedlora.callbacks.ditto import Ditto
from fedlora.callbacks.objective import Setting, check_objectives
from fedlora.callbacks.proximal import FedProx
from fedlora.engines.lane import Lane
from fedlora.engines.local import LocalLoop
from fedlora.state import AdapterState, Client, Round
from tests.engines.test_local import Line, batches, sgd, train
from tests.runs import QUICK, fit


def play(root: Path, rule: Aggregator | None = None, **settings: Any) -> FederatedTrainer:
    usual = {"limit_train_batches": 3, "val_every_n_rounds": 9, "max_rounds": 2}
    return fit(root, rule, data=QUICK | settings.pop("data", {}), **(usual | settings))


class Watch(FederatedCallback):
    """Of each round and client: what it sent, the pictures of both lanes, and what it keeps."""

    def __init__(self) -> None:
        self.sent: dict[tuple[int, int], Any] = {}
        self.pictures: dict[tuple[int, int, bool], list[list[int]]] = defaultdict(list)
        self.kept: dict[tuple[int, int], Any] = {}
        self.servers: dict[int, AdapterState] = {}

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        key = trainer.server.round_idx, trainer.lane.client.id, trainer.lane.own
        self.pictures[key].append(batch["index"].tolist())

    def on_client_end(self, trainer: Any, pl_module: Any, update: Any) -> None:
        self.sent[trainer.server.round_idx, update.client.id] = update

    def on_round_end(self, trainer: Any, pl_module: Any, row: Any) -> None:
        server, store = trainer.server, trainer.rounds.engine.store
        self.servers[server.round_idx] = server.adapter
        for id_, version in server.versions.items():
            if version == server.round_idx:
                self.kept[version - 1, id_] = store.read(id_, server.versions)


def same_bits(one: AdapterState, other: AdapterState) -> bool:
    first, second = dict(one.tensors()), dict(other.tensors())
    assert first.keys() == second.keys()
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def distance(one: AdapterState, other: AdapterState) -> float:
    second = dict(other.tensors())
    return sum(float((t - second[name]).square().sum()) for name, t in one.tensors()) ** 0.5


def test_the_step_by_hand() -> None:
    # v = 3, w_t = 1: 2 (3 - 2) + 2 (3 - 1) = 6 leads to 1.5; there -1 + 2 (1.5 - 1) = 0.
    line = Line(3.0, sgd())
    loop = LocalLoop(Fabric(accelerator="cpu", devices=1), line)
    lane = loop.open(Client(0, 3), Round(0), AdapterState())
    lane.objectives, lane.anchor = [Ditto(2.0)], {"other/w": torch.tensor([1.0])}
    train(loop, lane, Round(0), 2, batches([2.0], [2.0]))
    assert line.w.item() == 1.5


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> Watch:
    watch = Watch()
    play(tmp_path_factory.mktemp("free"), callbacks=[Ditto(0.0), watch])
    return watch


def test_a_lam_of_0_is_local_only_to_the_bit(tmp_path: Path, free: Watch) -> None:
    alone = Watch()
    play(tmp_path, LocalOnly(), callbacks=[alone])
    assert len(free.kept) == len(alone.kept) == 6
    for key, kept in alone.kept.items():
        assert same_bits(free.kept[key].own, kept.adapter), key
        assert not dict(free.kept[key].adapter.tensors())
    assert distance(free.kept[1, 0].own, free.kept[1, 1].own) > 1e-2


def test_lam_holds_the_own_model_near(tmp_path: Path, free: Watch) -> None:
    held = Watch()
    play(tmp_path, callbacks=[Ditto(100.0), held])
    for (idx, id_), kept in held.kept.items():
        near, far = (distance(each.own, held.servers[idx]) for each in (kept, free.kept[idx, id_]))
        assert 0 < near < far, (idx, id_)


class Starts(Ditto):
    """Where the own model of each client starts, and what it is held near."""

    def __init__(self) -> None:
        super().__init__(0.3)
        self.starts: dict[tuple[int, int], dict[str, Tensor]] = {}
        self.anchors: dict[tuple[int, int], dict[str, Tensor]] = {}
        self.round = 0

    def on_round_start(self, trainer: Any, pl_module: Any, rnd: Round, clients: Any) -> None:
        self.round = rnd.idx

    def on_lane_start(self, lane: Lane) -> None:
        key = self.round, lane.client.id
        self.starts[key] = {n: p.detach().clone() for n, p in lane.parameters.items()}
        self.anchors[key] = {n: t.clone() for n, t in lane.anchor.items()}
        assert lane.own


FEW: dict[str, Any] = {"clients_per_round": 2, "data": {"num_clients": 4}, "max_rounds": 4}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[Starts, Watch]:
    starts, watch = Starts(), Watch()
    play(tmp_path_factory.mktemp("few"), callbacks=[starts, watch], **FEW)
    return starts, watch


def test_the_common_model_knows_nothing_of_it(tmp_path: Path, few: Any) -> None:
    plain, (_, few) = Watch(), few
    trainer = play(tmp_path, callbacks=[plain], **FEW)
    assert not trainer.run.clients.exists()
    assert trainer.rounds.storage().most == 0
    assert few.sent.keys() == plain.sent.keys()
    assert not plain.kept
    for idx, adapter in plain.servers.items():
        assert same_bits(adapter, few.servers[idx])
    for key, update in plain.sent.items():
        other = few.sent[key]
        assert same_bits(update.payload, other.payload)
        assert (update.nbytes, update.down_nbytes) == (other.nbytes, other.down_nbytes)
        assert update.num_steps == other.num_steps
        for name in ("loss", "acc"):
            assert update.metrics[name] == other.metrics[name]


def test_both_lanes_see_the_same_pictures(few: Any) -> None:
    _, few = few
    for idx, id_ in few.sent:
        assert len(few.pictures[idx, id_, False]) == 3
        assert few.pictures[idx, id_, False] == few.pictures[idx, id_, True]


@pytest.mark.parametrize("turns", [False, True], ids=["FedAvg", "RoLoRA"])
def test_it_starts_where_it_ended_and_is_held_near_what_was_sent(
    tmp_path: Path, few: Any, turns: bool
) -> None:
    starts, watch = few
    if turns:
        starts, watch = Starts(), Watch()
        play(tmp_path, RoLoRA(), callbacks=[starts, watch], **FEW)
    own: dict[int, dict[str, Tensor]] = defaultdict(dict)
    came_late = came_back = 0
    for (idx, id_), start in starts.starts.items():
        common = dict(watch.servers[idx].tensors())
        assert starts.anchors[idx, id_].keys() == start.keys()
        for name, tensor in start.items():
            assert torch.equal(starts.anchors[idx, id_][name], common[name])
            assert torch.equal(tensor, own[id_].get(name, common[name])), (idx, id_, name)
        came_late += idx > 0 and not own[id_]
        came_back += bool(own[id_])
        # Whole from the first round on: the server's other factor moves on without it.
        before, own[id_] = own[id_] or common, dict(watch.kept[idx, id_].own.tensors())
        assert own[id_].keys() == common.keys()
        for name in common.keys() - start.keys():
            assert torch.equal(own[id_][name], before[name]), (idx, id_, name)
        assert any(not torch.equal(own[id_][name], tensor) for name, tensor in start.items())
    assert came_late
    assert came_back


def test_clients_of_unequal_ranks(tmp_path: Path) -> None:
    watch = Watch()
    trainer = play(
        tmp_path, HetLoRA(), callbacks=[Ditto(), watch], client_ranks=[1, 4, 2], max_rounds=1
    )
    engine, server = trainer.rounds.engine, trainer.server
    for client, rank in zip(trainer.rounds.clients, [1, 4, 2], strict=True):
        own = watch.kept[0, client.id].own
        assert set(own.ranks.values()) == {rank}
        engine.load_own(client, trainer.rounds.round(1), server, trainer.rounds.rule)
        assert same_bits(engine.lora.state(), own.padded(server.adapter.ranks))


# What it does not go with.


def setting(rule: Aggregator) -> Setting:
    clients = [Client(0, 3, rank=4), Client(1, 3, rank=4)]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    return Setting(rule, Round(0, 0, 2, 2), clients, 4, optimizer, None, "32-true")


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (FedSALoRA(), r"FedSALoRA gives each client a model of its own already, so Ditto"),
        (LocalHead(), r"gives each client a model of its own already, so Ditto"),
        (FLoRA(), r"FLoRA makes those anew, .* Use FedAvg, FFALoRA or RoLoRA"),
        (FedExLoRA(), r"FedExLoRA makes those anew, or corrects them by a residual"),
        (LocalOnly(), r"under LocalOnly there is none: nothing is averaged"),
    ],
    ids=lambda value: value.name if isinstance(value, Aggregator) else "",
)
def test_rules_that_it_is_refused_with(rule: Aggregator, words: str) -> None:
    with pytest.raises(FedloraError, match=words) as caught:
        Ditto().check(setting(rule))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "rule", [FedAvg(), FFALoRA(), RoLoRA(), FedAvgM(), HetLoRA()], ids=lambda rule: rule.name
)
def test_rules_that_it_goes_with(rule: Aggregator) -> None:
    check_objectives([Ditto(), FedProx()], setting(rule))


def test_refused_before_there_is_a_run_folder(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    with pytest.raises(FedloraError, match="FedSALoRA gives each client a model of its own"):
        play(root, FedSALoRA(), callbacks=[Ditto()])
    assert not root.exists()


def test_a_client_that_sits_out_keeps_its_whole_model_under_rolora(tmp_path: Path) -> None:
    models: list[tuple[set[int], dict[int, AdapterState]]] = []

    class Look(FederatedCallback):
        def on_round_end(self, trainer: Any, pl_module: Any, row: Any) -> None:
            rounds, server = trainer.rounds, trainer.server
            seen = {}
            for client in rounds.clients:
                if client.id in server.versions:
                    rounds.engine.load_own(
                        client, rounds.round(server.round_idx), server, rounds.rule
                    )
                    seen[client.id] = rounds.engine.lora.state()
            rounds.engine.lora.load(server.adapter)
            played = {c for c, version in server.versions.items() if version == server.round_idx}
            models.append((played, seen))

    fit(
        tmp_path,
        RoLoRA(),
        callbacks=[Ditto(0.1), Look()],
        max_rounds=4,
        clients_per_round=1,
        limit_train_batches=1,
    )
    compared = 0
    for (_, before), (played, after) in pairwise(models[1:]):
        for client in before.keys() - played:
            compared += 1
            for name, tensor in before[client].tensors():
                assert torch.equal(tensor, dict(after[client].tensors())[name]), name
    assert compared >= 2
