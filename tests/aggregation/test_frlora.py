from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlora.aggregation import FedAvg, FRLoRA
from fedlora.state import Client, Residual, Round
from fedlora.testing import check_aggregator
from tests.aggregation.rule_builders import (
    HEAD,
    ROUND,
    SHAPES,
    adapter,
    change,
    fresh,
    mean,
    names,
    play,
    relative,
    residual,
    snapshot,
)

WIDE = {"x": (64, 64)}


def weights_of(shapes=SHAPES, dtype=torch.float32):
    rng = np.random.default_rng(11)
    return {
        n: torch.from_numpy(rng.standard_normal(shape)).to(dtype) for n, shape in shapes.items()
    }


def started(**options):
    base = weights_of(options.get("shapes", SHAPES), options.get("dtype", torch.float32))
    return FRLoRA().start(fresh(**options), base, ROUND)


def leading(W, rank):
    """The nearest matrix of this rank."""
    U, S, Vt = np.linalg.svd(W.double().numpy(), full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vt[:rank]


def product(state, name):
    return state.scaling[name] * state.B[name].double().numpy() @ state.A[name].double().numpy()


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("rank", [1, 2, 4, 7])  # 7 is more than any layer has
def test_the_factors_start_as_the_weights_main_part(rank, dtype, error):
    server, base = started(rank=rank, scaling=3.0, dtype=dtype), weights_of(dtype=dtype)
    for name, W in base.items():
        main = leading(W, rank)
        assert relative(product(server, name) - main, main) < error
        # Both factors have the root: B^T B = A A^T = S / s.
        S = np.linalg.svd(W.double().numpy(), compute_uv=False)[:rank] / 3.0
        want = np.diag(np.pad(S, (0, rank - len(S))))
        A, B = server.A[name].double().numpy(), server.B[name].double().numpy()
        np.testing.assert_allclose(A @ A.T, want, atol=10 * error)
        np.testing.assert_allclose(B.T @ B, want, atol=10 * error)
        assert np.abs(change(server, name)).max() < error  # the pretrained function
        assert (A.shape, B.shape) == ((rank, W.shape[1]), (W.shape[0], rank))
        assert server.A[name].dtype == server.residual[name].U.dtype == dtype


def test_start_serves_what_an_adapter_to_go_on_with_serves():
    given = {
        "vision.fc1": Residual(torch.ones(6, 1), torch.ones(1, 5)),
        "text.fc1": Residual(torch.ones(4, 7)),
    }
    old = replace(adapter(3), residual=given, added=given)
    server = FRLoRA().start(old, weights_of(), ROUND)
    for name in SHAPES:
        assert relative(change(server, name) - change(old, name), change(old, name)) < 1e-5
    assert server.added == {}
    assert server.other == old.other


def test_the_weights_and_the_server_are_not_edited():
    for dtype in (torch.float32, torch.float64):
        old, base = fresh(dtype=dtype), weights_of(dtype=dtype)
        before = snapshot(old), {name: W.clone() for name, W in base.items()}
        FRLoRA().start(old, base, ROUND)
        assert snapshot(old) == before[0]
        assert all(torch.equal(W, before[1][name]) for name, W in base.items())


@pytest.mark.parametrize("shapes", [SHAPES, WIDE], ids=["dense", "thin"])
def test_three_rounds_from_the_formula(shapes):
    rule, server, base = FRLoRA(), started(shapes=shapes), weights_of(shapes)
    main = {name: leading(W, 2) for name, W in base.items()}  # s B0 A0
    beside = {name: W.double().numpy() - main[name] for name, W in base.items()}
    for idx in range(3):
        trained, weights = [adapter([idx, k], shapes=shapes) for k in range(3)], [3, 1, 2]
        updates = play(rule, server, trained, weights, Round(idx))
        after = rule.aggregate(server, updates, Round(idx))
        for name, W in base.items():
            A, B = (mean([s.part(part)[name] for s in trained], weights) for part in "AB")
            beside[name] += 2.0 * B @ A - main[name]
            want = beside[name] + main[name]
            got = W.double().numpy() + change(after, name)
            assert relative(got - want, want) < 1e-5
            # The reset: the factors are those of before, to the bit.
            assert torch.equal(after.A[name], server.A[name])
            assert torch.equal(after.B[name], server.B[name])
        head = mean([state.other[HEAD] for state in trained], weights)
        np.testing.assert_allclose(after.other[HEAD].numpy(), head, atol=1e-6)
        server = after


@pytest.mark.parametrize("shapes", [SHAPES, WIDE], ids=["dense", "thin"])
def test_the_reset_does_not_change_what_a_round_serves(shapes):
    server = started(shapes=shapes)
    for idx in range(2):
        updates = play(
            FRLoRA(), server, [adapter([idx, k], shapes=shapes) for k in range(2)], [1, 3]
        )
        reset, plain = (r.aggregate(server, updates, Round(idx)) for r in (FRLoRA(), FedAvg()))
        for name in shapes:
            want = change(plain, name)
            assert relative(change(reset, name) - want, want) < 1e-5
        server = reset


def test_clients_that_do_not_move_change_nothing():
    server = started(shapes=WIDE)
    updates = play(FRLoRA(), server, [server, server], [1, 2])
    after = FRLoRA().aggregate(server, updates, ROUND)
    assert np.abs(change(after, "x")).max() < 1e-5


def test_the_residual_grows_by_one_rank_a_round():
    # r columns for A0 and r for each mean: 2 (t + 1) (64 + 64) numbers after t rounds, against the
    # 64 * 64 of the dense form, which is the smaller one from t = 15.
    server = started(shapes=WIDE)
    sizes = [server.residual["x"].nbytes]
    for idx in range(16):
        updates = play(
            FRLoRA(), server, [adapter([idx, k], shapes=WIDE) for k in range(3)], [1] * 3
        )
        server = FRLoRA().aggregate(server, updates, Round(idx))
        sizes.append(server.residual["x"].nbytes)
    assert sizes == [*(4 * 2 * (t + 1) * 128 for t in range(15)), 4 * 4096, 4 * 4096]


def test_what_was_added_is_one_rank_and_enough_for_who_has_the_rest():
    server = started(shapes=WIDE)
    trained = [adapter(k, shapes=WIDE) for k in range(3)]
    after = FRLoRA().aggregate(server, play(FRLoRA(), server, trained, [1, 2, 3]), ROUND)
    assert after.added["x"].nbytes == 2 * (64 + 64) * 4
    known = residual(server, "x") - product(server, "x")  # both known to the client
    added = after.added["x"].dense().double().numpy()
    np.testing.assert_allclose(residual(after, "x"), known + added, atol=1e-5)


def test_neither_factor_travels_down_and_of_the_means_what_the_client_lacks():
    rule, server, head = FRLoRA(), started(shapes=WIDE), (3 * 4 + 1) * 4
    # In round 0 all follows from the weight.
    assert rule.distribute(server, Client(0, 1), Round(0)).nbytes == head
    for idx in range(2):
        updates = play(rule, server, [adapter([idx, k], shapes=WIDE) for k in range(2)], [1, 2])
        server = rule.aggregate(server, updates, Round(idx))
    for last, columns in [(1, 2), (0, 3 * 2), (None, 3 * 2)]:
        down = rule.distribute(server, Client(0, 1, last_round=last), Round(2))
        assert names(down) == [f"other/{name}" for name in server.other]
        assert down.nbytes == head + columns * (64 + 64) * 4


def test_every_promise_is_kept():
    check_aggregator(FRLoRA)


@pytest.mark.parametrize("weights", [[], [0, 0]])
def test_without_weight_the_server_keeps_its_adapter(weights):
    server = started()
    server = replace(server, added=server.residual)
    updates = play(FRLoRA(), server, [adapter(1), adapter(2)][: len(weights)], weights)
    after = FRLoRA().aggregate(server, updates, ROUND)
    assert snapshot(after) == snapshot(server)
    assert after.added == {}
