from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from fedlora.aggregation import FedAvg, FlexLoRA, ProductMean
from fedlora.state import AdapterState, Client, Residual
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
    play,
    relative,
)


def best(matrix, rank):
    """The nearest matrix of this rank, by the dense decomposition."""
    U, S, Vt = np.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vt[:rank]


def layer(B, A, scaling=1.0):
    A, B = (torch.tensor(values, dtype=torch.float64) for values in (A, B))
    return AdapterState({"x": A}, {"x": B}, {}, {"x": scaling})


def test_by_hand():
    # (3 e1 e1^T + 1 e2 e2^T) / 2 = diag(1.5, 0.5): rank 1 keeps 1.5.
    server = layer([[0.0], [0.0]], [[1.0, 1.0]])
    trained = [layer([[3.0], [0.0]], [[1.0, 0.0]]), layer([[0.0], [1.0]], [[0.0, 1.0]])]
    after = FlexLoRA().aggregate(server, play(FlexLoRA(), server, trained, [1, 1]), ROUND)
    np.testing.assert_allclose(change(after, "x"), [[1.5, 0.0], [0.0, 0.0]], atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(federation=federations())
def test_what_is_lost_are_the_singular_values_left_out(federation):
    server, trained, weights = federation
    updates = play(FlexLoRA(), server, trained, weights)
    after = FlexLoRA().aggregate(server, updates, ROUND)
    plain = FedAvg().aggregate(server, updates, ROUND)
    for name, A in server.A.items():
        want, got = ideal(updates, name), change(after, name)
        values = np.linalg.svd(want, compute_uv=False)
        error, rounding = np.linalg.norm(want - got), 1e-6 * values[0]
        assert abs(error - np.linalg.norm(values[len(A) :])) < 4 * rounding
        kept = np.linalg.svd(got, compute_uv=False)[: len(A)]
        np.testing.assert_allclose(kept, values[: len(A)], atol=rounding)
        assert error <= np.linalg.norm(want - change(plain, name)) + rounding


# Not square, and with the rank equal to a side: a transposed update would fit in shape only there.
@pytest.mark.parametrize("shape", [(6, 3), (3, 6), (2, 5), (5, 2), (2, 2), (9, 1), (1, 9)])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_product_is_the_best_of_its_rank(shape, rank):
    options = {"rank": rank, "shapes": {"x": shape}, "dtype": torch.float64}
    server, trained = fresh(**options), [adapter(seed, **options) for seed in (1, 2)]
    updates = play(FlexLoRA(), server, trained, [3, 1])
    after = FlexLoRA().aggregate(server, updates, ROUND)
    want = ideal(updates, "x")
    assert relative(change(after, "x") - best(want, rank), want) < 1e-12
    if rank >= min(shape):
        assert relative(change(after, "x") - want, want) < 1e-12


@pytest.mark.parametrize(("clients", "thin"), [(3, True), (20, False)])
def test_the_thin_and_the_dense_form_agree(clients, thin):
    # Thin takes 2 * clients * (40 + 30) numbers, dense 40 * 30.
    options = {"shapes": {"x": (40, 30)}, "dtype": torch.float64}
    server, trained = fresh(**options), [adapter(seed, **options) for seed in range(clients)]
    updates = play(FlexLoRA(), server, trained, range(1, clients + 1))
    products = ProductMean()
    list(products.watch(updates))
    assert (products.mean()["x"].V is not None) is thin
    after = FlexLoRA().aggregate(server, updates, ROUND)
    want = ideal(updates, "x")
    assert relative(change(after, "x") - best(want, 2), want) < 1e-12


def test_each_client_gets_the_best_of_its_rank_at_its_own_scaling():
    server = fresh(rank=4, scaling=2.0)
    trained = [adapter(k, rank=rank, scaling=s) for k, rank, s in [(1, 1, 8.0), (2, 4, 2.0)]]
    updates = play(FlexLoRA(), server, trained, [1, 3])
    after = FlexLoRA().aggregate(server, updates, ROUND)
    for name in SHAPES:
        products = [s.B[name].double().numpy() @ s.A[name].double().numpy() for s in trained]
        want = (1 * 8.0 * products[0] + 3 * 2.0 * products[1]) / 4
        for rank, scale in [(1, 4.0), (2, 1.0), (3, 0.5), (4, 1.0)]:
            down = FlexLoRA().distribute(after, Client(0, 1, rank, scale=scale), ROUND)
            assert down.A[name].shape[0] == down.B[name].shape[1] == rank
            assert down.scaling[name] == 2.0 * scale
            assert relative(change(down, name) - best(want, rank), want) < 1e-6


def test_a_slot_that_no_client_fills_stays_alive():
    # Two products of rank 1 fill two of four slots; zero in both factors has no gradient.
    server = fresh(rank=4)
    trained = [adapter(seed, rank=1) for seed in (1, 2)]
    updates = play(FlexLoRA(), server, trained, [1, 3])
    after = FlexLoRA().aggregate(server, updates, ROUND)
    for name in SHAPES:
        want = ideal(updates, name)
        assert relative(change(after, name) - want, want) < 1e-6
        assert not after.B[name][:, 2:].any()
        assert torch.equal(after.A[name][2:], server.A[name][2:])


@pytest.mark.parametrize(
    ("energy", "kept"), [(0.01, 1), (0.64, 1), (0.65, 2), (0.92, 2), (0.93, 3), (1.0, 3)]
)
def test_energy_keeps_the_fewest_that_hold_it(energy, kept):
    # Singular values 3, 2, 1: 9 / 14 = 0.643 and 13 / 14 = 0.929 of the energy.
    sizes = [2.0, 3.0, 1.0]
    server = layer(np.zeros((3, 3)), np.eye(3), scaling=0.5)
    trained = layer(np.diag(sizes), np.eye(3), scaling=0.5)
    rule = FlexLoRA(energy=energy)
    after = rule.aggregate(server, play(rule, server, [trained], [1]), ROUND)
    want = np.diag([size / 2 if size > 3 - kept else 0.0 for size in sizes])
    np.testing.assert_allclose(change(after, "x"), want, atol=1e-12)
    assert not after.B["x"][:, kept:].any()
    A = after.A["x"].numpy()  # all slots go on training
    np.testing.assert_allclose(A @ A.T, np.eye(3), atol=1e-12)


def test_energy_of_nothing():
    rule, server = FlexLoRA(energy=0.9), fresh()
    after = rule.aggregate(server, play(rule, server, [server, server], [1, 2]), ROUND)
    for name in SHAPES:
        assert not after.B[name].any()
        A = after.A[name].numpy()
        np.testing.assert_allclose(A @ A.T, np.eye(2), atol=1e-6)


@pytest.mark.parametrize("energy", [0.0, -1.0, 1.01, float("nan")])
def test_an_energy_that_cannot_be_is_refused(energy):
    with pytest.raises(ValueError, match="energy must be above 0 and at most 1"):
        FlexLoRA(energy=energy)


def test_the_head_is_averaged_and_a_residual_stays():
    server = replace(fresh(), residual={"text.fc1": Residual(torch.ones(4, 7))})
    trained = [adapter(1), adapter(2)]
    after = FlexLoRA().aggregate(server, play(FlexLoRA(), server, trained, [1, 4]), ROUND)
    want = mean([state.other[HEAD] for state in trained], [1, 4])
    np.testing.assert_allclose(after.other[HEAD].numpy(), want, atol=1e-6)
    assert after.residual == server.residual
