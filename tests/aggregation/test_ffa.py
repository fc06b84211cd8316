from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings

from fedlora.aggregation import FFALoRA
from fedlora.state import Client, Round
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
)


def test_a_is_bit_identical_after_five_rounds():
    rule, start = FFALoRA(), fresh()
    server = start
    for idx in range(5):
        rnd = Round(idx, num_clients=3, cohort=3)
        updates = play(rule, server, [adapter([idx, k]) for k in range(3)], [3, 1, 2], rnd)
        server = rule.aggregate(server, updates, rnd)
    for name in SHAPES:
        assert torch.equal(server.A[name], start.A[name])
        assert not torch.equal(server.B[name], start.B[name])


def test_only_b_and_the_head_travel():
    rule, server = FFALoRA(), fresh()
    [update] = play(rule, server, [adapter(1)], [4])
    sent = ["B/vision.fc1", "B/text.fc1", f"other/{HEAD}", "other/logit_scale"]
    assert names(update.payload) == sent
    assert names(rule.distribute(server, Client(0, 4), ROUND)) == sent
    assert update.nbytes == (6 * 2 + 4 * 2 + 3 * 4 + 1) * 4
    assert rule.trainable(ROUND) == {"B", "other"}


def test_a_comes_from_the_server_also_where_the_client_moved_it():
    # trained has another A; nothing of it may reach the rule.
    server = fresh()
    [update] = play(FFALoRA(), server, [adapter(1)], [4])
    assert all(torch.equal(update.adapter.A[name], server.A[name]) for name in SHAPES)


@settings(max_examples=40, deadline=None)
@given(federation=federations())
def test_the_product_is_exact_and_the_head_averaged(federation):
    server, trained, weights = federation
    updates = play(FFALoRA(), server, trained, weights)
    after = FFALoRA().aggregate(server, updates, ROUND)
    for name in server.A:
        want = ideal(updates, name)
        assert relative(change(after, name) - want, want) < 1e-5
        # ideal() again, from the formula: s (sum p_k B_k) A_0
        B = mean([state.B[name] for state in trained], weights)
        formula = server.scaling[name] * B @ server.A[name].double().numpy()
        np.testing.assert_allclose(want, formula, atol=1e-10)
    head = mean([state.other[HEAD] for state in trained], weights)
    np.testing.assert_allclose(after.other[HEAD].numpy(), head, atol=1e-6)
