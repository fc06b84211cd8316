from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from fedlora import FedloraError
from fedlora.aggregation import FedAvg, FedRPCA
from fedlora.aggregation.fedrpca import sparse_part
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


def rpca(M, steps=3000):
    """L and S by plain ADMM with a fixed penalty (Candes et al. 2011, algorithm 1), in numpy."""
    lam, mu = 1 / np.sqrt(max(M.shape)), M.size / (4 * np.abs(M).sum())
    S, Y = np.zeros_like(M), np.zeros_like(M)
    for _ in range(steps):
        U, s, Vt = np.linalg.svd(M - S + Y / mu, full_matrices=False)
        L = U * np.maximum(s - 1 / mu, 0) @ Vt
        rest = M - L + Y / mu
        S = np.sign(rest) * np.maximum(np.abs(rest) - lam / mu, 0)
        Y = Y + mu * (M - L - S)
    return L, S


def planted(seed, rows=60, columns=12, rank=2, spikes=30):
    rng = np.random.default_rng(seed)
    low = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, columns))
    sparse = np.zeros(rows * columns)
    sparse[rng.choice(rows * columns, spikes, replace=False)] = rng.choice([-10, 10], spikes)
    return low, sparse.reshape(rows, columns)


@pytest.mark.parametrize("seed", range(5))
def test_the_sparse_part_is_that_of_another_solver(seed):
    low, sparse = planted(seed)
    M = low + sparse
    S = sparse_part(torch.from_numpy(M), tolerance=1e-8).numpy()
    L, other = rpca(M)
    np.testing.assert_allclose(S, other, atol=2e-4 * np.abs(M).max())
    np.testing.assert_allclose(M - S, L, atol=2e-4 * np.abs(M).max())
    # The objective that both minimise.
    lam = 1 / np.sqrt(max(M.shape))
    ours, theirs = (np.linalg.norm(M - s, "nuc") + lam * np.abs(s).sum() for s in (S, other))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_planted_spikes_are_found():
    low, sparse = planted(7)
    S = sparse_part(torch.from_numpy(low + sparse)).numpy()
    assert np.linalg.norm(S - sparse) < 0.1 * np.linalg.norm(sparse)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_split_follows_the_scale(scale):
    M = torch.from_numpy(sum(planted(3)))
    torch.testing.assert_close(sparse_part(M * scale) / scale, sparse_part(M), atol=1e-6, rtol=0)


@pytest.mark.parametrize("columns", [1, 4])
def test_equal_columns_have_no_sparse_part(columns):
    column = torch.zeros(9, 1, dtype=torch.float64)
    column[4] = 7.0  # a spike, but everyone's
    assert not sparse_part(column.expand(9, columns)).any()
    assert not sparse_part(torch.zeros(9, columns, dtype=torch.float64)).any()


def test_against_the_formula():
    server, weights = fresh(), [2, 5, 3]
    trained = [adapter(k) for k in (1, 2, 3)]
    after = FedRPCA(beta=3.0).aggregate(server, play(FedRPCA(), server, trained, weights), ROUND)
    p = np.array(weights) / sum(weights)
    for part in ("A", "B"):
        for name in SHAPES:
            start = server.part(part)[name].double().numpy()
            columns = [t.part(part)[name].double().numpy() - start for t in trained]
            L, S = rpca(np.stack([c.ravel() for c in columns], 1))
            want = start + ((L + 3.0 * S) @ p).reshape(start.shape)
            np.testing.assert_allclose(after.part(part)[name].numpy(), want, atol=5e-3)
    head = mean([state.other[HEAD] for state in trained], weights)
    np.testing.assert_allclose(after.other[HEAD].numpy(), head, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(federation=federations())
def test_beta_one_is_fedavg(federation):
    server, trained, weights = federation
    updates = play(FedAvg(), server, trained, weights)
    one, other = (r.aggregate(server, updates, ROUND) for r in (FedRPCA(beta=1), FedAvg()))
    assert names(one) == names(other)
    for (name, left), (_, right) in zip(one.tensors(), other.tensors(), strict=True):
        assert torch.equal(left, right), name


def test_what_one_client_learned_counts_beta_times():
    # Nine clients agree up to a little; in one an entry moved far.
    rng = np.random.default_rng(0)
    server = fresh(shapes={"x": (40, 30)})
    common = adapter(5, shapes={"x": (40, 30)})
    trained = []
    for k in range(9):
        B = common.B["x"] + 1e-3 * torch.from_numpy(rng.standard_normal((40, 2))).float()
        B[7, 1] += 20.0 * (k == 4)
        trained.append(type(common)(common.A, {"x": B}, common.other, common.scaling))
    updates = play(FedAvg(), server, trained, [1] * 9)
    plain = FedAvg().aggregate(server, updates, ROUND).B["x"]
    after = FedRPCA(beta=4.0).aggregate(server, updates, ROUND).B["x"]
    extra = after - plain
    assert extra[7, 1] == pytest.approx(3 * 20 / 9, rel=0.05)
    extra[7, 1] = 0
    assert extra.abs().max() < 0.05


@pytest.mark.parametrize("beta", [0.99, -1.0, float("nan")])
def test_a_beta_below_one_is_refused(beta):
    with pytest.raises(FedloraError, match="beta must be 1 or above"):
        FedRPCA(beta=beta)
