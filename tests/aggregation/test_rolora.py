from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.aggregation import FFALoRA, RoLoRA
from fedlora.state import AdapterState, Client, ClientUpdate, Residual, Round
from fedlora.testing import check_aggregator
from tests.aggregation.rule_builders import (
    HEAD,
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


def test_the_factors_take_turns_and_the_frozen_one_keeps_its_bits():
    rule, server = RoLoRA(), fresh()
    for idx, (trained, frozen) in enumerate([("B", "A"), ("A", "B"), ("B", "A"), ("A", "B")]):
        rnd = Round(idx)
        assert rule.trainable(rnd) == rule.shared(rnd) == {trained, "other"}
        states = [adapter([idx, k]) for k in range(3)]
        updates = play(rule, server, states, [3, 1, 2], rnd)
        after = rule.aggregate(server, updates, rnd)
        for name in SHAPES:
            assert torch.equal(after.part(frozen)[name], server.part(frozen)[name])
            want = mean([state.part(trained)[name] for state in states], [3, 1, 2])
            np.testing.assert_allclose(after.part(trained)[name].numpy(), want, atol=1e-6)
            assert f"{frozen}/{name}" not in names(updates[0].payload)
        head = mean([state.other[HEAD] for state in states], [3, 1, 2])
        np.testing.assert_allclose(after.other[HEAD].numpy(), head, atol=1e-6)
        server = after


@settings(max_examples=40, deadline=None)
@given(federation=federations(), idx=st.integers(0, 1))
def test_the_product_is_exact_whichever_factor_is_trained(federation, idx):
    server, trained, weights = federation
    server, rnd = replace(server, B=trained[0].B), Round(idx)  # a B of zero hides a mean of A
    updates = play(RoLoRA(), server, trained, weights, rnd)
    after = RoLoRA().aggregate(server, updates, rnd)
    for name in server.A:
        # From the formula: s (sum p_k B_k) A or s B (sum p_k A_k).
        A, B = server.A[name].double().numpy(), server.B[name].double().numpy()
        if idx == 0:
            B = mean([state.B[name] for state in trained], weights)
        else:
            A = mean([state.A[name] for state in trained], weights)
        want = server.scaling[name] * B @ A
        np.testing.assert_allclose(ideal(updates, name), want, atol=1e-10)
        assert relative(change(after, name) - want, want) < 1e-5


def test_an_even_round_is_one_of_ffa():
    server, trained, rnd = fresh(), [adapter(1), adapter(2)], Round(4)
    one, other = (
        rule.aggregate(server, play(rule, server, trained, [1, 2], rnd), rnd)
        for rule in (RoLoRA(), FFALoRA())
    )
    assert snapshot(one) == snapshot(other)


@pytest.mark.parametrize(
    ("last", "idx", "factors"),
    [
        (None, 0, ""),  # it knows A and B from the seed
        (None, 1, "B"),
        (None, 2, "AB"),
        (0, 1, "B"),
        (1, 2, "A"),
        (4, 5, "B"),
        (3, 5, "AB"),  # it was out in round 4: 3 averaged A, 4 B
        (0, 7, "AB"),
    ],
)
def test_what_was_averaged_since_a_client_was_last_sent_anything_travels_down(last, idx, factors):
    rule, server = RoLoRA(), adapter(0)
    down = rule.distribute(server, Client(0, 1, last_round=last), Round(idx))
    assert names(down) == [
        *(f"{part}/{name}" for part in factors for name in SHAPES),
        *(f"other/{name}" for name in server.other),
    ]


def test_a_client_that_missed_rounds_ends_up_with_the_servers_factors():
    rule, server = RoLoRA(), fresh()
    known, last = dict.fromkeys(range(3), server), dict.fromkeys(range(3))
    for idx, playing in enumerate([{0, 1}, {0, 1}, {0}, {0}, {0, 1}, {0, 1, 2}, {2}, {1}, {0, 2}]):
        rnd = Round(idx)
        for client in playing:
            down = rule.distribute(server, Client(client, 1, last_round=last[client]), rnd)
            known[client], last[client] = down.over(known[client]), idx
            assert snapshot(known[client]) == snapshot(server)
        states = [adapter([idx, client]) for client in playing]
        server = rule.aggregate(server, play(rule, server, states, [1] * len(states), rnd), rnd)


def test_the_residual_of_a_run_before_travels_to_who_lacks_it():
    beside = {"vision.fc1": Residual(torch.ones(6, 5))}
    server = replace(fresh(), residual=beside)
    for last, sent in [(None, beside), (1, beside), (2, {})]:
        down = RoLoRA().distribute(server, Client(0, 1, last_round=last), Round(3))
        assert down.residual == sent


def regression(rule, rounds):
    """The sine between A and a, and the error of what is served, after each round.

    Clients fit y = b (a . x) with rank 1: B by least squares, A by one step down the gradient.
    """
    rng = np.random.default_rng(0)
    a, b = (v / np.linalg.norm(v) for v in (rng.standard_normal(10), rng.standard_normal(4)))
    data = [rng.standard_normal((n, 10)) for n in (200, 300, 400)]
    start = torch.from_numpy(rng.standard_normal((1, 10)))
    server = AdapterState({"x": start}, {"x": torch.zeros(4, 1).double()}, {}, {"x": 1.0})
    sines, errors = [], []
    for idx in range(rounds):
        rnd, updates = Round(idx), []
        for k, X in enumerate(data):
            A, B, Y = server.A["x"].numpy(), server.B["x"].numpy(), np.outer(X @ a, b)
            if "B" in rule.trainable(rnd):
                h = X @ A.T
                B = Y.T @ h / (h.T @ h)
            else:
                A = A - 0.5 / (B.T @ B) * B.T @ (X @ A.T @ B.T - Y).T @ X / len(X)
            ended = AdapterState({"x": torch.from_numpy(A)}, {"x": torch.from_numpy(B)})
            client = Client(k, len(X))
            payload = rule.upload(server, ended.only(rule.trainable(rnd)), client, rnd)
            updates.append(ClientUpdate(client, server, payload, float(len(X))))
        server = rule.aggregate(server, updates, rnd)
        A = server.A["x"].numpy()
        sines.append(np.linalg.norm(A - (A @ a)[:, None] * a) / np.linalg.norm(A))
        errors.append(np.linalg.norm(change(server, "x") - np.outer(b, a)))
    return sines, errors


def test_on_linear_regression_a_turns_to_its_target_and_ffas_does_not():
    sines, errors = regression(RoLoRA(), 40)
    assert sines[0] > 0.5
    assert all(after < 0.8 * before for before, after in zip(sines[::2], sines[1::2], strict=True))
    assert sines[-1] < 1e-5
    assert errors[-1] < 1e-5
    floor, errors = regression(FFALoRA(), 40)
    assert floor == [sines[0]] * 40
    assert min(errors) >= sines[0]  # no B makes b a^T of another direction of A


def test_every_promise_is_kept():
    check_aggregator(RoLoRA)
