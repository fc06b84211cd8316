from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from fedlora.aggregation import FedAvg, FedExLoRA
from fedlora.state import AdapterState, Client, Residual, Round
from tests.aggregation.rule_builders import (
    HEAD,
    ROUND,
    SHAPES,
    adapter,
    change,
    federations,
    fresh,
    ideal,
    mean,
    names,
    play,
    relative,
    residual,
)


def test_by_hand():
    # One number a factor, s = 2, weights 1 and 3: sum p s B A = 2 (1*1*1 + 3*3*2) / 4 = 9.5,
    # the means are B = (1 + 9) / 4 = 2.5 and A = (1 + 6) / 4 = 1.75: 9.5 - 2 * 2.5 * 1.75 = 0.75.
    def one(B, A):
        return AdapterState({"x": torch.tensor([[A]])}, {"x": torch.tensor([[B]])}, {}, {"x": 2.0})

    rule, server = FedExLoRA(), one(0.0, 1.0)
    updates = play(rule, server, [one(1.0, 1.0), one(3.0, 2.0)], [1, 3])
    after = rule.aggregate(server, updates, ROUND)
    assert after.A["x"].item() == 1.75
    assert after.B["x"].item() == 2.5
    assert after.residual["x"].dense().item() == 0.75


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("weights", [[2, 4, 2], [1, 0, 999]])
def test_the_served_weight_is_exact(dtype, error, weights):
    rule, server = FedExLoRA(), fresh(dtype=dtype)
    trained = [adapter(seed, dtype=dtype) for seed in (1, 2, 3)]
    after = rule.aggregate(server, play(rule, server, trained, weights), ROUND)
    for name, shape in SHAPES.items():
        W0 = np.random.default_rng(5).standard_normal(shape)
        products = [s.B[name].double().numpy() @ s.A[name].double().numpy() for s in trained]
        update = sum(n / sum(weights) * 2.0 * BA for n, BA in zip(weights, products, strict=True))
        served = W0 + change(after, name)
        assert relative(served - (W0 + update), W0 + update) < error
        assert relative(change(after, name) - update, update) < error


@settings(max_examples=40, deadline=None)
@given(federation=federations())
def test_the_served_weight_is_exact_for_all_shapes(federation):
    server, trained, weights = federation
    rule = FedExLoRA()
    updates = play(rule, server, trained, weights)
    after = rule.aggregate(server, updates, ROUND)
    for name in server.A:
        scale = 1 + max(np.linalg.norm(change(state, name)) for state in trained)
        assert np.linalg.norm(change(after, name) - ideal(updates, name)) < 1e-5 * scale


def test_the_residual_accumulates_over_rounds():
    rule, server = FedExLoRA(), fresh()
    weights = [3, 1, 2]
    lost = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for idx in range(4):
        rnd = Round(idx, num_clients=3, cohort=3)
        trained = [adapter([idx, k]) for k in range(3)]
        updates = play(rule, server, trained, weights, rnd)
        after = rule.aggregate(server, updates, rnd)
        for name in SHAPES:
            factors = mean([torch.from_numpy(change(state, name)) for state in trained], weights)
            A = mean([state.A[name] for state in trained], weights)
            B = mean([state.B[name] for state in trained], weights)
            lost[name] += factors - 2.0 * B @ A  # R_t
            assert relative(residual(after, name) - lost[name], lost[name]) < 1e-5
            want = ideal(updates, name)  # with the residual that they trained beside
            assert relative(change(after, name) - want, want) < 1e-5
        server = after


def test_scaling_may_differ_per_client():
    rule, server = FedExLoRA(), fresh(scaling=2.0)
    trained = [adapter(1, scaling=2.0), adapter(2, scaling=0.5), adapter(3, scaling=8.0)]
    updates = play(rule, server, trained, [2, 4, 2])
    after = rule.aggregate(server, updates, ROUND)
    assert after.scaling == server.scaling
    for name in SHAPES:
        BA = [s.B[name].double().numpy() @ s.A[name].double().numpy() for s in trained]
        want = (2 * 2.0 * BA[0] + 4 * 0.5 * BA[1] + 2 * 8.0 * BA[2]) / 8
        assert relative(change(after, name) - want, want) < 1e-5


def test_factors_and_head_are_those_of_fedavg():
    server = fresh()
    updates = play(FedExLoRA(), server, [adapter(1), adapter(2)], [1, 2])
    exact, plain = (rule.aggregate(server, updates, ROUND) for rule in (FedExLoRA(), FedAvg()))
    assert names(exact) == names(plain)
    for (name, one), (_, other) in zip(exact.tensors(), plain.tensors(), strict=True):
        assert torch.equal(one, other), name
    head = (adapter(1).other[HEAD] + 2 * adapter(2).other[HEAD]) / 3
    torch.testing.assert_close(exact.other[HEAD], head)


def test_the_residual_is_thin_until_dense_is_smaller():
    # 3 clients of rank 2: (3 - 1) 2 = 4 columns a round. Thin takes 4 t (64 + 64) numbers after t
    # rounds, dense 64 * 64 = 4096: equal at t = 8.
    shapes = {"x": (64, 64)}
    rule, server = FedExLoRA(), fresh(shapes=shapes)
    sizes = []
    for idx in range(9):
        trained = [adapter([idx, k], shapes=shapes) for k in range(3)]
        server = rule.aggregate(server, play(rule, server, trained, [1, 1, 1]), ROUND)
        sizes.append(server.residual["x"].nbytes)
    assert sizes == [*(4 * 512 * t for t in range(1, 8)), 4 * 4096, 4 * 4096]


def test_the_residual_travels_down_and_not_up():
    rule = FedExLoRA()
    beside = {"vision.fc1": Residual(torch.ones(6, 5))}
    server = replace(fresh(), residual=beside)
    down = rule.distribute(server, Client(0, 1), ROUND)
    assert down.residual == beside
    assert down.nbytes == fresh().nbytes + 6 * 5 * 4
    [update] = play(rule, server, [replace(adapter(1), residual=beside)], [1])
    assert update.payload.residual == {}
    assert update.nbytes == fresh().nbytes
    assert update.adapter.residual == beside


def test_one_client_loses_nothing():
    rule, server = FedExLoRA(), fresh()
    after = rule.aggregate(server, play(rule, server, [adapter(1)], [3]), ROUND)
    assert all(np.abs(residual(after, name)).max() < 1e-6 for name in SHAPES)
