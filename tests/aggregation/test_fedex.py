from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from fedlora import FedloraError
from fedlora.aggregation import FedAvg, FedExLoRA
from fedlora.aggregation.meter import AggregationMeter
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
    down = rule.distribute(server, Client(0, 1), replace(ROUND, idx=1))
    assert down.residual == beside
    assert down.nbytes == fresh().nbytes + 6 * 5 * 4
    [update] = play(rule, server, [replace(adapter(1), residual=beside)], [1])
    assert update.payload.residual == {}
    assert update.nbytes == fresh().nbytes
    assert update.adapter.residual == beside


# What of the residual travels, and how much that is.

WIDE = {"x": (64, 48), "y": (32, 64)}


def near(start, seed, step, shapes=WIDE):
    """Where a client ends that moved a little from ``start``."""
    moved = adapter(seed, rank=2, shapes=shapes)
    return replace(
        start,
        A={name: A + step * moved.A[name] for name, A in start.A.items()},
        B={name: B + step * moved.B[name] for name, B in start.B.items()},
    )


def columns(changes):
    return {name: change.U.shape[1] for name, change in changes.items()}


@pytest.mark.parametrize("clients", [2, 3, 5])
@pytest.mark.parametrize("step", [1.0, 1e-2])
def test_a_round_adds_one_rank_less_than_there_are_clients(clients, step):
    # sum p (B_k - mean B)(A_k - mean A) has rank (K - 1) r. Where clients hardly differ, the
    # rounding of the means to float32 is not far below it, and would fill 2 r columns more.
    rule, server = FedExLoRA(), adapter(0, shapes=WIDE)
    trained = [near(server, 1 + k, step) for k in range(clients)]
    after = rule.aggregate(server, play(rule, server, trained, range(1, clients + 1)), ROUND)
    assert columns(after.added) == dict.fromkeys(WIDE, (clients - 1) * 2)
    for name in WIDE:
        want = ideal(play(rule, server, trained, range(1, clients + 1)), name)
        assert relative(change(after, name) - want, want) < 2e-7


@pytest.mark.parametrize("weights", [[3], [0, 3], [1, 2, 3]], ids=["one", "one counts", "equal"])
def test_nothing_lost_is_nothing_sent(weights):
    rule, server = FedExLoRA(), fresh(shapes=WIDE)
    trained = [adapter(1, shapes=WIDE)] * len(weights)
    after = rule.aggregate(server, play(rule, server, trained, weights), ROUND)
    assert columns(after.residual) == columns(after.added) == dict.fromkeys(WIDE, 0)
    assert after.nbytes == server.nbytes


def test_one_factor_for_all_loses_nothing():
    rule, server = FedExLoRA(), adapter(0, shapes=WIDE)
    trained = [replace(adapter(k, shapes=WIDE), A=server.A) for k in (1, 2, 3)]
    after = rule.aggregate(server, play(rule, server, trained, [1, 2, 3]), ROUND)
    assert columns(after.added) == dict.fromkeys(WIDE, 0)


@pytest.mark.parametrize("weights", [[], [0, 0]], ids=["no clients", "no samples"])
def test_without_weight_nothing_changes_and_nothing_is_added(weights):
    rule = FedExLoRA()
    old = {"x": Residual(torch.ones(64, 1), torch.ones(1, 48))}
    server = replace(adapter(0, shapes=WIDE), residual=old, added=old)
    trained = [adapter(1, shapes=WIDE)] * len(weights)
    after = rule.aggregate(server, play(rule, server, trained, weights), ROUND)
    for (name, one), (_, other) in zip(after.tensors(), server.tensors(), strict=True):
        assert torch.equal(one, other), name
    assert after.residual == old
    assert after.added == {}


@pytest.mark.parametrize("shapes", [WIDE, {"x": (16, 24)}], ids=["thin", "soon dense"])
def test_a_client_that_follows_gets_to_the_same_bits(shapes):
    # 3 clients of rank 2: 4 columns a round. 16 by 24 is dense from 10 columns on.
    rule, server = FedExLoRA(), fresh(shapes=shapes)
    has = {}
    for idx in range(4):
        rnd = Round(idx, num_clients=3, cohort=3)
        down = rule.distribute(server, Client(0, 1, last_round=idx - 1 if idx else None), rnd)
        has |= down.residual
        for name, new in down.added.items():
            has[name] = has[name].add(new)
        whole = rule.distribute(server, Client(1, 1), rnd)
        assert not whole.added
        assert has.keys() == whole.residual.keys() == server.residual.keys()
        for name, want in whole.residual.items():
            assert torch.equal(has[name].U, want.U)
            assert (has[name].V is None) == (want.V is None)
            assert want.V is None or torch.equal(has[name].V, want.V)
        # the first round has no residual, the second added all that there is
        assert bool(down.added) == (idx > 1)
        assert down.nbytes < whole.nbytes if idx > 1 else down.nbytes == whole.nbytes
        trained = [adapter([idx, k], shapes=shapes) for k in range(3)]
        server = rule.aggregate(server, play(rule, server, trained, [3, 1, 2], rnd), rnd)
    assert [whole.residual[name].V is None for name in shapes] == [shapes is not WIDE] * len(shapes)


def test_who_missed_a_round_is_sent_the_whole():
    rule = FedExLoRA()
    beside = {"x": Residual(torch.ones(64, 4), torch.ones(4, 48))}
    new = {"x": Residual(torch.ones(64, 1), torch.ones(1, 48))}
    server = replace(fresh(shapes=WIDE), residual=beside, added=new)
    rnd = Round(5)
    for last, parts in ((None, (beside, {})), (3, (beside, {})), (4, ({}, new))):
        down = rule.distribute(server, Client(0, 1, last_round=last), rnd)
        assert (down.residual, down.added) == parts, last


# Only so much of it.


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_best_approximation_of_a_rank_is_kept(rank):
    rule, server = FedExLoRA(rank), fresh(shapes=WIDE)
    trained = [adapter(k, shapes=WIDE) for k in (1, 2, 3)]
    updates = play(rule, server, trained, [1, 2, 3])
    meter = AggregationMeter()
    after = rule.aggregate(server, meter.watch(updates), ROUND)
    left_out = wanted = 0.0
    for name in WIDE:
        A, B = (mean([part[name] for part in parts], [1, 2, 3]) for parts in factors(trained))
        lost = ideal(updates, name) - 2.0 * B @ A
        left, values, right = np.linalg.svd(lost)
        best = left[:, :rank] * values[:rank] @ right[:rank]
        assert after.added[name].U.shape[1] == rank
        assert relative(residual(after, name) - best, best) < 1e-5
        left_out += np.sum(values[rank:] ** 2)
        wanted += np.linalg.norm(ideal(updates, name)) ** 2
    # agg/error says what was left out, up to the noise of its sketch
    assert meter.figures(after).error == pytest.approx((left_out / wanted) ** 0.5, rel=0.25)


def factors(states):
    return [state.A for state in states], [state.B for state in states]


def test_a_rank_that_loses_nothing_is_as_good_as_none():
    server = fresh(shapes=WIDE)
    trained = [adapter(k, shapes=WIDE) for k in (1, 2, 3)]
    whole, cut = (
        rule.aggregate(server, play(rule, server, trained, [1, 2, 3]), ROUND)
        for rule in (FedExLoRA(), FedExLoRA(4))
    )
    for name in WIDE:
        assert torch.equal(whole.residual[name].dense(), cut.residual[name].dense())


def test_with_a_rank_it_is_not_exact_and_says_so():
    assert FedExLoRA().exact
    assert not FedExLoRA(2).exact


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank):
    message = rf"aggregator.residual_rank must be 1 or above, got {rank}"
    with pytest.raises(FedloraError, match=message):
        FedExLoRA(rank)
