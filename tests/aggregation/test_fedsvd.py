from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from fedlora.aggregation import FedSVD, FFALoRA
from fedlora.errors import FedloraError
from fedlora.state import Client, Round
from fedlora.testing import check_aggregator
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
    snapshot,
)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_the_factors_are_those_of_the_decomposition(dtype, error):
    server = fresh(dtype=dtype)
    trained, weights = [adapter(seed, dtype=dtype) for seed in (1, 2, 3)], [2, 1, 5]
    after = FedSVD().aggregate(server, play(FedSVD(), server, trained, weights), ROUND)
    for name in SHAPES:
        BA = mean([s.B[name] for s in trained], weights) @ server.A[name].double().numpy()
        U, S, Vt = np.linalg.svd(BA)
        A, B = after.A[name].double().numpy(), after.B[name].double().numpy()
        assert relative(B @ A - BA, BA) < error
        np.testing.assert_allclose(A @ A.T, np.eye(2), atol=error)
        for i in range(2):  # up to a sign that A and B share
            sign = np.sign(A[i] @ Vt[i])
            np.testing.assert_allclose(sign * A[i], Vt[i], atol=10 * error)
            np.testing.assert_allclose(sign * B[:, i], U[:, i] * S[i], atol=10 * error * S[0])
    head = mean([state.other[HEAD] for state in trained], weights)
    np.testing.assert_allclose(after.other[HEAD].numpy(), head, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(federation=federations())
def test_the_product_stays_exact_and_a_orthonormal_for_all_shapes(federation):
    server, trained, weights = federation
    updates = play(FedSVD(), server, trained, weights)
    after = FedSVD().aggregate(server, updates, ROUND)
    for name in server.A:
        want = ideal(updates, name)
        assert relative(change(after, name) - want, want) < 1e-5
        rank, in_features = server.A[name].shape
        live = min(rank, in_features, server.B[name].shape[0])
        A = after.A[name].double().numpy()
        np.testing.assert_allclose(A @ A.T, np.diag([1.0] * live + [0] * (rank - live)), atol=1e-5)
        assert not after.B[name][:, live:].any()


def test_a_stays_orthonormal_where_the_product_has_a_lower_rank():
    server, one = fresh(), adapter(1)
    half = replace(one, B={name: B * torch.tensor([1.0, 0.0]) for name, B in one.B.items()})
    after = FedSVD().aggregate(server, play(FedSVD(), server, [half], [1]), ROUND)
    for name in SHAPES:
        A = after.A[name].double().numpy()
        np.testing.assert_allclose(A @ A.T, np.eye(2), atol=1e-6)
        want = 2.0 * half.B[name].double().numpy() @ server.A[name].double().numpy()
        assert relative(change(after, name) - want, want) < 1e-6


def test_a_changes_in_the_rounds_that_are_due():
    rule, server = FedSVD(period=2), fresh()
    for idx, due in enumerate([False, True, False, True, False]):
        updates = play(rule, server, [adapter([idx, k]) for k in range(2)], [1, 2], Round(idx))
        after = rule.aggregate(server, updates, Round(idx))
        assert [torch.equal(after.A[name], server.A[name]) for name in SHAPES] == [not due] * 2
        server = after


def test_period_zero_is_ffa_to_the_bit():
    servers = {rule: fresh() for rule in (FedSVD(period=0), FFALoRA())}
    for idx in range(4):
        states = [adapter([idx, k]) for k in range(3)]
        for rule, server in servers.items():
            updates = play(rule, server, states, [3, 1, 2], Round(idx))
            servers[rule] = rule.aggregate(server, updates, Round(idx))
        one, other = servers.values()
        assert snapshot(one) == snapshot(other)


def test_a_product_of_zero_keeps_the_factors():
    server = fresh()
    still = replace(adapter(1), B=server.B)
    after = FedSVD().aggregate(server, play(FedSVD(), server, [still] * 2, [1, 2]), ROUND)
    for name in SHAPES:
        assert torch.equal(after.A[name], server.A[name])
        assert not after.B[name].any()


@pytest.mark.parametrize("weights", [[], [0, 0]])
def test_without_weight_nothing_is_refactorised(weights):
    server = adapter(0)
    updates = play(FedSVD(), server, [adapter(1), adapter(2)][: len(weights)], weights)
    assert snapshot(FedSVD().aggregate(server, updates, ROUND)) == snapshot(server)


@pytest.mark.parametrize(
    ("period", "last", "idx", "a_travels"),
    [
        (1, None, 0, False),  # A is known from the seed
        (1, None, 1, True),
        (1, 4, 5, True),
        (2, None, 1, False),  # made anew after rounds 1, 3, 5
        (2, None, 2, True),
        (2, 1, 2, True),
        (2, 2, 3, False),
        (2, 2, 4, True),
        (0, None, 9, False),
    ],
)
def test_a_travels_down_where_it_is_newer_than_what_the_client_has(period, last, idx, a_travels):
    rule, server = FedSVD(period), adapter(0)
    down = rule.distribute(server, Client(0, 1, last_round=last), Round(idx))
    assert names(down) == [
        *(f"{part}/{name}" for part in ("AB" if a_travels else "B") for name in SHAPES),
        *(f"other/{name}" for name in server.other),
    ]


def test_only_b_and_the_head_travel_up():
    server = fresh()
    [update] = play(FedSVD(), server, [adapter(1)], [4], Round(3))
    assert update.nbytes == (6 * 2 + 4 * 2 + 3 * 4 + 1) * 4
    assert names(update.payload)[:2] == ["B/vision.fc1", "B/text.fc1"]


def test_a_period_below_zero_is_refused():
    with pytest.raises(FedloraError, match="period must be 0 or above, got -1"):
        FedSVD(period=-1)


@pytest.mark.parametrize("period", [0, 1, 2])
def test_every_promise_is_kept(period):
    check_aggregator(lambda: FedSVD(period))
