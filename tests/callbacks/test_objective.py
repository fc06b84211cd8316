"""What clients minimise besides their loss: FedProx, the contract of objectives, round_lr."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric

from fedlora import FederatedTrainer, FedloraError
from fedlora.aggregation import Aggregator, FedSALoRA, LocalHead, LocalOnly, RoLoRA
from fedlora.callbacks.base import FederatedCallback
from fedlora.callbacks.ditto import Ditto
from fedlora.callbacks.objective import Objective, check_objectives
from fedlora.callbacks.proximal import FedProx
from fedlora.callbacks.scaffold import SCAFFOLD
from fedlora.engines.lane import Lane
from fedlora.engines.local import LocalLoop
from fedlora.errors import CheckpointError
from fedlora.modules.report import readable
from fedlora.round_lr import RoundLR
from fedlora.sampling import Sampling
from fedlora.state import AdapterState, Client, Round
from tests.engines.test_local import Line, batches, sgd, train
from tests.runs import (
    QUICK,
    assert_same_bits,
    fingerprint,
    make_data,
    make_model,
    make_trainer,
    rows,
)

FABRIC = Fabric(accelerator="cpu", devices=1)


def play(
    root: Path, rule: Aggregator | None = None, ckpt_path: str | None = None, **settings: Any
) -> FederatedTrainer:
    trainer = make_trainer(root, rule, **({"limit_train_batches": 4} | settings))
    model = make_model()
    model.optimizer = partial(torch.optim.SGD, lr=0.05)
    trainer.fit(model, make_data(**QUICK), ckpt_path=ckpt_path)
    return trainer


class Sent(FederatedCallback):
    """What each client sent, round by round."""

    def __init__(self) -> None:
        self.updates: dict[int, list[Any]] = defaultdict(list)

    def on_client_end(self, trainer: Any, pl_module: Any, update: Any) -> None:
        self.updates[trainer.server.round_idx].append(update)


# FedProx, by hand.


@pytest.mark.parametrize(
    ("mu", "anchor", "ends"),
    [
        # 2 (w - 2): w goes 0, 1, 1.5 with a rate of 1/4
        (0.0, 0.0, 1.5),
        # the second gradient is 2 (1 - 2) + 2 (1 - 0) = 0
        (2.0, 0.0, 1.0),
        # -4 + 2 (0 - 1) = -6, so 1.5; then -1 + 2 (1.5 - 1) = 0
        (2.0, 1.0, 1.5),
        # -4, so 1; then -2 + 4 (1 - 0) = 2 leads back to 0.5
        (4.0, 0.0, 0.5),
    ],
)
def test_the_pull_by_hand(mu: float, anchor: float, ends: float) -> None:
    line = Line(0.0, sgd())
    loop = LocalLoop(FABRIC, line)
    lane = loop.open(Client(0, 3), Round(0), AdapterState())
    lane.objectives, lane.anchor = [FedProx(mu)], {"other/w": torch.tensor([anchor])}
    train(loop, lane, Round(0), 2, batches([2.0], [2.0]))
    assert line.w.item() == ends


def test_what_the_server_does_not_average_has_no_pull_by_hand() -> None:
    line = Line(0.0, sgd())
    loop = LocalLoop(FABRIC, line)
    lane = loop.open(Client(0, 3), Round(0), AdapterState())
    lane.objectives = [FedProx(2.0)]
    train(loop, lane, Round(0), 2, batches([2.0], [2.0]))
    assert line.w.item() == 1.5


def test_clipping_comes_after_the_pull() -> None:
    # -4 is clipped to -1; then 2 (1 - 2) + 40 (1 - 0) = 38 to 1. Clipped before: far below 0.
    line = Line(0.0, sgd(1.0))
    loop = LocalLoop(FABRIC, line, clip=1.0)
    lane = loop.open(Client(0, 3), Round(0), AdapterState())
    lane.objectives, lane.anchor = [FedProx(40.0)], {"other/w": torch.zeros(1)}
    train(loop, lane, Round(0), 2, batches([2.0], [2.0]))
    assert line.w.item() == pytest.approx(0.0, abs=1e-5)


def test_accumulated_batches_have_one_pull() -> None:
    # -4, so 1; then, over two batches, -2 + 2 (1 - 0) = 0. A pull a batch: 2 more.
    line = Line(0.0, sgd())
    loop = LocalLoop(FABRIC, line, accumulate=2)
    lane = loop.open(Client(0, 3), Round(0), AdapterState())
    lane.objectives, lane.anchor = [FedProx(2.0)], {"other/w": torch.zeros(1)}
    train(loop, lane, Round(0), 4, batches([2.0], [2.0], [2.0], [2.0]))
    assert line.w.item() == 1.0


# FedProx, in a run.


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Sent]:
    sent = Sent()
    trainer = play(tmp_path_factory.mktemp("plain"), callbacks=[sent], clients_per_round=2)
    return fingerprint(trainer.run.path), sent


def test_fedprox_of_0_is_fedavg_to_the_bit(tmp_path: Path, plain: Any) -> None:
    trainer = play(tmp_path, callbacks=[FedProx(0.0)], clients_per_round=2)
    assert_same_bits(plain[0], fingerprint(trainer.run.path))


def moved(update: Any) -> float:
    sent = dict(update.sent.tensors())
    return sum(float((t - sent[n]).square().sum()) for n, t in update.payload.tensors())


def test_clients_stay_nearer_with_a_pull(tmp_path: Path, plain: Any) -> None:
    sent = Sent()
    play(tmp_path, callbacks=[FedProx(10.0), sent], clients_per_round=2, max_rounds=1)
    for held, free in zip(sent.updates[0], plain[1].updates[0], strict=True):
        assert 0 < moved(held) < 0.9 * moved(free)
        assert held.nbytes == free.nbytes
        assert held.down_nbytes == free.down_nbytes
        assert not held.extra


class Pulls(FedProx):
    """Which parameters of which round had their gradient changed."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.pulled: dict[int, set[str]] = defaultdict(set)
        self.left: dict[int, set[str]] = defaultdict(set)
        self.round = 0

    def on_round_start(self, trainer: Any, pl_module: Any, rnd: Round, clients: Any) -> None:
        self.round = rnd.idx

    def on_lane_gradients(self, lane: Lane) -> None:
        before = {n: p.grad.clone() for n, p in lane.parameters.items() if p.grad is not None}
        super().on_lane_gradients(lane)
        for name, gradient in before.items():
            same = torch.equal(gradient, lane.parameters[name].grad)
            (self.left if same else self.pulled)[self.round].add(name)


def is_head(name: str) -> bool:
    return name.startswith("other/classifier")


@pytest.mark.parametrize(
    ("rule", "held"),
    [
        (FedSALoRA(), lambda name, idx: not name.startswith("B/")),
        (LocalHead(), lambda name, idx: not is_head(name)),
        (RoLoRA(), lambda name, idx: is_head(name) or name.startswith("A/" if idx else "B/")),
    ],
    ids=lambda value: value.name if isinstance(value, Aggregator) else "",
)
def test_only_what_is_averaged_is_held(
    tmp_path: Path, rule: Aggregator, held: Callable[[str, int], bool]
) -> None:
    pulls = Pulls()
    trainer = play(tmp_path, rule, callbacks=[pulls], max_rounds=2, clients_per_round=1)
    rounds = trainer.rounds
    for idx in (0, 1):
        trained = trainer.server.adapter.only(rounds.rule.trainable(rounds.round(idx)))
        names = {name for name, _ in trained.tensors()}
        assert pulls.pulled[idx] == {name for name in names if held(name, idx)}
        # What was held was not at the anchor: at the first step all are.
        assert pulls.left[idx] == names


# What an objective is told, and what becomes of what it says.


class Echo(Objective):
    """Sends 12 bytes down, 24 up, and remembers 8: how often each client played."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float, list[float] | None]] = []
        self.anchored: list[bool] = []

    def download(self, client: Client, shared: Any) -> dict[str, torch.Tensor]:
        return {"hint": torch.full((3,), float(client.id))}

    def sent(self, shared: Any) -> dict[str, torch.Tensor]:
        return {"echo": torch.zeros(6)}

    def remembered(self, shared: Any) -> dict[str, torch.Tensor]:
        return {"count": torch.zeros(2)}

    def on_lane_start(self, lane: Lane) -> None:
        count = lane.memory.get("count")
        hint = float(lane.received["hint"].mean())
        self.seen.append((lane.client.id, hint, None if count is None else count.tolist()))
        self.anchored.append(
            all(torch.equal(lane.parameters[name], start) for name, start in lane.anchor.items())
        )

    def on_lane_end(self, lane: Lane) -> None:
        lane.memory["count"] = lane.memory.get("count", torch.zeros(2)) + lane.step
        lane.extra["echo"] = lane.received["hint"].repeat(2) + 1


def test_what_travels_is_counted_and_what_stays_comes_back(tmp_path: Path) -> None:
    echo, sent = Echo(), Sent()
    sampling = Sampling(dropout=0.4)
    trainer = play(tmp_path, callbacks=[echo, sent], sampling=sampling, max_rounds=4, min_clients=0)
    adapter = trainer.server.adapter.nbytes
    said = trainer.run.log.read_text()  # before the first round
    assert f"round: {readable(adapter + 24)} up; {readable(adapter + 12)} down in round 0" in said
    assert trainer.rounds.storage().each == (trainer.run.clients / "0/4.safetensors").stat().st_size
    table = rows(trainer.run.clients_csv)
    assert {row["status"] for row in table} == {"answered", "dropped out"}
    for row in table:
        assert int(row["down_bytes"]) == adapter + 12
        assert row["up_bytes"] == (str(adapter + 24) if row["status"] == "answered" else "")
    for row in trainer.server.history[1:]:
        answered = row["clients/answered"]
        assert row["comm/up_bytes"] == answered * (adapter + 24)
        assert row["comm/down_bytes"] == 3 * (adapter + 12)
    played: dict[int, int] = defaultdict(int)
    for client, hint, count in echo.seen:
        before = played[client]
        assert hint == client
        assert count == ([4.0 * before] * 2 if before else None)
        played[client] += 1
    assert max(played.values()) > 1
    assert echo.anchored == [True] * len(echo.seen)
    for updates in sent.updates.values():
        for update in updates:
            assert update.extra["echo"].tolist() == [update.client.id + 1.0] * 6
            assert "count" not in update.extra


# What is refused, before there is a run folder.


@pytest.mark.parametrize(
    ("objectives", "names"),
    [
        ([FedProx(), SCAFFOLD()], "FedProx and SCAFFOLD"),
        ([SCAFFOLD(), FedProx()], "SCAFFOLD and FedProx"),
        ([FedProx(0.1), FedProx(0.2)], "FedProx and FedProx"),
        ([FedProx(), Ditto(), Ditto()], "Ditto and Ditto"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_two_that_edit_the_same_gradients(objectives: list[Any], names: str) -> None:
    setting: Any = None
    with pytest.raises(FedloraError, match=f"trainer.callbacks has {names}: both"):
        check_objectives(objectives, setting)


@pytest.mark.parametrize(
    ("rule", "objectives", "words"),
    [
        (LocalOnly(), [FedProx()], r"FedProx keeps .* under LocalOnly there is none"),
        (None, [FedProx(), SCAFFOLD()], r"FedProx and SCAFFOLD: .*\. Leave one out"),
    ],
    ids=["FedProx", "two"],
)
def test_refused_before_there_is_a_run_folder(
    tmp_path: Path, rule: Aggregator | None, objectives: list[Any], words: str
) -> None:
    root = tmp_path / "runs"
    with pytest.raises(FedloraError, match=words):
        play(root, rule, callbacks=objectives)
    assert not root.exists()


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize(("make", "name"), [(FedProx, "FedProx.mu"), (Ditto, "Ditto.lam")])
def test_a_strength_out_of_range(make: Callable[[float], Any], name: str, value: float) -> None:
    with pytest.raises(FedloraError, match=f"{name} must be a number from 0, got {value}"):
        make(value)


def test_another_objective_cannot_go_on_with_a_run(tmp_path: Path) -> None:
    play(tmp_path, callbacks=[FedProx()], max_rounds=1)
    with pytest.raises(CheckpointError, match=r"objectives: \['fedlora.callbacks.proximal.FedProx"):
        play(tmp_path, ckpt_path="last", max_rounds=2)


# The learning rates that the optimizers of clients have over the rounds.


class Rates(FederatedCallback):
    """Those of each optimizer group, for each round and lane."""

    def __init__(self) -> None:
        self.rates: dict[tuple[int, bool], set[tuple[float, ...]]] = defaultdict(set)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        lane = trainer.lane
        rates = tuple(group["lr"] for group in lane.optimizer.param_groups)
        self.rates[trainer.server.round_idx, lane.own].add(rates)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        # half a cosine over the 4 rounds: (1 + cos(pi r / 4)) / 2
        (RoundLR("cosine"), [1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4]),
        (RoundLR("step", warmup_rounds=1, every=2, gamma=0.5), [0.5, 1, 1, 0.5]),
    ],
    ids=["cosine", "step"],
)
def test_the_rates_that_optimizers_have(
    tmp_path: Path, schedule: RoundLR, factors: list[float]
) -> None:
    rates = Rates()
    settings: dict[str, Any] = {"max_rounds": 4, "limit_train_batches": 1, "clients_per_round": 2}
    play(tmp_path, callbacks=[rates, Ditto()], round_lr=schedule, **settings)
    assert len(rates.rates) == 8  # in both lanes of 4 rounds
    for (idx, _), found in rates.rates.items():
        [(adapter, head)] = found  # the same for all clients and steps
        assert adapter == pytest.approx(0.05 * factors[idx], rel=1e-12)
        assert head == pytest.approx(0.01 * factors[idx], rel=1e-12)


def test_a_cosine_goes_on_to_where_it_began_to_go(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"limit_train_batches": 1, "clients_per_round": 1}
    play(tmp_path, max_rounds=2, round_lr=RoundLR("cosine"), **settings)
    with pytest.raises(CheckpointError, match=r"rounds of trainer.round_lr: 2 -> 4"):
        play(tmp_path, ckpt_path="last", max_rounds=4, round_lr=RoundLR("cosine"), **settings)
    rates = Rates()
    schedule = RoundLR("cosine", rounds=2, floor=0.0)
    trainer = play(
        tmp_path, ckpt_path="last", max_rounds=3, round_lr=schedule, callbacks=[rates], **settings
    )
    assert trainer.server.round_idx == 3
    assert rates.rates == {(2, False): {(0.0, 0.0)}}  # it stays at its floor


def test_a_constant_rate_goes_on_for_any_number_of_rounds(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"limit_train_batches": 1, "clients_per_round": 1}
    play(tmp_path, max_rounds=1, **settings)
    rates = Rates()
    trainer = play(tmp_path, ckpt_path="last", max_rounds=2, callbacks=[rates], **settings)
    assert trainer.server.round_idx == 2
    assert rates.rates == {(1, False): {(0.05, 0.01)}}
