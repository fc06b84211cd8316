from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from fedlora.aggregation import (
    RULES,
    Aggregator,
    FedAvg,
    FedExLoRA,
    FedRPCA,
    FedSALoRA,
    FFALoRA,
    LocalOnly,
    ProductMean,
    RoLoRA,
    product,
)
from fedlora.aggregation.meter import AggregationMeter
from fedlora.errors import FedloraError
from fedlora.state import PARTS, AdapterState, Client, Residual
from tests.aggregation.rule_builders import (
    HEAD,
    ROUND,
    SHAPES,
    adapter,
    change,
    federations,
    fresh,
    ideal,
    names,
    play,
    snapshot,
)

WEIGHTS = [2, 4, 2]
some = settings(max_examples=25, deadline=None)


def three(rule, server=None, weights=WEIGHTS):
    server = fresh() if server is None else server
    return server, play(rule, server, [adapter(1), adapter(2), adapter(3)], weights)


def with_residual(state):
    thin = Residual(torch.full((6, 1), 0.5), torch.full((1, 5), 0.25))
    return replace(state, residual={"vision.fc1": thin, "text.fc1": Residual(torch.ones(4, 7))})


def assert_close(one, other, atol=1e-5):
    assert names(one) == names(other)
    for (name, left), (_, right) in zip(one.tensors(), other.tensors(), strict=True):
        np.testing.assert_allclose(left.numpy(), right.numpy(), atol=atol, err_msg=name)
    for name in one.A:
        np.testing.assert_allclose(change(one, name), change(other, name), atol=10 * atol)


class Last(Aggregator):
    def aggregate(self, server, updates, rnd):
        return list(updates)[-1].adapter


# The interface.


def test_one_method_is_enough():
    rule = Last()
    server, updates = three(rule)
    assert_close(rule.aggregate(server, updates, ROUND), updates[-1].adapter)
    assert rule.start(server, {}, ROUND) is server
    assert rule.trainable(ROUND) == rule.shared(ROUND) == PARTS
    assert rule.state_dict() == {}
    rule.load_state_dict({})


def test_without_the_method_there_is_no_rule():
    with pytest.raises(TypeError, match="aggregate"):
        Aggregator()


def test_what_is_shared_travels_both_ways():
    class Head(Last):
        def shared(self, rnd):
            return frozenset({"other"})

    server = with_residual(fresh())
    assert Head().distribute(server, Client(0, 1), ROUND).residual == {}  # all know the start
    down = Head().distribute(server, Client(0, 1), replace(ROUND, idx=1))
    assert names(down) == [f"other/{HEAD}", "other/logit_scale"]
    assert down.residual == server.residual
    up = Head().upload(server, adapter(1), Client(0, 1), ROUND)
    assert names(up) == [f"other/{HEAD}", "other/logit_scale"]
    assert up.residual == {}


# What the harness does not ask of every rule, or not to the bit; test_harness.py has the rest.

MEANS = [FedAvg, FedExLoRA, FedSALoRA, FFALoRA, RoLoRA]


@pytest.mark.parametrize("rule", MEANS)
@pytest.mark.parametrize("weights", [[5], [1, 7, 3]], ids=["one client", "equal clients"])
def test_a_mean_of_the_same_is_the_same_to_the_bit(rule, weights):
    server = with_residual(fresh())
    updates = play(rule(), server, [adapter(1)] * len(weights), weights)
    after = rule().aggregate(server, updates, ROUND)
    for (name, value), (_, sent) in zip(after.tensors(), updates[0].adapter.tensors(), strict=True):
        assert torch.equal(value, sent), name
    for name in SHAPES:
        np.testing.assert_allclose(change(after, name), change(updates[0].adapter, name), atol=1e-5)


def test_watching_edits_nothing(make_rule):
    server, updates = three(make_rule(), with_residual(fresh()))
    states = [server, *(u.sent for u in updates), *(u.payload for u in updates)]
    before = [snapshot(state) for state in states]
    make_rule().aggregate(server, AggregationMeter().watch(ProductMean().watch(updates)), ROUND)
    assert [snapshot(state) for state in states] == before


# FedRPCA keeps a round's updates and says so; LocalOnly reads none.
STREAMS = [rule for rule in RULES.values() if rule not in (FedRPCA, LocalOnly)]


@pytest.mark.parametrize("make_rule", STREAMS)
def test_updates_are_a_stream_of_which_nothing_is_kept(make_rule):
    rule, server = make_rule(), fresh()
    updates: list[weakref.ref] = []
    tensors: list[weakref.ref] = []
    alive = []

    def stream():
        for number in range(6):
            [update] = play(rule, server, [adapter(number)], [1 + number])
            updates.append(weakref.ref(update))
            tensors.extend(weakref.ref(tensor) for _, tensor in update.payload.tensors())
            yield update
            del update
            alive.append(sum(ref() is not None for ref in updates))

    after = rule.aggregate(server, AggregationMeter().watch(stream()), ROUND)
    gc.collect()
    assert alive == [1] * 6  # the one that the rule has in hand
    assert not any(ref() is not None for ref in updates + tensors)
    assert names(after) == names(server)


@pytest.mark.parametrize("watcher", [AggregationMeter, ProductMean])
def test_a_watched_stream_may_be_closed_early(watcher):
    updates = three(FedAvg())[1]
    closed = []

    def stream():
        try:
            yield from updates
        finally:
            closed.append(True)

    source = stream()
    watched = watcher().watch(source)
    assert next(watched) is updates[0]
    watched.close()
    source.close()
    assert closed == [True]


# Mixed ranks.


def test_mixed_ranks_are_refused():
    rule, server = FedAvg(), fresh(rank=4)
    updates = play(rule, server, [adapter(1, rank=4), adapter(2, rank=2)], [1, 1])
    with pytest.raises(
        FedloraError,
        match=r"^FedAvg .*one shape, but client 1 .* Give all clients the server's rank\.$",
    ):
        rule.aggregate(server, updates, ROUND)


@pytest.mark.parametrize("make_rule", [rule for rule in RULES.values() if rule is not LocalOnly])
def test_an_update_without_a_layer_is_refused(make_rule):
    rule = make_rule()
    server, [first, second, _] = three(rule)
    less = replace(second.payload, A={}, B={})
    with pytest.raises(FedloraError, match="client 1 sent "):
        rule.aggregate(server, [first, replace(second, payload=less)], ROUND)


def test_mixed_ranks_with_one_that_does_not_count_are_fine():
    rule, server = FedAvg(), fresh(rank=4)
    updates = play(rule, server, [adapter(1, rank=4), adapter(2, rank=2)], [1, 0])
    assert_close(rule.aggregate(server, updates, ROUND), updates[0].adapter)


# Products.


def test_product_by_hand():
    # 3 * 0.5 * [[1], [2]] [[4, 6]] = 1.5 * [[4, 6], [8, 12]]
    state = AdapterState(
        A={"x": torch.tensor([[4.0, 6.0]])},
        B={"x": torch.tensor([[1.0], [2.0]])},
        scaling={"x": 0.5},
    )
    got = product(state, "x", weight=3.0)
    assert got.dense().tolist() == [[6.0, 9.0], [12.0, 18.0]]
    assert got.U.dtype == got.V.dtype == torch.float64


@some
@given(federation=federations())
def test_product_mean_is_the_mean_of_the_products(federation):
    server, trained, weights = federation
    updates = play(FedAvg(), server, trained, weights)
    products, target = ProductMean(), adapter(7, rank=2, shapes=_shapes(server))
    assert list(products.watch(updates)) == updates
    got = products.minus(target)
    assert got.keys() == server.A.keys()
    for name, lost in got.items():
        want = ideal(updates, name) - change(target, name)
        np.testing.assert_allclose(lost.dense().numpy(), want, atol=1e-10)


def _shapes(state):
    return {name: (state.B[name].shape[0], state.A[name].shape[1]) for name in state.A}


def test_product_mean_is_never_larger_than_the_dense_weights():
    shapes = {"x": (8, 8)}
    server = fresh(shapes=shapes)
    updates = play(FedExLoRA(), server, [adapter(k, shapes=shapes) for k in range(50)], [1] * 50)
    products = ProductMean()
    list(products.watch(updates))
    assert products.minus(server)["x"].nbytes == 8 * 8 * 8  # float64
