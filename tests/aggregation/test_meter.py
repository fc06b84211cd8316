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
from fedlora.aggregation.meter import AggregationMeter
from fedlora.state import AdapterState, Client, ClientUpdate, Residual
from tests.aggregation.rule_builders import ROUND, SHAPES, adapter, change, fresh, ideal, play

LAYERS = {f"layer{index}": (24, 16) for index in range(4)}


def measure(rule, server, updates):
    meter = AggregationMeter()
    after = rule.aggregate(server, meter.watch(updates), ROUND)
    return after, meter.figures(after).error


def dense_error(after, updates):
    """``||I - S||_F / ||I||_F`` over all layers, from the definition."""
    ideals = {name: ideal(updates, name) for name in after.A}
    lost = sum(np.sum((want - change(after, name)) ** 2) for name, want in ideals.items())
    return (lost / sum(np.sum(want**2) for want in ideals.values())) ** 0.5


def scalar(B, A, scaling=1.0):
    return AdapterState({"x": torch.tensor([[A]])}, {"x": torch.tensor([[B]])}, {}, {"x": scaling})


def test_by_hand():
    # (1*1 + 3*3) / 2 = 5 is ideal, 2*2 = 4 is served. With one column the sketch is exact.
    server = scalar(0.0, 1.0)
    updates = play(FedAvg(), server, [scalar(1.0, 1.0), scalar(3.0, 3.0)], [1, 1])
    assert measure(FedAvg(), server, updates)[1] == pytest.approx(1 / 5, rel=1e-12)


def test_weights_and_scaling_by_hand():
    # I = (3 * 2 * 1*1 + 1 * 2 * 5*5) / 4 = 14; the means are 2 and 2: S = 2 * 4 = 8.
    server = scalar(0.0, 1.0, scaling=2.0)
    updates = play(FedAvg(), server, [scalar(1.0, 1.0, 2.0), scalar(5.0, 5.0, 2.0)], [3, 1])
    assert measure(FedAvg(), server, updates)[1] == pytest.approx(6 / 14, rel=1e-12)


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


def test_memory_does_not_grow_with_clients():
    meter, server = AggregationMeter(), fresh()
    held = []
    for update in meter.watch(play(FedAvg(), server, [adapter(k) for k in range(20)], [1] * 20)):
        del update
        held.append(sum(t.numel() for t in (*meter._products.values(), *meter._basis.values())))
    # 32 columns: (6 + 5) and (4 + 7) rows
    assert set(held) == {32 * (6 + 5 + 4 + 7)}
    assert SHAPES.keys() == meter._products.keys()


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
