from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings

from fedlora.aggregation import FedSALoRA
from fedlora.state import PARTS, Client, Round
from tests.aggregation.rule_builders import (
    HEAD,
    ROUND,
    SHAPES,
    adapter,
    federations,
    fresh,
    mean,
    names,
    play,
)


def test_b_never_travels():
    rule, server = FedSALoRA(), fresh()
    [update] = play(rule, server, [adapter(1)], [4])
    sent = ["A/vision.fc1", "A/text.fc1", f"other/{HEAD}", "other/logit_scale"]
    assert names(update.payload) == sent
    assert names(rule.distribute(server, Client(0, 4), ROUND)) == sent
    assert update.payload.B == {}
    assert update.nbytes == (2 * 5 + 2 * 7 + 3 * 4 + 1) * 4
    # Nor does the rule see it through what was sent.
    assert all(not update.adapter.B[name].any() for name in SHAPES)


def test_b_is_trained_all_the_same():
    assert FedSALoRA().trainable(ROUND) == PARTS
    assert FedSALoRA().shared(ROUND) == {"A", "other"}


def test_the_servers_b_stays_as_it_was():
    rule, start = FedSALoRA(), fresh()
    server = start
    for idx in range(3):
        rnd = Round(idx, num_clients=2, cohort=2)
        updates = play(rule, server, [adapter([idx, k]) for k in range(2)], [3, 1], rnd)
        server = rule.aggregate(server, updates, rnd)
    for name in SHAPES:
        assert torch.equal(server.B[name], start.B[name])
        assert not torch.equal(server.A[name], start.A[name])


@settings(max_examples=40, deadline=None)
@given(federation=federations())
def test_a_and_the_head_are_averaged(federation):
    server, trained, weights = federation
    after = FedSALoRA().aggregate(server, play(FedSALoRA(), server, trained, weights), ROUND)
    for name in server.A:
        want = mean([state.A[name] for state in trained], weights)
        np.testing.assert_allclose(after.A[name].numpy(), want, atol=1e-6)
    head = mean([state.other[HEAD] for state in trained], weights)
    np.testing.assert_allclose(after.other[HEAD].numpy(), head, atol=1e-6)
