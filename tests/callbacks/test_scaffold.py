from __future__ import annotations

import re
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor

from fedlora import AdapterAveraging, FederatedTrainer, FedloraError, LoRAConfig
from fedlora.aggregation import (
    Aggregator,
    FedAvg,
    FedExLoRA,
    FedSALoRA,
    FedSVD,
    FlexLoRA,
    FLoRA,
    FRLoRA,
    HetLoRA,
    LocalHead,
    LocalOnly,
    RoLoRA,
)
from fedlora.callbacks.base import FederatedCallback
from fedlora.callbacks.objective import Setting
from fedlora.callbacks.scaffold import SCAFFOLD
from fedlora.engines.lane import Lane
from fedlora.engines.local import LocalLoop
from fedlora.sampling import Sampling
from fedlora.state import PARTS, AdapterState, Client, ClientUpdate, Round
from tests.engines.test_local import Line, batches, sgd
from tests.engines.test_local import train as train_alone
from tests.runs import QUICK, make_data, make_model, make_trainer, rows

KEY = "control/other/w"
FABRIC = Fabric(accelerator="cpu", devices=1)
SGD = partial(torch.optim.SGD, lr=0.05)


# By hand, on one parameter: 2 (w - 2) is its gradient, its rate is 1/4.


def train(
    received: float | None = None,
    memory: float | None = None,
    start: float = 0.0,
    optimizer: Any = None,
    steps: int = 2,
    scaffold: SCAFFOLD | None = None,
    target: float = 2.0,
) -> Lane:
    line = Line(start, optimizer or sgd())
    loop = LocalLoop(FABRIC, line, steps=steps)
    lane = loop.open(Client(0, 3), Round(0), AdapterState())
    lane.objectives = [scaffold or SCAFFOLD()]
    lane.anchor = {"other/w": line.w.detach().clone()}
    lane.received = {} if received is None else {KEY: torch.tensor([received])}
    lane.memory = {} if memory is None else {KEY: torch.tensor([memory])}
    train_alone(loop, lane, Round(0), 1, batches([target]))
    return lane


@pytest.mark.parametrize(
    ("received", "memory", "y", "keeps", "sends"),
    [
        # Gradients -4 and -2: w goes 0, 1, 1.5; their mean is -3 = (0 - 1.5) / (2 / 4).
        (None, None, 1.5, -3.0, -3.0),
        # c - c_k = 1 - 3 is added: -6, so 1.5; -1 - 2, so 2.25. c_k' is the mean of -4 and -1.
        (1.0, 3.0, 2.25, -2.5, -5.5),
        # The first round of a client that comes late: c alone. -3, so 0.75; -2.5 + 1, so 1.125.
        (1.0, None, 1.125, -3.25, -3.25),
        # One that played in the first round, when the server had none. -5, so 1.25; -1.5 - 1.
        (None, 1.0, 1.875, -2.75, -3.75),
    ],
)
def test_two_steps(
    received: float | None, memory: float | None, y: float, keeps: float, sends: float
) -> None:
    lane = train(received, memory)
    assert lane.parameters["other/w"].item() == y
    assert {name: value.tolist() for name, value in lane.memory.items()} == {KEY: [keeps]}
    assert {name: value.tolist() for name, value in lane.extra.items()} == {KEY: [sends]}


@pytest.mark.parametrize(("memory", "kept"), [(None, {}), (3.0, {KEY: [3.0]})])
def test_a_client_that_did_not_move_keeps_what_it_had(memory: float | None, kept: Any) -> None:
    lane = train(1.0, memory, optimizer=sgd(0.0))
    assert {name: value.tolist() for name, value in lane.memory.items()} == kept
    assert lane.extra == {}


def test_weight_decay_is_a_part_of_the_gradient() -> None:
    # -4 + 2 * 0, so 1; -2 + 2 * 1 = 0, so it stays. The mean is -2.
    lane = train(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.25, weight_decay=2.0))
    assert lane.memory[KEY].tolist() == [-2.0]


@pytest.mark.parametrize("corrected", [True, False])
def test_clients_that_differ_agree_on_the_common_optimum(corrected: bool) -> None:
    # x^2 w^2: client 0 pulls to 4 with a curvature of 2, client 1 to 0 with one of 0.5 (a rate a
    # quarter as large). The mean of the losses is least where 2 (w - 4) + 0.5 w = 0: at 3.2.
    # Eight steps alone leave each near its own optimum, so that the plain mean is far off.
    scaffold, rnd = SCAFFOLD(), Round(0, num_clients=2, cohort=2)
    kept: list[dict[str, Tensor]] = [{}, {}]
    w = 0.0
    for _ in range(60):
        scaffold.on_round_start(None, None, rnd, [])
        ends = []
        for number, (target, scale) in enumerate([(4.0, 1.0), (0.0, 0.5)]):
            line = Line(w, sgd(0.125))
            loop = LocalLoop(FABRIC, line, steps=8)
            lane = loop.open(Client(number, 1), rnd, AdapterState())
            if corrected:
                lane.objectives = [scaffold]
            lane.anchor = {"other/w": line.w.detach().clone()}
            lane.received, lane.memory = (
                scaffold.download(lane.client, lane.parameters),
                kept[number],
            )
            data = [{"image": torch.tensor([scale]), "label": torch.tensor([target * scale])}]
            train_alone(loop, lane, rnd, 1, lambda epoch, data=data: iter(data))
            kept[number] = lane.memory
            state = AdapterState()
            update = ClientUpdate(lane.client, state, state, 1.0, extra=lane.extra)
            scaffold.on_client_end(None, None, update)
            ends.append(line.w.item())
        w = sum(ends) / 2
        scaffold.on_aggregate(None, None, AdapterState(), AdapterState(), {})
    assert (w == pytest.approx(3.2, abs=1e-4)) is corrected
    if corrected:  # the mean gradient at the optimum is 0, the clients' own are not
        assert scaffold.control["other/w"].item() == pytest.approx(0.0, abs=1e-4)
        assert [float(c[KEY]) for c in kept] == pytest.approx([-1.6, 1.6], abs=1e-3)


# In a run.


class Watch(FederatedCallback):
    """Updates, what each client remembers and what the server has, after each round."""

    def __init__(self) -> None:
        self.updates: dict[int, list[ClientUpdate]] = defaultdict(list)
        self.control: list[dict[str, Tensor]] = []
        self.memory: list[dict[int, dict[str, Tensor]]] = []
        self.adapters: list[AdapterState] = []

    def on_client_end(self, trainer: Any, pl_module: Any, update: ClientUpdate) -> None:
        self.updates[trainer.server.round_idx].append(update)

    def on_round_end(self, trainer: Any, pl_module: Any, row: Any) -> None:
        server, store = trainer.server, trainer.rounds.engine.store
        [scaffold] = trainer.objectives or [SimpleNamespace(control={})]
        self.control.append(dict(scaffold.control))
        self.adapters.append(server.adapter)
        self.memory.append(
            {id_: dict(store.read(id_, server.versions).memory) for id_ in server.versions}
        )


def play(
    root: Path,
    rule: Aggregator | None = None,
    *,
    optimizer: Any = SGD,
    model: dict[str, Any] | None = None,
    num_clients: int = 3,
    **settings: Any,
) -> FederatedTrainer:
    defaults = {"callbacks": [SCAFFOLD()], "val_every_n_rounds": 9, "limit_train_batches": 3}
    trainer = make_trainer(root, rule, **(defaults | settings))
    module = make_model(**(model or {}))
    module.optimizer = optimizer
    trainer.fit(module, make_data(num_clients=num_clients, **QUICK))
    return trainer


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[FederatedTrainer, Watch]:
    watch = Watch()
    return play(tmp_path_factory.mktemp("full"), callbacks=[SCAFFOLD(), watch]), watch


@pytest.fixture(scope="module")
def partly(tmp_path_factory: pytest.TempPathFactory) -> tuple[FederatedTrainer, Watch]:
    watch = Watch()
    settings = {"callbacks": [SCAFFOLD(), watch], "num_clients": 5, "clients_per_round": 2}
    return play(tmp_path_factory.mktemp("partly"), max_rounds=4, **settings), watch


def names_of(tensors: Any) -> set[str]:
    return {f"control/{name}" for name, _ in tensors.tensors()}


def test_the_servers_is_the_mean_of_the_clients_if_all_play(full: Any) -> None:
    _, watch = full
    assert watch.control[0] == {}
    for control, memory in zip(watch.control[1:], watch.memory[1:], strict=True):
        assert len(memory) == 3
        assert {f"control/{name}" for name in control} == names_of(watch.adapters[0])
        for name, c in control.items():
            mean = sum(kept[f"control/{name}"].double() for kept in memory.values()) / 3
            assert c.dtype == torch.float64
            assert (c - mean).abs().max() < 1e-6, name
        assert max(float(c.abs().max()) for c in control.values()) > 1e-2


def test_the_first_round_is_plain_and_the_next_is_not(full: Any, tmp_path: Path) -> None:
    watch = Watch()
    play(tmp_path, callbacks=[watch], max_rounds=2)
    first, second = (
        [torch.equal(t, dict(watch.adapters[n].tensors())[name]) for name, t in a.tensors()]
        for n, a in ((1, full[1].adapters[1]), (2, full[1].adapters[2]))
    )
    assert all(first)
    assert not any(second)


def test_what_is_sent_is_the_change_of_what_is_kept(partly: Any) -> None:
    _, watch = partly
    for idx, updates in watch.updates.items():
        before, after = watch.memory[idx], watch.memory[idx + 1]
        for update in updates:
            id_ = update.client.id
            assert set(update.extra) == set(after[id_]) == names_of(update.payload)
            for name, change in update.extra.items():
                old = before.get(id_, {}).get(name)
                want = after[id_][name] - (0 if old is None else old)
                assert torch.equal(change, want), name


def test_each_client_keeps_its_mean_gradient(full: Any) -> None:
    # From where it started and ended alone: c_k - c + (x - y) / (T eta), the head at its own rate.
    _, watch = full
    for idx, updates in watch.updates.items():
        for update in updates:
            ended = dict(update.payload.tensors())
            for name, start in update.sent.tensors():
                old = watch.memory[idx].get(update.client.id, {}).get(f"control/{name}", 0.0)
                c = watch.control[idx].get(name, torch.zeros(()))
                eta = 0.01 if name.startswith("other/classifier") else 0.05
                want = old - c + (start.double() - ended[name]) / (3 * eta)
                kept = watch.memory[idx + 1][update.client.id][f"control/{name}"]
                assert (kept - want).abs().max() < 1e-5, (idx, name)


def test_a_sum_over_all_clients_however_few_play(partly: Any) -> None:
    _, watch = partly
    assert {len(updates) for updates in watch.updates.values()} == {2}
    for idx, updates in watch.updates.items():
        for name, c in watch.control[idx + 1].items():
            total = sum(update.extra[f"control/{name}"].double() for update in updates)
            change = c - watch.control[idx].get(name, 0.0)
            torch.testing.assert_close(change, total / 5, rtol=1e-9, atol=1e-12)


def test_as_many_bytes_again_but_none_down_at_first(partly: Any) -> None:
    trainer, watch = partly
    adapter = trainer.server.adapter.nbytes
    table = rows(trainer.run.clients_csv)
    assert len(table) == 8
    for idx, updates in watch.updates.items():
        down = adapter if idx == 0 else 2 * adapter
        for update in updates:
            assert update.payload.nbytes == adapter
            assert update.nbytes == 2 * adapter
            assert update.down_nbytes == down
            row = next(
                r for r in table if (r["round"], r["id"]) == (f"{idx + 1}", f"{update.client.id}")
            )
            assert (int(row["up_bytes"]), int(row["down_bytes"])) == (2 * adapter, down)
        row = trainer.server.history[idx + 1]
        assert (row["comm/up_bytes"], row["comm/down_bytes"]) == (4 * adapter, 2 * down)


def test_a_client_that_sits_out_keeps_what_it_had(partly: Any) -> None:
    _, watch = partly
    sat_out = 0
    for idx, updates in watch.updates.items():
        played = {update.client.id for update in updates}
        for id_ in watch.memory[idx].keys() - played:
            sat_out += 1
            for name, value in watch.memory[idx][id_].items():
                assert torch.equal(value, watch.memory[idx + 1][id_][name]), name
    assert sat_out > 2


def test_what_stays_with_a_client_has_no_control(tmp_path: Path) -> None:
    watch = Watch()
    settings: dict[str, Any] = {"max_rounds": 2, "limit_train_batches": 4}
    trainer = play(tmp_path, FedSALoRA(), callbacks=[SCAFFOLD(), watch], **settings)
    shared = {f"control/{n}" for n, _ in trainer.server.adapter.tensors() if not n.startswith("B/")}
    assert {f"control/{name}" for name in watch.control[-1]} == shared
    for idx, updates in watch.updates.items():
        for update in updates:
            assert set(update.extra) == shared
            assert set(watch.memory[idx + 1][update.client.id]) == shared
            assert update.nbytes == 2 * update.payload.nbytes
            assert update.down_nbytes == (2 if idx else 1) * update.payload.nbytes


def test_rounds_that_train_one_factor_leave_the_others_control(tmp_path: Path) -> None:
    watch = Watch()
    play(tmp_path, RoLoRA(), callbacks=[SCAFFOLD(), watch], max_rounds=3)
    for idx, part in ((0, "B/"), (1, "A/")):
        for update in watch.updates[idx]:
            assert set(update.extra) == names_of(update.payload)
            assert {name[8:10] for name in update.extra} == {part, "ot"}
    first, second = watch.control[1:3]
    assert {name[:2] for name in second} == {"A/", "B/", "ot"}
    for name in (name for name in first if name.startswith("B/")):
        assert torch.equal(first[name], second[name])
        for before, after in zip(watch.memory[1].values(), watch.memory[2].values(), strict=True):
            assert torch.equal(before[f"control/{name}"], after[f"control/{name}"])
    # In the third round A and the head are sent, and control of what is trained: B and the head.
    nbytes = {part: sum(t.nbytes for t in watch.adapters[0].part(part).values()) for part in PARTS}
    for update in watch.updates[2]:
        assert update.down_nbytes == nbytes["A"] + nbytes["B"] + 2 * nbytes["other"]
        assert update.nbytes == 2 * (nbytes["B"] + nbytes["other"])


def test_a_client_that_drops_out_was_sent_the_control_too(tmp_path: Path) -> None:
    trainer = play(tmp_path, max_rounds=4, sampling=Sampling(dropout=0.5), min_clients=0)
    adapter, table = trainer.server.adapter.nbytes, rows(trainer.run.clients_csv)
    first = min(int(row["round"]) for row in table if row["status"] == "answered")
    later = [row for row in table if int(row["round"]) > first]
    assert {row["status"] for row in later} == {"answered", "dropped out"}
    assert {int(row["down_bytes"]) for row in later} == {2 * adapter}


# What is refused.

ADAMW = partial(torch.optim.AdamW, lr=1e-3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": ADAMW}, "model.optimizer must be torch.optim.SGD without momentum"),
        ({"gradient_clip_val": 1.0}, "trainer.gradient_clip_val must be left out"),
        ({"rule": HetLoRA(), "client_ranks": [1, 2, 4]}, "trainer.client_ranks must be left out"),
        ({"rule": FLoRA()}, "FLoRA, which makes its factors anew each round"),
        ({"rule": LocalOnly()}, "under LocalOnly there is none: nothing is averaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_before_there_is_a_run_folder(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    root = tmp_path / "runs"
    with pytest.raises(FedloraError, match=re.escape(words)) as caught:
        play(root, **settings)
    assert "\n" not in str(caught.value)
    assert not root.exists()


WEIGHT = [torch.nn.Parameter(torch.zeros(1))]


def setting(**changes: Any) -> Setting:
    usual: dict[str, Any] = {
        "rule": FedAvg(),
        "rnd": Round(0, 0, 2, 2),
        "clients": [Client(0, 3, rank=4), Client(1, 3, rank=4)],
        "rank": 4,
        "optimizer": torch.optim.SGD(WEIGHT, 0.1),
        "clip": None,
        "precision": "32-true",
    }
    return Setting(**(usual | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": torch.optim.SGD(WEIGHT, 0.1, momentum=0.9)}, "SGD without momentum"),
        ({"optimizer": torch.optim.SGD(WEIGHT, 0.1, maximize=True)}, "SGD without momentum"),
        ({"optimizer": torch.optim.ASGD(WEIGHT, 0.1)}, "SGD without momentum"),
        ({"clients": [Client(0, 3, rank=4), Client(1, 3, rank=2)]}, "client_ranks"),
        # Leaves steps out where the scaled loss is too large.
        ({"precision": "16-mixed"}, "averaging.precision=16-mixed, which leaves steps out"),
        ({"rule": FlexLoRA()}, "FlexLoRA, which makes its factors anew"),
        ({"rule": FRLoRA()}, "FRLoRA, which makes its factors anew"),
        ({"rule": FedSVD()}, "FedSVD, which makes its factors anew"),
        ({"rule": LocalHead(FLoRA())}, "which makes its factors anew"),
    ],
)
def test_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(FedloraError, match=re.escape(words)):
        SCAFFOLD().check(setting(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16-mixed"},
        {"optimizer": torch.optim.SGD(WEIGHT, 0.1, weight_decay=0.1)},
        {"rank": 0, "clients": [Client(0, 3), Client(1, 3)]},  # without LoRA
        {"rule": FedExLoRA()},
        {"rule": FedSALoRA()},
    ],
)
def test_not_refused(changes: dict[str, Any]) -> None:
    SCAFFOLD().check(setting(**changes))


def test_half_precision_and_full_training(tmp_path: Path) -> None:
    averaging = AdapterAveraging(precision="bf16-mixed")
    lora = LoRAConfig(enabled=False, train_norm=True)
    watch = Watch()
    trainer = play(
        tmp_path,
        averaging=averaging,
        callbacks=[SCAFFOLD(), watch],
        max_rounds=2,
        model={"lora": lora},
        limit_train_batches=1,
    )
    assert trainer.server.round_idx == 2
    for name, c in watch.control[-1].items():
        kept = [memory[f"control/{name}"].double() for memory in watch.memory[-1].values()]
        assert (c - sum(kept) / 3).abs().max() < 1e-6
