from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.aggregation import FedAvg, FedRotLoRA
from fedlora.state import Client, Round
from tests.aggregation.rule_builders import (
    HEAD,
    SHAPES,
    adapter,
    change,
    federations,
    fresh,
    ideal,
    play,
    relative,
    snapshot,
)

PARITIES = pytest.mark.parametrize("idx", [2, 3], ids=["even", "odd"])


def turned(state, Q):
    """The same product in other factors: Q^T A and B Q, Q orthogonal, one for each layer."""
    return replace(
        state,
        A={name: (Q[name].T @ A.double()).to(A.dtype) for name, A in state.A.items()},
        B={name: (B.double() @ Q[name]).to(B.dtype) for name, B in state.B.items()},
    )


def orthogonal(seed, rank, reflect=False):
    Q = np.linalg.qr(np.random.default_rng(seed).standard_normal((rank, rank)))[0]
    Q[:, 0] *= np.sign(np.linalg.det(Q)) * (-1 if reflect else 1)
    return torch.from_numpy(Q)


def send(sent, trained, idx, strength=1.0):
    return FedRotLoRA(strength).upload(sent, trained, Client(0, 1), Round(idx))


def angle(sent, trained, name, idx, strength):
    """Rank 2: trace(R^T M) = cos (M00 + M11) + sin (M10 - M01), then part of the way to it."""
    if idx % 2:
        M = trained.A[name].double().numpy() @ sent.A[name].double().numpy().T
    else:
        M = trained.B[name].double().numpy().T @ sent.B[name].double().numpy()
    full = np.arctan2(M[1, 0] - M[0, 1], M[0, 0] + M[1, 1])
    return np.arctan2(strength * np.sin(full), 1 - strength + strength * np.cos(full))


@PARITIES
@pytest.mark.parametrize("strength", [0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(6))
def test_rank_2_by_the_angle(seed, strength, idx):
    # Drawn factors: about half are nearer to a reflection of what was sent.
    sent, trained = adapter([seed, 0]), adapter([seed, 1])
    up = send(sent, trained, idx, strength)
    for name in SHAPES:
        cos, sin = (f(angle(sent, trained, name, idx, strength)) for f in (np.cos, np.sin))
        R = np.array([[cos, -sin], [sin, cos]])
        np.testing.assert_allclose(up.A[name], R.T @ trained.A[name].numpy(), atol=1e-5)
        np.testing.assert_allclose(up.B[name], trained.B[name].numpy() @ R, atol=1e-5)
    assert up.other is trained.other


@settings(max_examples=60, deadline=None)
@given(federations(), st.integers(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_the_product_does_not_change(federation, idx, strength, seed):
    _, [trained, *_], _ = federation
    shapes = {name: (len(B), trained.A[name].shape[1]) for name, B in trained.B.items()}
    sent = adapter(seed, rank=len(trained.A["layer0"]), shapes=shapes)
    up = send(sent, trained, idx, strength)
    for name in trained.A:
        assert relative(change(up, name) - change(trained, name), change(trained, name)) < 1e-5


@PARITIES
def test_strength_0_is_fedavg_to_the_bit(idx):
    rnd, server = Round(idx), adapter(0)
    trained = [adapter(seed) for seed in (1, 2, 3)]
    off, full, plain = (
        snapshot(rule.aggregate(server, play(rule, server, trained, [1, 2, 3], rnd), rnd))
        for rule in (FedRotLoRA(0.0), FedRotLoRA(), FedAvg())
    )
    assert off == plain != full
    sent = play(FedRotLoRA(0.0), server, trained, [1, 2, 3], rnd)
    assert all(u.payload.A[n] is s.A[n] for u, s in zip(sent, trained, strict=True) for n in s.A)


@PARITIES
@pytest.mark.parametrize("reflect", [False, True], ids=["rotations", "with a reflection"])
def test_clients_that_differ_by_a_rotation_agree_again(idx, reflect):
    # The only difference but for little steps; FedAvg of it averages to near nothing.
    shapes = {"x": (24, 16)}
    rnd, server = Round(idx), adapter(0, rank=4, shapes=shapes)
    trained = []
    for seed in range(1, 6):
        step = adapter([1, seed], rank=4, shapes=shapes)
        near = replace(
            server,
            A={"x": server.A["x"] + 0.02 * step.A["x"]},
            B={"x": server.B["x"] + 0.02 * step.B["x"]},
        )
        trained.append(turned(near, {"x": orthogonal(seed, 4, reflect and seed == 1)}))
    errors = {}
    for rule in (FedAvg(), FedRotLoRA()):
        updates = play(rule, server, trained, [1] * 5, rnd)
        after, want = rule.aggregate(server, updates, rnd), ideal(updates, "x")
        errors[type(rule)] = relative(want - change(after, "x"), want)
    assert errors[FedAvg] > 0.6
    # A reflection cannot be undone by a rotation: one direction of one of five stays mirrored.
    assert errors[FedRotLoRA] < (0.3 if reflect else 0.01)


@PARITIES
def test_a_reflection_is_not_undone(idx):
    sent = adapter(0, rank=3)
    mirrored = turned(sent, {name: orthogonal(5, 3, reflect=True) for name in SHAPES})
    up = send(sent, mirrored, idx)
    for name in SHAPES:
        R = np.linalg.lstsq(mirrored.B[name].numpy(), up.B[name].numpy(), rcond=None)[0]
        assert np.linalg.det(R) == pytest.approx(1, abs=1e-5)


def low_rank(state, rank, noise):
    """With B, and A, of this rank but for some noise."""

    def cut(factor, seed):
        U, S, Vt = np.linalg.svd(factor.double().numpy(), full_matrices=False)
        rng = np.random.default_rng(seed)
        less = U[:, :rank] * S[:rank] @ Vt[:rank] + noise * rng.standard_normal(factor.shape)
        return torch.from_numpy(less).to(factor.dtype)

    return replace(
        state,
        A={name: cut(A, 1) for name, A in state.A.items()},
        B={name: cut(B, 2) for name, B in state.B.items()},
    )


@PARITIES
@pytest.mark.parametrize(
    ("rank", "noise", "turns"),
    [(0, 0.0, False), (1, 0.0, False), (1, 1e-7, False), (2, 0.0, True), (2, 1e-7, True)],
)
def test_nothing_is_turned_where_what_was_sent_does_not_fix_it(rank, noise, turns, idx):
    # One direction that is missing of three is fixed by the others: a rotation has no reflection.
    sent = low_rank(adapter(0, rank=3), rank, noise=noise)
    trained = adapter(1, rank=3)
    up = send(sent, trained, idx)
    assert (snapshot(up) != snapshot(trained)) is turns


def test_the_first_round_turns_nothing():
    trained = adapter(1)
    assert snapshot(send(fresh(), trained, 0)) == snapshot(trained)
    assert snapshot(send(fresh(), trained, 1)) != snapshot(trained)  # by A it could


@PARITIES
def test_half_of_a_half_turn_could_be_either_way(idx):
    sent = adapter(0)
    opposite = turned(sent, {name: -torch.eye(2, dtype=torch.float64) for name in SHAPES})
    assert snapshot(send(sent, opposite, idx, 0.5)) == snapshot(opposite)
    whole = send(sent, opposite, idx, 1.0)
    for name in SHAPES:
        torch.testing.assert_close(whole.A[name], sent.A[name])


@PARITIES
def test_a_reflection_that_every_turn_is_as_far_from(idx):
    # trace(R^T [[0, 1], [1, 0]]) is 0 for every rotation of the plane.
    flat = {name: torch.eye(*B.shape) for name, B in adapter(0).B.items()}
    sent = replace(adapter(0), A={n: torch.eye(*A.shape) for n, A in adapter(0).A.items()}, B=flat)
    mirror = torch.eye(2, dtype=torch.float64).flip(0)
    mirrored = turned(sent, dict.fromkeys(SHAPES, mirror))
    assert snapshot(send(sent, mirrored, idx)) == snapshot(mirrored)


@PARITIES
def test_rank_1_has_nothing_to_turn(idx):
    for seed in range(4):
        sent, trained = adapter([seed, 0], rank=1), adapter([seed, 1], rank=1)
        assert snapshot(send(sent, trained, idx)) == snapshot(trained)


def test_all_parts_travel():
    up = send(adapter(0), adapter(1), 3)
    assert up.A.keys() == up.B.keys() == SHAPES.keys()
    assert HEAD in up.other


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_a_strength_that_cannot_be_is_refused(strength):
    with pytest.raises(ValueError, match="strength must be from 0 to 1"):
        FedRotLoRA(strength)
