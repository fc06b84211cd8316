from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from fedlora.aggregation import Aggregator, FedAvg, FedExLoRA, ProductMean, product
from fedlora.aggregation.meter import AggregationMeter
from fedlora.state import PARTS, AdapterState, Client, ClientUpdate, Residual
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
some = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


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
    down = Head().distribute(server, Client(0, 1), ROUND)
    assert names(down) == [f"other/{HEAD}", "other/logit_scale"]
    assert down.residual == server.residual
    up = Head().upload(server, adapter(1), Client(0, 1), ROUND)
    assert names(up) == [f"other/{HEAD}", "other/logit_scale"]
    assert up.residual == {}


# What holds for every rule.


def test_arguments_are_not_edited(make_rule):
    server, updates = three(make_rule(), with_residual(fresh()))
    states = [server, *(u.sent for u in updates), *(u.payload for u in updates)]
    before = [snapshot(state) for state in states]
    make_rule().aggregate(server, AggregationMeter().watch(updates), ROUND)
    assert [snapshot(state) for state in states] == before


@some
@given(federation=federations())
def test_arguments_are_not_edited_in_float64_either(make_rule, federation):
    server, trained, weights = federation
    server, *trained = (_as_float64(state) for state in (server, *trained))
    updates = play(make_rule(), server, trained, weights)
    before = [snapshot(state) for state in (server, *trained)]
    make_rule().aggregate(server, updates, ROUND)
    assert [snapshot(state) for state in (server, *trained)] == before


def _as_float64(state):
    parts = [
        {name: t.double() for name, t in part.items()} for part in (state.A, state.B, state.other)
    ]
    return AdapterState(*parts, state.scaling)


@some
@given(federation=federations())
def test_the_order_of_clients_does_not_matter(make_rule, federation):
    server, trained, weights = federation
    rule = make_rule()
    updates = play(rule, server, trained, weights)
    forward = rule.aggregate(server, updates, ROUND)
    assert_close(rule.aggregate(server, updates[::-1], ROUND), forward)


def test_one_client_gives_its_own_adapter(make_rule):
    rule, server = make_rule(), fresh()
    [update] = play(rule, server, [adapter(1)], [5])
    after = rule.aggregate(server, [update], ROUND)
    assert_close(after, update.adapter, atol=1e-6)
    for (name, value), (_, sent) in zip(after.tensors(), update.adapter.tensors(), strict=True):
        assert torch.equal(value, sent), name


def test_a_client_without_samples_does_not_count(make_rule):
    rule = make_rule()
    server, [first, second, _] = three(rule)
    idle = ClientUpdate(Client(2, 0), server, adapter(9).only(rule.shared(ROUND)), 0.0)
    with_idle = rule.aggregate(server, [idle, first, idle, second, idle], ROUND)
    assert snapshot(with_idle) == snapshot(rule.aggregate(server, [first, second], ROUND))


@pytest.mark.parametrize("weights", [[0, 0, 0], []], ids=["no samples", "no clients"])
def test_without_any_weight_the_server_keeps_its_adapter(make_rule, weights):
    rule, server = make_rule(), with_residual(fresh())
    updates = play(rule, server, [adapter(1), adapter(2), adapter(3)][: len(weights)], weights)
    assert snapshot(rule.aggregate(server, updates, ROUND)) == snapshot(server)


def test_equal_clients_are_a_fixed_point(make_rule):
    rule, server = make_rule(), with_residual(fresh())
    updates = play(rule, server, [adapter(1)] * 3, [1, 7, 3])
    after = rule.aggregate(server, updates, ROUND)
    for (name, value), (_, sent) in zip(after.tensors(), updates[0].adapter.tensors(), strict=True):
        assert torch.equal(value, sent), name
    for name in SHAPES:
        np.testing.assert_allclose(change(after, name), change(updates[0].adapter, name), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_result_has_the_type_and_names_of_the_server(make_rule, dtype):
    rule, server = make_rule(), fresh(dtype=dtype)
    trained = [adapter(1, dtype=dtype), adapter(2, dtype=dtype)]
    after = rule.aggregate(server, play(rule, server, trained, [1, 2]), ROUND)
    assert names(after) == names(server)
    assert {tensor.dtype for _, tensor in after.tensors()} == {dtype}
    assert {r.U.dtype for r in after.residual.values()} <= {dtype}
    assert after.scaling == server.scaling


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


def test_a_stream_that_breaks_leaves_the_rule_as_it_was(make_rule):
    rule = make_rule()
    server, updates = three(rule)
    state = (dict(vars(rule)), rule.state_dict())

    def broken():
        yield from updates[:2]
        raise RuntimeError("client 2 is gone")

    with pytest.raises(RuntimeError, match="client 2 is gone"):
        rule.aggregate(server, broken(), ROUND)
    assert (dict(vars(rule)), rule.state_dict()) == state
    expected = make_rule().aggregate(server, updates, ROUND)
    assert snapshot(rule.aggregate(server, updates, ROUND)) == snapshot(expected)


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


def test_state_survives_saving(make_rule):
    rule, other = make_rule(), make_rule()
    server, updates = three(rule)
    rule.aggregate(server, updates, ROUND)
    other.load_state_dict(rule.state_dict())
    assert snapshot(other.aggregate(server, updates, ROUND)) == snapshot(
        rule.aggregate(server, updates, ROUND)
    )


# Mixed ranks.


def test_mixed_ranks_are_refused(make_rule):
    rule = make_rule()
    server = fresh(rank=4)
    updates = play(rule, server, [adapter(1, rank=4), adapter(2, rank=2)], [1, 1])
    with pytest.raises(ValueError, match=r"one shape, but client 1 .* Give all clients one rank\."):
        rule.aggregate(server, updates, ROUND)


def test_an_update_without_a_layer_is_refused(make_rule):
    rule = make_rule()
    server, [first, second, _] = three(rule)
    less = replace(second.payload, A={}, B={})
    with pytest.raises(ValueError, match=f"{make_rule.__name__} .*client 1 sent other names"):
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
