from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlora.aggregation import FedAvg, FedExLoRA, FFALoRA
from fedlora.aggregation.meter import AggregationMeter, Figures
from fedlora.state import AdapterState, Client, ClientUpdate, Residual
from tests.aggregation.rule_builders import ROUND, SHAPES, adapter, change, fresh, ideal, play

LAYERS = {f"layer{index}": (24, 16) for index in range(4)}


def measure(rule, server, updates):
    meter = AggregationMeter()
    seen = meter.watch(updates)
    after = rule.aggregate(server, seen, ROUND)
    for _ in seen:  # as in a run: a rule may stop early
        pass
    return after, meter.figures(after).error


def dense_error(after, updates):
    """``||I - S||_F / ||I||_F`` over all layers, from the definition."""
    ideals = {name: ideal(updates, name) for name in after.A}
    lost = sum(np.sum((want - change(after, name)) ** 2) for name, want in ideals.items())
    return (lost / sum(np.sum(want**2) for want in ideals.values())) ** 0.5


def ranked(server, ranks, seed=0, shapes=SHAPES):
    """What clients of these ranks send, made one after the other."""
    for number, rank in enumerate(ranks):
        ended = adapter([seed, number], rank=rank, shapes=shapes)
        yield ClientUpdate(Client(number, 1, rank), server.cut(rank), ended, 1.0 + number)


def scalar(B, A, scaling=1.0):
    return AdapterState({"x": torch.tensor([[A]])}, {"x": torch.tensor([[B]])}, {}, {"x": scaling})


def test_by_hand():
    # (1*1 + 3*3) / 2 = 5 is ideal, 2*2 = 4 is served. With one column the sketch is exact.
    server = scalar(0.0, 1.0)
    updates = play(FedAvg(), server, [scalar(1.0, 1.0), scalar(3.0, 3.0)], [1, 1])
    assert measure(FedAvg(), server, updates)[1] == pytest.approx(1 / 5, rel=1e-6)


def test_weights_and_scaling_by_hand():
    # I = (3 * 2 * 1*1 + 1 * 2 * 5*5) / 4 = 14; the means are 2 and 2: S = 2 * 4 = 8.
    server = scalar(0.0, 1.0, scaling=2.0)
    updates = play(FedAvg(), server, [scalar(1.0, 1.0, 2.0), scalar(5.0, 5.0, 2.0)], [3, 1])
    assert measure(FedAvg(), server, updates)[1] == pytest.approx(6 / 14, rel=1e-6)


@pytest.mark.parametrize("rule", [FFALoRA(), FedExLoRA()], ids=["FFALoRA", "FedExLoRA"])
def test_exact_rules_have_no_error_in_any_round(rule):
    server = fresh(shapes=LAYERS)
    for idx in range(3):
        trained = [adapter([idx, k], shapes=LAYERS) for k in range(3)]
        updates = play(rule, server, trained, [5, 1, 2])
        server, error = measure(rule, server, updates)
        assert error < 1e-6


def test_the_residual_counts():
    # Without it FedEx looks wrong by as much as FedAvg.
    server = fresh(shapes=LAYERS)
    updates = play(FedExLoRA(), server, [adapter(k, shapes=LAYERS) for k in range(3)], [1, 1, 1])
    meter = AggregationMeter()
    after = FedExLoRA().aggregate(server, meter.watch(updates), ROUND)
    assert meter.figures(after).error < 1e-6
    assert (
        meter.figures(replace(after, residual={})).error
        == measure(FedAvg(), server, updates)[1]
        > 0.3
    )


@pytest.mark.parametrize("clients", [2, 4, 9])
@pytest.mark.parametrize("seed", range(5))
def test_the_estimate_is_near_the_definition(clients, seed):
    server = replace(
        fresh(shapes=LAYERS, rank=3),
        residual={"layer1": Residual(torch.full((24, 1), 0.1), torch.ones(1, 16))},
    )
    trained = [adapter([seed, k], shapes=LAYERS, rank=3) for k in range(clients)]
    updates = play(FedAvg(), server, trained, range(1, clients + 1))
    after, error = measure(FedAvg(), server, updates)
    exact = dense_error(after, updates)
    assert exact > 0.3
    assert error == pytest.approx(exact, rel=0.25)


def test_one_client_loses_nothing(make_rule):
    server = fresh()
    updates = play(make_rule(), server, [adapter(1)], [3])
    assert measure(make_rule(), server, updates)[1] < 1e-6


def test_nothing_to_lose_is_no_error():
    server = fresh()
    assert measure(FedAvg(), server, play(FedAvg(), server, [server, server], [1, 2]))[1] == 0.0


def test_clients_without_samples_do_not_count():
    server = fresh()
    updates = play(FedAvg(), server, [adapter(1), adapter(2), adapter(3)], [2, 0, 5])
    counted = [updates[0], updates[2]]
    assert measure(FedAvg(), server, updates)[1] == measure(FedAvg(), server, counted)[1]


@pytest.mark.parametrize("weights", [[], [0, 0]], ids=["no clients", "no samples"])
def test_without_weight_there_is_no_figure(weights):
    server = fresh()
    updates = play(FedAvg(), server, [adapter(1), adapter(2)][: len(weights)], weights)
    assert measure(FedAvg(), server, updates)[1] is None


def test_without_layers_there_is_no_figure():
    server = AdapterState(other={"bias": torch.zeros(2)})
    update = ClientUpdate(Client(0, 1), server, server, 1.0)
    assert measure(FedAvg(), server, [update])[1] is None


def test_updates_pass_unchanged_and_in_order():
    updates = play(FedAvg(), fresh(), [adapter(1), adapter(2), adapter(3)], [1, 0, 2])
    assert list(AggregationMeter().watch(iter(updates))) == updates


def numbers_held(meter):
    """How many numbers all its tensors have, however deep they are."""

    def count(value):
        if isinstance(value, torch.Tensor):
            return value.numel()
        if isinstance(value, Residual):
            return value.U.numel() + (0 if value.V is None else value.V.numel())
        parts = value.values() if isinstance(value, dict) else value
        return sum(map(count, parts)) if isinstance(value, dict | list | tuple) else 0

    return sum(map(count, vars(meter).values()))


@pytest.mark.parametrize("ranks", [[3], [1, 2, 3]], ids=["one rank", "mixed ranks"])
def test_memory_does_not_grow_with_clients(ranks):
    meter = AggregationMeter()
    server = replace(adapter(0, rank=3), residual={"text.fc1": Residual(torch.ones(4, 7))})
    held = []
    for update in meter.watch(ranked(server, ranks * 20)):
        del update
        held.append(numbers_held(meter))
    assert held == held[: len(ranks)] * 20
    # 32 columns: (6 + 5) and (4 + 7) rows
    assert sum(t.numel() for t in (*meter._products.values(), *meter._basis.values())) == 32 * 22
    assert SHAPES.keys() == {name for names in meter._products for name in names}


# How far clients move.


def moved(server, updates):
    """``||M_k - M_sent||_F`` of each client over all layers, from the definition."""
    return [
        sum(np.sum((change(u.adapter, n) - change(u.sent, n)) ** 2) for n in server.A) ** 0.5
        for u in updates
    ]


def measured(server, updates, rule=None):
    meter = AggregationMeter()
    after = (rule or FedAvg()).aggregate(server, meter.watch(updates), ROUND)
    return meter.figures(after)


def test_drift_by_hand():
    # s = 2, sent 2 * 1*3 = 6: one ends at 2 * 2*3 = 12, one at 2 * 1*1 = 2, one without samples
    # far away: 6, 4. A single number has no error of the sketch.
    server = scalar(1.0, 3.0, 2.0)
    trained = [scalar(2.0, 3.0, 2.0), scalar(1.0, 1.0, 2.0), scalar(99.0, 9.0, 2.0)]
    found = measured(server, play(FedAvg(), server, trained, [1, 7, 0]))
    assert found.drift_mean == pytest.approx(5.0, rel=1e-6)  # each client counts once
    assert found.drift_max == pytest.approx(6.0, rel=1e-6)


def test_drift_is_over_all_layers_together():
    # 3 and 4: together 5
    names = {"x": 1.0, "y": 1.0}
    one = {name: torch.tensor([[1.0]]) for name in names}
    server = AdapterState(one, one, {}, names)
    ended = replace(server, B={"x": torch.tensor([[4.0]]), "y": torch.tensor([[-3.0]])})
    assert measured(server, play(FedAvg(), server, [ended], [1])).drift_max == pytest.approx(5.0)


def test_a_residual_is_no_drift():
    server = replace(scalar(1.0, 3.0), residual={"x": Residual(torch.tensor([[100.0]]))})
    found = measured(server, play(FedExLoRA(), server, [scalar(2.0, 3.0)], [1]), FedExLoRA())
    assert found.drift_mean == found.drift_max == pytest.approx(3.0, rel=1e-6)


def test_drift_of_other_ranks_is_from_what_a_client_was_sent():
    server = scalar(1.0, 3.0, 2.0)
    server = replace(
        server, A={"x": torch.tensor([[3.0], [5.0]])}, B={"x": torch.tensor([[1.0, 7.0]])}
    )
    sent = server.cut(1, 4.0)  # serves 2 * 1*3 = 6, as 8 * (1 / 4)*3
    ended = replace(sent, B={"x": torch.tensor([[0.5]])})  # 8 * 0.5*3 = 12
    update = ClientUpdate(Client(0, 1, rank=1, scale=4.0), sent, ended, 1.0)
    [_] = (meter := AggregationMeter()).watch([update])
    assert meter.figures(server).drift_max == pytest.approx(6.0, rel=1e-6)


@pytest.mark.parametrize("ranks", [[3, 3, 3], [1, 2, 3]])
def test_who_stays_does_not_drift(ranks):
    server = adapter(0, rank=3)
    updates = [replace(update, payload=update.sent) for update in ranked(server, ranks)]
    [*_] = (meter := AggregationMeter()).watch(updates)
    found = meter.figures(server)
    assert (found.drift_mean, found.drift_max) == (0.0, 0.0)


@pytest.mark.parametrize("seed", range(5))
def test_drift_is_near_the_definition(seed):
    server = adapter([seed, 99], shapes=LAYERS, rank=3)
    updates = list(ranked(server, [1, 3, 2, 3], seed=seed, shapes=LAYERS))
    [*_] = (meter := AggregationMeter()).watch(updates)
    found, exact = meter.figures(server), moved(server, updates)
    assert found.drift_mean == pytest.approx(np.mean(exact), rel=0.15)
    assert found.drift_max == pytest.approx(max(exact), rel=0.2)
    assert found.drift_mean < found.drift_max


# What the average is like.


def with_values(*values):
    """A square layer whose product has these singular values."""
    count = len(values)
    left, right = (
        np.linalg.qr(np.random.default_rng(seed).standard_normal((64, 64)))[0] for seed in (1, 2)
    )
    A = torch.from_numpy(right[:count].copy())
    B = torch.from_numpy(left[:, :count] * np.array(values) / 2.0)
    return {"x": A}, {"x": B}


def effective_rank(*values, layer="x"):
    A, B = ({layer: part["x"]} for part in with_values(*values))
    state = AdapterState(A, B, {}, {layer: 2.0})
    server = replace(state, B={layer: torch.zeros_like(B[layer])})
    return measured(server, play(FedAvg(), server, [state, state], [1, 3])).effective_rank


@pytest.mark.parametrize("value", [1e-6, 1.0, 1e6])
def test_one_direction_is_of_rank_one(value):
    assert effective_rank(value) == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize(
    ("values", "rank"),
    [
        ([1.0] * 2, 2.0),
        ([1e-3] * 8, 8.0),
        ([5.0] * 32, 32.0),
        ([2.0, 1.0], 25 / 17),  # (4 + 1)^2 / (16 + 1)
        ([3.0, 1.0, 1.0, 1.0], 12**2 / 84),
    ],
)
def test_the_effective_rank_is_that_of_the_singular_values(values, rank):
    # An estimate, of which 32 columns leave a deviation of 15 % at most and a bias of 6 %: 20
    # layers, each with signs of its own, leave a deviation of 3 %.
    found = [effective_rank(*values, layer=f"layer{number}") for number in range(20)]
    assert np.mean(found) == pytest.approx(rank, rel=0.12)
    assert min(found) < max(found)
    assert found == pytest.approx([rank] * 20, rel=0.5)


def test_the_effective_rank_is_of_the_average_and_not_of_a_client():
    # two clients of rank one along different axes: diag(1, 1) / 2
    eye = torch.eye(64, dtype=torch.float64)
    states = [
        AdapterState({"x": eye[k : k + 1]}, {"x": eye[:, k : k + 1]}, {}, {"x": 1.0})
        for k in (0, 1)
    ]
    server = replace(states[0], B={"x": 0.0 * states[0].B["x"]})
    updates = play(FedAvg(), server, states, [1, 1])
    assert measured(server, updates).effective_rank == pytest.approx(2.0, rel=0.2)
    # the residual that they trained beside is none of this round's training
    beside = {"x": Residual(torch.eye(64, dtype=torch.float64))}
    other = [replace(u, sent=replace(u.sent, residual=beside)) for u in updates]
    assert measured(server, other).effective_rank == measured(server, updates).effective_rank


def test_the_effective_rank_is_a_mean_over_the_layers_that_are_not_zero():
    state = AdapterState(
        {name: torch.ones(1, 3) for name in "xyz"},
        {"x": torch.ones(2, 1), "y": torch.zeros(2, 1), "z": torch.ones(2, 1)},
        {},
        dict.fromkeys("xyz", 1.0),
    )
    found = measured(state, play(FedAvg(), state, [state], [1])).effective_rank
    assert found == pytest.approx(1.0, rel=1e-6)


def test_nothing_trained_has_no_effective_rank():
    server = fresh()
    found = measured(server, play(FedAvg(), server, [server, server], [1, 2]))
    assert found == Figures(error=0.0, effective_rank=None, drift_mean=0.0, drift_max=0.0)


def figures():
    """Errors of some federations of nine layers, to the last bit."""
    shapes = {f"layer{index}": (8, 9) for index in range(9)}
    server = fresh(shapes=shapes)
    for seed in range(8):
        trained = [adapter([seed, k], shapes=shapes) for k in range(3)]
        yield measure(FedAvg(), server, play(FedAvg(), server, trained, [1, 2, 3]))[1].hex()


def test_another_process_gets_the_same_figures_to_the_bit():
    # Strings hash differently per process, so the order of a set of layers would show here.
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import test_meter; print(*test_meter.figures())"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, str(Path(__file__).parent)],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.split() == list(figures())
