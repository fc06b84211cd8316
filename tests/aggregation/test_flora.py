from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.aggregation import FedExLoRA, FLoRA
from fedlora.errors import FedloraError
from fedlora.sampling import derive_seed
from fedlora.state import Client, Residual, Round
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
    residual,
    snapshot,
)

RANKS, SCALES, WEIGHTS = [3, 1, 2], [2.0, 6.0, 0.5], [2, 5, 1]


def of_many_ranks(seed=0, dtype=torch.float32):
    drawn = zip(RANKS, SCALES, strict=True)
    return [adapter([seed, r], rank=r, scaling=s, dtype=dtype) for r, s in drawn]


def stacked(trained, weights, name, power=1):
    """``B_st A_st``, from the formula: all B_k side by side, all p_k s_k A_k below one another."""
    shares = [(weight / sum(weights)) ** power for weight in weights]
    rows = [
        p * s.scaling[name] * s.A[name].double().numpy()
        for p, s in zip(shares, trained, strict=True)
    ]
    return np.hstack([s.B[name].double().numpy() for s in trained]) @ np.vstack(rows)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_the_stack_of_mixed_ranks_and_scalings_is_exact(dtype, error):
    server, trained = fresh(rank=3, dtype=dtype), of_many_ranks(dtype=dtype)
    after = FLoRA().aggregate(server, play(FLoRA(), server, trained, WEIGHTS), ROUND)
    for name in SHAPES:
        want = stacked(trained, WEIGHTS, name)
        assert relative(change(after, name) - want, want) < error
        # The weight sits on one factor: on both it would be squared.
        squared = stacked(trained, WEIGHTS, name, power=2)
        assert relative(change(after, name) - squared, want) > 0.1
        # Nor is it the share of the first client, nor of any other.
        for one in trained:
            assert relative(change(after, name) - change(one, name), want) > 0.1
    assert FLoRA.mixed_ranks
    assert after.scaling == server.scaling
    head = mean([state.other[HEAD] for state in trained], WEIGHTS)
    np.testing.assert_allclose(after.other[HEAD].numpy(), head, atol=1e-6)


def test_stacks_add_up_over_rounds():
    server, total = fresh(rank=3), {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for idx in range(4):
        trained = of_many_ranks(idx)
        updates = play(FLoRA(), server, trained, WEIGHTS, Round(idx))
        server = FLoRA().aggregate(server, updates, Round(idx))
        for name in SHAPES:
            total[name] += stacked(trained, WEIGHTS, name)
            assert relative(change(server, name) - total[name], total[name]) < 1e-6
            want = ideal(updates, name)  # with the residual that they trained beside
            assert relative(change(server, name) - want, want) < 1e-6


@settings(max_examples=40, deadline=None)
@given(federation=federations(), seed=st.integers(0, 9))
def test_a_round_serves_what_fedex_serves(federation, seed):
    server, trained, weights = federation
    beside = adapter(
        seed, shapes={n: (B.shape[0], server.A[n].shape[1]) for n, B in trained[0].B.items()}
    )
    server = replace(server, residual={n: Residual(beside.B[n], beside.A[n]) for n in server.A})
    one, other = (
        rule.aggregate(server, play(rule, server, trained, weights), ROUND)
        for rule in (FLoRA(), FedExLoRA())
    )
    for name in server.A:
        np.testing.assert_allclose(change(one, name), change(other, name), atol=1e-4)
    assert dict(one.other).keys() == dict(other.other).keys()
    assert all(torch.equal(one.other[name], other.other[name]) for name in one.other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_new_adapter_is_peft_s_and_serves_nothing(dtype):
    server = adapter(0, rank=3, dtype=dtype)  # one to go on with: its B is not zero
    rnd = Round(5, seed=7)
    after = FLoRA().aggregate(server, play(FLoRA(), server, [adapter(1, rank=3)], [1], rnd), rnd)
    for name in SHAPES:
        generator = torch.Generator().manual_seed(derive_seed(7, "flora", 5, name))
        want = torch.nn.init.kaiming_uniform_(
            torch.empty_like(server.A[name]), a=5**0.5, generator=generator
        )
        torch.testing.assert_close(after.A[name], want, rtol=1e-6, atol=0)
        assert after.B[name].shape == server.B[name].shape
        assert not after.B[name].any()
        np.testing.assert_array_equal(change(after, name), residual(after, name))


def test_the_new_adapter_depends_on_seed_round_and_layer_alone():
    def drawn(seed, idx, trained):
        server = fresh(shapes={"one": (4, 5), "two": (4, 5)})
        states = [adapter(trained, shapes={"one": (4, 5), "two": (4, 5)})]
        rnd = Round(idx, seed=seed)
        return FLoRA().aggregate(server, play(FLoRA(), server, states, [1], rnd), rnd).A

    A = drawn(0, 0, 1)
    assert torch.equal(A["one"], drawn(0, 0, 2)["one"])
    for other in (A["two"], drawn(1, 0, 1)["one"], drawn(0, 1, 1)["one"]):
        assert not torch.equal(A["one"], other)


def test_neither_factor_travels_down_and_of_the_stacks_what_the_client_lacks():
    rule, server = FLoRA(), fresh(rank=3, shapes={"x": (64, 64)})
    head = (3 * 4 + 1) * 4
    for idx in range(2):
        trained = [adapter([idx, r], rank=r, shapes={"x": (64, 64)}) for r in (3, 1)]
        updates = play(rule, server, trained, [1, 2], Round(idx))
        server = rule.aggregate(server, updates, Round(idx))
    client = Client(0, 1, rank=2, scale=1.5)
    for last, columns in [(1, 3 + 1), (0, 2 * (3 + 1)), (None, 2 * (3 + 1))]:
        down = rule.distribute(server, replace(client, last_round=last), Round(2))
        assert names(down) == [f"other/{name}" for name in server.other]
        assert down.nbytes == head + columns * (64 + 64) * 4
    start = rule.distribute(fresh(), Client(0, 1), Round(0))
    assert start.nbytes == head
    # Up: what it trained, at its own rank.
    [update] = play(rule, server, [adapter(0, rank=2, shapes={"x": (64, 64)})], [1], Round(2))
    assert update.nbytes == head + 2 * (64 + 64) * 4


def test_a_client_that_follows_gets_to_the_servers_bits():
    rule, server = FLoRA(), fresh(rank=3)
    before = rule.aggregate(server, play(rule, server, of_many_ranks(1), WEIGHTS), ROUND)
    rnd = Round(1)
    after = rule.aggregate(before, play(rule, before, of_many_ranks(2), WEIGHTS, rnd), rnd)
    for name, new in after.added.items():
        assert torch.equal(before.residual[name].add(new).dense(), after.residual[name].dense())


def test_the_adapter_travels_down_after_a_round_that_drew_none():
    rule, rounds = FLoRA(), [[1, 2], [0, 0], [2, 1]]
    server, sent = fresh(), []
    for idx, weights in enumerate(rounds):
        updates = play(rule, server, [adapter([idx, k]) for k in range(2)], weights, Round(idx))
        server = rule.aggregate(server, updates, Round(idx))
        down = rule.distribute(server, Client(0, 1, last_round=idx), Round(idx + 1))
        sent.append(bool(down.A) and bool(down.B))
    assert sent == [False, True, False]


def test_every_promise_is_kept():
    check_aggregator(FLoRA)
    # One client, and equal ones, are cut, too.
    skip = {"one client", "equal clients"}
    check_aggregator(lambda: FLoRA(residual_rank=1), skip=skip)


@pytest.mark.parametrize("weights", [[], [0, 0]])
def test_without_weight_the_adapter_is_not_drawn_anew(weights):
    server = replace(adapter(0), residual={"vision.fc1": Residual(torch.ones(6, 5))})
    server = replace(server, added=server.residual)
    updates = play(FLoRA(), server, [adapter(1), adapter(2)][: len(weights)], weights)
    after = FLoRA().aggregate(server, updates, ROUND)
    assert snapshot(after) == snapshot(server)
    assert after.added == {}


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_residual_rank_keeps_the_best_approximation(rank):
    rule, server, trained = FLoRA(residual_rank=rank), fresh(rank=3), of_many_ranks()
    after = rule.aggregate(server, play(rule, server, trained, WEIGHTS), ROUND)
    assert not rule.exact
    assert FLoRA().exact
    for name in SHAPES:
        U, S, Vt = np.linalg.svd(stacked(trained, WEIGHTS, name), full_matrices=False)
        want = U[:, :rank] * S[:rank] @ Vt[:rank]
        assert relative(residual(after, name) - want, want) < 1e-5


def test_a_residual_rank_below_one_is_refused():
    with pytest.raises(FedloraError, match="residual_rank must be 1 or above, got 0"):
        FLoRA(residual_rank=0)
