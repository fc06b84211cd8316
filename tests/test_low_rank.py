from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.low_rank import factors, smaller, svd, truncate
from fedlora.state import Residual


def thin(out_features, columns, in_features, seed=0):
    """A thin change in float64, and the matrix in numpy."""
    rng = np.random.default_rng(seed)
    U = rng.standard_normal((out_features, columns))
    V = rng.standard_normal((columns, in_features))
    return Residual(torch.from_numpy(U), torch.from_numpy(V)), U @ V


def with_values(values, shape=(12, 9), seed=0):
    """A matrix in numpy with these singular values."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((size, size)))[0] for size in shape)
    count = len(values)
    return left[:, :count] * np.array(values) @ right[:, :count].T


def factored(matrix, rank, columns):
    """A matrix of this rank as a thin change of so many columns."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    mix = np.random.default_rng(1).standard_normal((columns, rank))
    U = (left[:, :rank] * values[:rank]) @ np.linalg.pinv(mix)
    return Residual(torch.from_numpy(U), torch.from_numpy(mix @ right[:rank]))


def columns(change):
    return None if change.V is None else change.U.shape[1]


# The decomposition.


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    count=st.integers(1, 20),  # more columns than the matrix has, too
    dense=st.booleans(),
)
def test_it_is_that_of_the_matrix(shape, count, dense):
    change, matrix = thin(shape[0], count, shape[1])
    if dense:
        change = Residual(torch.from_numpy(matrix))
    left, values, right = (part.numpy() for part in svd(change))
    kept = min(*shape, shape[0] if dense else count)
    assert (left.shape, values.shape, right.shape) == ((shape[0], kept), (kept,), (kept, shape[1]))
    want = np.linalg.svd(matrix, compute_uv=False)
    scale = want[0]
    assert np.abs(values - want[:kept]).max() < 1e-12 * scale
    assert np.all(np.diff(values) <= 0)
    assert np.abs(left * values @ right - matrix).max() < 1e-12 * scale
    assert np.abs(left.T @ left - np.eye(kept)).max() < 1e-12
    assert np.abs(right @ right.T - np.eye(kept)).max() < 1e-12


def test_it_is_computed_in_float64():
    change, _ = thin(30, 4, 20)
    left, values, right = svd(change.to(torch.float32))
    assert left.dtype == values.dtype == right.dtype == torch.float64
    rounded = change.to(torch.float32).to(torch.float64).dense().numpy()
    assert np.abs(values.numpy() - np.linalg.svd(rounded, compute_uv=False)[:4]).max() < 1e-12


def test_the_matrix_is_never_formed(monkeypatch):
    change, _ = thin(500, 3, 400)
    taken = []
    real = torch.linalg.svd

    def watched(matrix, **options):
        taken.append(tuple(matrix.shape))
        return real(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", watched)
    monkeypatch.setattr(Residual, "dense", None)
    svd(change)
    assert taken == [(3, 3)]


# Truncation.


def test_the_nearest_of_a_rank_has_the_error_of_the_values_left_out():
    values = [5.0, 3.0, 2.0, 1.0, 0.5]
    matrix = with_values(values, (40, 30))
    for rank in (1, 2, 4):
        near = truncate(factored(matrix, 5, 7), torch.float64, rank)
        assert columns(near) == rank
        lost = np.linalg.norm(near.dense().numpy() - matrix)
        assert lost == pytest.approx(np.linalg.norm(values[rank:]), rel=1e-12)


def test_a_rank_above_that_of_the_change_keeps_all_of_it():
    matrix = with_values([5.0, 3.0], (40, 30))
    near = truncate(factored(matrix, 2, 7), torch.float32, 10)
    assert columns(near) == 2
    assert np.abs(near.dense().numpy() - matrix).max() < 1e-5


# eps is 1.2e-7 in float32 and 2.2e-16 in float64.
@pytest.mark.parametrize(
    ("dtype", "values", "kept"),
    [
        (torch.float32, [1.0, 1e-3, 1e-6], 3),
        (torch.float32, [1.0, 1e-3, 2e-7], 3),
        (torch.float32, [1.0, 1e-3, 1e-7], 2),
        (torch.float32, [1e-9, 1e-12, 1e-17], 2),  # relative to the largest
        (torch.float64, [1.0, 1e-7, 1e-12], 3),
        (torch.float64, [1.0, 1e-17], 1),
    ],
)
def test_what_is_below_the_rounding_is_left_out(dtype, values, kept):
    left, right = torch.eye(40, dtype=torch.float64), torch.eye(30, dtype=torch.float64)
    count = len(values)
    change = Residual(
        left[:, :count] * torch.tensor(values, dtype=torch.float64), right[:count].clone()
    )
    near = truncate(change, dtype)
    assert columns(near) == kept
    assert near.U.dtype == near.V.dtype == dtype


# The noise of a product of size 8 is 8 eps, 9.5e-7 in float32.
@pytest.mark.parametrize(("beside", "kept"), [(0.0, 3), (0.5, 3), (1.0, 3), (8.0, 2), (1e9, 0)])
def test_what_is_below_the_rounding_of_what_it_is_served_beside_is_too(beside, kept):
    matrix = with_values([1.0, 1e-3, 5e-7], (40, 30))
    change = factored(matrix, 3, 6)
    assert columns(truncate(change, torch.float32, beside=beside)) == kept
    assert columns(truncate(change, torch.float32, 1, beside=beside)) == min(kept, 1)


def test_noise_of_cancelled_terms_is_no_column():
    change, matrix = thin(40, 3, 30)
    more, _ = thin(40, 4, 30, seed=1)
    minus = Residual(-more.U, more.V)
    total = change.add(more).add(minus)
    assert columns(total) == 11
    near = truncate(total, torch.float32)
    assert columns(near) == 3
    assert np.abs(near.dense().numpy() - matrix).max() < 1e-5


def test_a_dense_change_stays_dense_unless_a_rank_is_given():
    matrix = with_values([5.0, 3.0, 2.0], (40, 30))
    change = Residual(torch.from_numpy(matrix))
    whole = truncate(change, torch.float32)
    assert whole.V is None
    assert np.array_equal(whole.U.numpy(), matrix.astype(np.float32))
    near = truncate(change, torch.float64, 2)
    assert columns(near) == 2
    assert np.linalg.norm(near.dense().numpy() - matrix) == pytest.approx(2.0, rel=1e-12)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("count", [0, 3])
def test_nothing_has_no_columns(count, rank):
    change = Residual(torch.zeros(6, count), torch.zeros(count, 5))
    near = truncate(change, torch.float32, rank)
    assert (tuple(near.U.shape), tuple(near.V.shape)) == ((6, 0), (0, 5))
    assert near.nbytes == 0
    assert torch.equal(near.dense(), torch.zeros(6, 5))


def test_the_change_is_left_alone():
    change, _ = thin(9, 3, 8)
    before = change.U.clone(), change.V.clone()
    truncate(change, torch.float64, 1)
    assert torch.equal(change.U, before[0])
    assert torch.equal(change.V, before[1])


# Thin takes k (out + in) numbers, dense out * in.
@pytest.mark.parametrize(
    ("shape", "count", "is_thin"),
    [((8, 8), 3, True), ((8, 8), 4, False), ((9, 9), 4, True), ((9, 9), 5, False), ((1, 1), 1, 0)],
)
def test_the_form_with_fewer_numbers(shape, count, is_thin):
    change, matrix = thin(shape[0], count, shape[1])
    best = smaller(change)
    assert (best.V is not None) == is_thin
    assert best.nbytes == 8 * min(count * sum(shape), shape[0] * shape[1])
    assert np.allclose(best.dense().numpy(), matrix, rtol=1e-12)
    assert smaller(best).V is best.V
    assert columns(truncate(change, torch.float64)) == (count if is_thin else None)


# Factors.


@pytest.mark.parametrize("scaling", [1.0, 0.25, 3.0])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_factors_are_the_nearest_product(rank, scaling):
    values = [5.0, 3.0, 2.0, 1.0, 0.5]
    matrix = with_values(values)
    A, B = factors(*svd(Residual(torch.from_numpy(matrix))), rank, scaling)
    assert (tuple(A.shape), tuple(B.shape)) == ((rank, 9), (12, rank))
    assert np.abs(A.numpy() @ A.numpy().T - np.eye(rank)).max() < 1e-12
    lost = np.linalg.norm(scaling * B.numpy() @ A.numpy() - matrix)
    assert lost == pytest.approx(np.linalg.norm(values[rank:]), rel=1e-12, abs=1e-12)


def test_slots_that_a_matrix_is_too_small_for_are_zero():
    change, matrix = thin(3, 2, 4)
    A, B = factors(*svd(change), 6, 2.0)
    assert (tuple(A.shape), tuple(B.shape)) == ((6, 4), (3, 6))
    assert not A[2:].any()
    assert not B[:, 2:].any()
    assert np.abs(2.0 * B.numpy() @ A.numpy() - matrix).max() < 1e-12
