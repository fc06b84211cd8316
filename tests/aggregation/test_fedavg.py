from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings

from fedlora.aggregation import FedAvg
from fedlora.state import AdapterState, Client, ClientUpdate
from tests.aggregation.rule_builders import (
    ROUND,
    SHAPES,
    adapter,
    change,
    federations,
    fresh,
    mean,
    play,
)


def test_weights_2_4_2_by_hand():
    # (2*1 + 4*2 + 2*1) / 8 = 1.5, (2*2 + 4*4 + 2*3) / 8 = 3.25, (2*4 + 4*5 + 2*6) / 8 = 5
    values = [[1.0, 2.0, 4.0], [2.0, 4.0, 5.0], [1.0, 3.0, 6.0]]
    server = AdapterState(other={"bias": torch.zeros(3)})
    updates = [
        ClientUpdate(Client(k, n), server, AdapterState(other={"bias": torch.tensor(v)}), float(n))
        for k, (v, n) in enumerate(zip(values, [2, 4, 2], strict=True))
    ]
    after = FedAvg().aggregate(server, updates, ROUND)
    assert after.other["bias"].tolist() == [1.5, 3.25, 5.0]


def test_the_weight_counts_and_not_the_samples():
    server = AdapterState(other={"bias": torch.zeros(1)})
    updates = [
        ClientUpdate(Client(k, 100), server, AdapterState(other={"bias": torch.tensor([v])}), w)
        for k, (v, w) in enumerate([(1.0, 1.0), (5.0, 3.0)])
    ]
    assert FedAvg().aggregate(server, updates, ROUND).other["bias"].tolist() == [4.0]


@settings(max_examples=40, deadline=None)
@given(federation=federations())
def test_every_tensor_is_the_weighted_mean(federation):
    server, trained, weights = federation
    after = FedAvg().aggregate(server, play(FedAvg(), server, trained, weights), ROUND)
    everyone = [dict(state.tensors()) for state in trained]
    for name, value in after.tensors():
        want = mean([tensors[name] for tensors in everyone], weights)
        np.testing.assert_allclose(value.numpy(), want, rtol=1e-6, atol=1e-6)


def test_many_clients_do_not_lose_digits():
    # 0.1 is not a float32 either; a running float32 sum of 20,000 of them is off by 1e-4.
    server = AdapterState(other={"bias": torch.zeros(1)})
    value = torch.tensor([0.1])
    update = ClientUpdate(Client(0, 3), server, AdapterState(other={"bias": value}), 3.0)
    after = FedAvg().aggregate(server, (update for _ in range(20_000)), ROUND)
    assert torch.equal(after.other["bias"], value)


def test_what_is_lost_is_the_covariance_of_the_factors():
    # sum p_k B_k A_k - Bbar Abar = sum p_k (B_k - Bbar)(A_k - Abar), of rank (K - 1) r at most.
    weights = [2, 4, 2]
    trained = [adapter(seed, rank=2, scaling=1.0, dtype=torch.float64) for seed in (1, 2, 3)]
    server = fresh(rank=2, scaling=1.0, dtype=torch.float64)
    after = FedAvg().aggregate(server, play(FedAvg(), server, trained, weights), ROUND)
    for name in SHAPES:
        As, Bs = ([getattr(s, part)[name].numpy() for s in trained] for part in "AB")
        p = [weight / 8 for weight in weights]
        ideal = sum(pk * B @ A for pk, A, B in zip(p, As, Bs, strict=True))
        A_mean = sum(pk * A for pk, A in zip(p, As, strict=True))
        B_mean = sum(pk * B for pk, B in zip(p, Bs, strict=True))
        lost = sum(pk * (B - B_mean) @ (A - A_mean) for pk, A, B in zip(p, As, Bs, strict=True))
        np.testing.assert_allclose(ideal - change(after, name), lost, atol=1e-12)
        assert np.linalg.matrix_rank(lost, tol=1e-9) <= (3 - 1) * 2
        assert np.linalg.norm(lost) > 0.1  # it does lose something


def test_one_factor_equal_on_all_clients_loses_nothing():
    shared = adapter(0).A
    trained = [AdapterState(shared, s.B, s.other, s.scaling) for s in (adapter(1), adapter(2))]
    server = fresh()
    updates = play(FedAvg(), server, trained, [3, 5])
    after = FedAvg().aggregate(server, updates, ROUND)
    for name in SHAPES:
        want = 3 / 8 * change(trained[0], name) + 5 / 8 * change(trained[1], name)
        np.testing.assert_allclose(change(after, name), want, atol=1e-5)


def test_all_three_parts_travel():
    [update] = play(FedAvg(), fresh(), [adapter(1)], [4])
    assert update.payload.A.keys() == update.payload.B.keys() == SHAPES.keys()
    # (2*5 + 6*2 + 2*7 + 4*2 of factors, 3*4 + 1 of the head) float32
    assert update.nbytes == (10 + 12 + 14 + 8 + 12 + 1) * 4
    assert FedAvg().distribute(fresh(), Client(0, 4), ROUND).nbytes == update.nbytes
