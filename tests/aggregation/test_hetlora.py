from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.aggregation import FedAvg, HetLoRA
from fedlora.state import AdapterState, Client
from tests.aggregation.rule_builders import (
    HEAD,
    ROUND,
    SHAPES,
    adapter,
    change,
    federations,
    fresh,
    mean,
    play,
    relative,
    snapshot,
)


def aggregate(server, trained, weights, weighting="norm"):
    rule = HetLoRA(weighting)
    return rule.aggregate(server, play(rule, server, trained, weights), ROUND)


def scalar(B, A, head, scaling=1.0):
    A, B = torch.tensor([[A]]), torch.tensor([[B]])
    return AdapterState({"x": A}, {"x": B}, {"head": torch.tensor([head])}, {"x": scaling})


def test_norms_by_hand():
    # ||2 * 1 * 1|| = 2 and ||2 * -3 * 1|| = 6 weigh 1/4 and 3/4, whatever the samples.
    server = scalar(0.0, 1.0, 0.0, 2.0)
    after = aggregate(server, [scalar(1.0, 1.0, 4.0, 2.0), scalar(-3.0, 1.0, 8.0, 2.0)], [9, 1])
    assert after.B["x"].item() == (1 * 1 + 3 * -3) / 4
    assert after.A["x"].item() == 1.0
    assert after.other["head"].item() == (4 + 3 * 8) / 4


@settings(max_examples=40, deadline=None)
@given(federation=federations(), weighting=st.sampled_from(["norm", "samples"]), data=st.data())
def test_padded_means_from_the_formula(federation, weighting, data):
    server, trained, samples = federation
    most = next(iter(server.ranks.values()))
    ranks = [data.draw(st.integers(1, most)) for _ in trained]
    trained = [s.cut(r, scale=(1.0 + r) / 2) for s, r in zip(trained, ranks, strict=True)]
    weights = samples
    if weighting == "norm":
        norms = [np.sqrt(sum(np.sum(change(s, n) ** 2) for n in s.A)) for s in trained]
        weights = [norm * (count > 0) for norm, count in zip(norms, samples, strict=True)]
    after = aggregate(server, trained, samples, weighting)
    held = max(rank for rank, weight in zip(ranks, weights, strict=True) if weight)
    for name in server.A:
        A, B = 0.0, 0.0
        for state, rank, weight in zip(trained, ranks, weights, strict=True):
            own = state.B[name].double().numpy() * state.scaling[name] / server.scaling[name]
            share, missing = weight / sum(weights), most - rank
            A += share * np.pad(state.A[name].double().numpy(), [(0, missing), (0, 0)])
            B += share * np.pad(own, [(0, 0), (0, missing)])
        A[held:] = server.A[name][held:].numpy()  # B is zero there: the product is the same
        np.testing.assert_allclose(after.A[name].numpy(), A, atol=1e-6)
        np.testing.assert_allclose(after.B[name].numpy(), B, atol=1e-5)
    head = mean([state.other[HEAD] for state in trained], weights)
    np.testing.assert_allclose(after.other[HEAD].numpy(), head, atol=1e-6)
    assert after.scaling == server.scaling


@settings(max_examples=25, deadline=None)
@given(federation=federations())
def test_equal_ranks_by_samples_are_fedavg_to_the_bit(federation):
    server, trained, weights = federation
    want = FedAvg().aggregate(server, play(FedAvg(), server, trained, weights), ROUND)
    assert snapshot(aggregate(server, trained, weights, "samples")) == snapshot(want)


def test_a_slot_that_one_client_holds_is_scaled_by_its_weight():
    small, large = adapter(1, rank=1), adapter(2, rank=2)
    after = aggregate(fresh(rank=2), [small, large], [1, 3], "samples")
    for name in SHAPES:
        assert torch.equal(after.A[name][1], 0.75 * large.A[name][1])
        assert torch.equal(after.B[name][:, 1], 0.75 * large.B[name][:, 1])


def test_a_slot_that_nobody_holds_stays_alive():
    server = adapter(0, rank=3)  # it was trained before
    after = aggregate(server, [adapter(1, rank=1), adapter(2, rank=2)], [1, 3])
    for name in SHAPES:
        assert torch.equal(after.A[name][2], server.A[name][2])
        assert not after.B[name][:, 2].any()


@pytest.mark.parametrize("weighting", ["norm", "samples"])
def test_a_client_counts_as_what_it_serves(weighting):
    # Its s_k is 4 s: with the server's s and its B it would serve a quarter.
    server, client = fresh(rank=3, scaling=2.0), adapter(1, rank=2, scaling=8.0)
    after = aggregate(server, [client], [5], weighting)
    for name in SHAPES:
        assert relative(change(after, name) - change(client, name), change(client, name)) < 1e-6


@pytest.mark.parametrize("weighting", ["norm", "samples"])
def test_clients_without_samples_do_not_count(weighting):
    server, trained = fresh(), [adapter(seed) for seed in (1, 2, 3)]
    some = aggregate(server, trained, [2, 0, 5], weighting)
    assert snapshot(some) == snapshot(aggregate(server, trained[::2], [2, 5], weighting))


def test_without_any_norm_samples_weigh():
    server = fresh()
    trained = [replace(adapter(seed), B=server.B) for seed in (1, 2)]
    want = FedAvg().aggregate(server, play(FedAvg(), server, trained, [1, 3]), ROUND)
    assert snapshot(aggregate(server, trained, [1, 3])) == snapshot(want)
    assert not torch.equal(want.other[HEAD], server.other[HEAD])


def test_a_client_without_a_norm_does_not_count_beside_one_with():
    server, moved = fresh(), adapter(2)
    # Its slots cancel: B A is zero, though neither factor is.
    slot = adapter(1, rank=1)
    idle = replace(
        slot,
        A={name: torch.cat([A, -A]) for name, A in slot.A.items()},
        B={name: torch.cat([B, B], 1) for name, B in slot.B.items()},
    )
    for trained in ([idle, moved], [moved, idle]):
        after = aggregate(server, trained, [1000, 1])
        assert snapshot(after) == snapshot(aggregate(server, [moved], [1]))


def test_a_norm_that_rounding_takes_below_zero():
    # B A = 0.9 * 0.7 - 0.7 * 0.9, but the sum of products that makes its norm is -1e-16.
    B, A = (torch.tensor(v, dtype=torch.float64) for v in ([[0.9, 0.7]], [[0.7], [-0.9]]))
    client = AdapterState({"x": A}, {"x": B}, {}, {"x": 1.0})
    after = aggregate(replace(client, B={"x": B * 0}), [client], [1])
    assert torch.equal(after.B["x"], B)


def test_a_client_gets_the_first_slots():
    down = HetLoRA().distribute(adapter(1, rank=3), Client(0, 1, rank=2, scale=2.0), ROUND)
    for name in SHAPES:
        assert torch.equal(down.A[name], adapter(1, rank=3).A[name][:2])
        assert torch.equal(down.B[name], adapter(1, rank=3).B[name][:, :2] / 2)


def test_another_weighting_is_refused():
    with pytest.raises(ValueError, match="weighting must be norm or samples, got 'size'"):
        HetLoRA("size")
