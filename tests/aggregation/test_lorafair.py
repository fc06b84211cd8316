from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.aggregation import FedAvg, LoRAFAIR
from fedlora.state import AdapterState
from tests.aggregation.rule_builders import (
    ROUND,
    SHAPES,
    adapter,
    change,
    federations,
    fresh,
    ideal,
    mean,
    play,
    snapshot,
)

LAMS = [0.0, 1e-4, 0.01, 1.0, 100.0]


def corrected(trained, weights, name, scaling, lam):
    """B = mean B + D, D by least squares: D [mean A, sqrt(lam) I] nearest to [what is lost, 0]."""
    rank = len(trained[0].A[name])
    A, B = (mean([getattr(state, part)[name] for state in trained], weights) for part in "AB")
    wanted = mean([torch.from_numpy(change(state, name)) for state in trained], weights) / scaling
    left = np.concatenate([A, lam**0.5 * np.eye(rank)], axis=1)
    right = np.concatenate([wanted - B @ A, np.zeros_like(B)], axis=1)
    return B + np.linalg.lstsq(left.T, right.T, rcond=1e-10)[0].T


def error(after, updates, name):
    return np.linalg.norm(ideal(updates, name) - change(after, name))


@pytest.mark.parametrize(("lam", "B"), [(0.0, 2.5), (1.0, 2.4), (4.0, 2.25), (float("inf"), 2.0)])
def test_by_hand(lam, B):
    # dW = (1*1 + 3*3) / 2 = 5, the means are 2 and 2: D = (5 - 4) 2 / (4 + lam).
    def one(B, A):
        return AdapterState({"x": torch.tensor([[A]])}, {"x": torch.tensor([[B]])}, {}, {"x": 3.0})

    rule, server = LoRAFAIR(lam), one(0.0, 1.0)
    after = rule.aggregate(
        server, play(rule, server, [one(1.0, 1.0), one(3.0, 3.0)], [1, 1]), ROUND
    )
    assert after.A["x"].item() == 2.0
    assert after.B["x"].item() == pytest.approx(B, rel=1e-7)


@pytest.mark.parametrize("lam", LAMS)
@pytest.mark.parametrize("shapes", [SHAPES, {"x": (40, 30)}, {"x": (2, 2)}], ids=str)
def test_the_correction_from_least_squares(lam, shapes):
    options = {"shapes": shapes, "dtype": torch.float64}
    server = fresh(scaling=2.0, **options)
    trained = [adapter(k, scaling=s, **options) for k, s in [(1, 2.0), (2, 2.0), (3, 0.5)]]
    weights = [2, 5, 1]
    after = LoRAFAIR(lam).aggregate(server, play(LoRAFAIR(), server, trained, weights), ROUND)
    for name in shapes:
        want = corrected(trained, weights, name, 2.0, lam)
        np.testing.assert_allclose(after.B[name].numpy(), want, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(federation=federations(), lam=st.sampled_from(LAMS))
def test_never_further_from_the_ideal_than_fedavg(federation, lam):
    server, trained, weights = federation
    updates = play(LoRAFAIR(), server, trained, weights)
    after = LoRAFAIR(lam).aggregate(server, updates, ROUND)
    plain = FedAvg().aggregate(server, updates, ROUND)
    for name in server.A:
        rounding = 1e-5 * np.linalg.norm(after.B[name]) * np.linalg.norm(after.A[name])
        assert error(after, updates, name) <= error(plain, updates, name) + rounding
        assert torch.equal(after.A[name], plain.A[name])
    assert all(torch.equal(after.other[name], plain.other[name]) for name in plain.other)


def test_it_is_nearer_where_fedavg_loses_and_more_so_with_less_lam():
    server, trained = fresh(), [adapter(1), adapter(2), adapter(3)]
    updates = play(LoRAFAIR(), server, trained, [1, 2, 3])
    for name in SHAPES:
        rules = [*(LoRAFAIR(lam) for lam in LAMS), FedAvg()]
        errors = [error(rule.aggregate(server, updates, ROUND), updates, name) for rule in rules]
        assert errors == sorted(errors)
        assert errors[0] < 0.99 * errors[-1]


@pytest.mark.parametrize("lam", [1e12, float("inf")])
def test_a_large_lam_is_fedavg(lam):
    server, trained = fresh(), [adapter(1), adapter(2)]
    updates = play(LoRAFAIR(), server, trained, [1, 3])
    after = LoRAFAIR(lam).aggregate(server, updates, ROUND)
    assert snapshot(after) == snapshot(FedAvg().aggregate(server, updates, ROUND))


@pytest.mark.parametrize("lam", [0.0, 1e-13])
@pytest.mark.parametrize("apart", [0.0, 1e-7], ids=["equal rows", "equal but for rounding"])
def test_without_lam_a_direction_that_mean_a_lacks_is_left_alone(lam, apart):
    def twin(state):
        rows = {n: torch.cat([A[:1], A[:1], A[1:2] * apart]) for n, A in state.A.items()}
        return replace(state, A=rows)

    server, trained = twin(fresh(rank=3)), [twin(adapter(k, rank=3)) for k in (1, 2, 3)]
    updates = play(LoRAFAIR(), server, trained, [1, 1, 2])
    after = LoRAFAIR(lam).aggregate(server, updates, ROUND)
    plain = FedAvg().aggregate(server, updates, ROUND)
    for name in SHAPES:
        assert after.B[name].abs().max() < 20  # and not 1e7 in the third slot
        assert error(after, updates, name) < error(plain, updates, name)


@pytest.mark.parametrize("lam", [-1e-9, -1.0, float("nan")])
def test_a_lam_below_zero_is_refused(lam):
    with pytest.raises(ValueError, match="lam must be 0 or above"):
        LoRAFAIR(lam)
