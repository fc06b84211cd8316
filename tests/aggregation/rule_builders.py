"""Adapters, updates and the numpy side of the rules' tests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import strategies as st

from fedlora.state import AdapterState, Client, ClientUpdate, Round

SHAPES = {"vision.fc1": (6, 5), "text.fc1": (4, 7)}  # path -> (out_features, in_features)
HEAD = "head.weight"
ROUND = Round(0, seed=0, num_clients=3, cohort=3)


def adapter(seed, rank=2, scaling=2.0, dtype=torch.float32, shapes=SHAPES):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return torch.from_numpy(rng.standard_normal(shape)).to(dtype)

    return AdapterState(
        A={name: draw(rank, in_features) for name, (_, in_features) in shapes.items()},
        B={name: draw(out_features, rank) for name, (out_features, _) in shapes.items()},
        other={HEAD: draw(3, 4), "logit_scale": draw()},
        scaling=dict.fromkeys(shapes, scaling),
    )


def fresh(seed=0, **options):
    """A server's adapter before the first round: B is zero."""
    state = adapter(seed, **options)
    return replace(state, B={name: torch.zeros_like(B) for name, B in state.B.items()})


def play(rule, server, trained, weights, rnd=ROUND):
    """What clients send that ended their training at ``trained``, as the engine makes it."""
    updates = []
    for number, (state, weight) in enumerate(zip(trained, weights, strict=True)):
        client = Client(number, int(weight))
        sent = rule.distribute(server, client, rnd).over(server)
        ended = replace(state.only(rule.trainable(rnd)), residual={})
        payload = rule.upload(sent, ended, client, rnd)
        updates.append(ClientUpdate(client, sent, payload, float(weight)))
    return updates


def names(state):
    return [name for name, _ in state.tensors()]


def change(state, name):
    """What is served beside a frozen weight, ``R + s B A``, in numpy and float64."""
    A, B = state.A[name].double().numpy(), state.B[name].double().numpy()
    change = state.scaling[name] * B @ A
    if name in state.residual:
        change = change + residual(state, name)
    return change


def residual(state, name):
    beside = state.residual[name]
    U = beside.U.double().numpy()
    return U if beside.V is None else U @ beside.V.double().numpy()


def ideal(updates, name):
    """``sum_k p_k (R_k + s_k B_k A_k)``."""
    total = sum(update.weight for update in updates)
    return sum(update.weight / total * change(update.adapter, name) for update in updates)


def mean(tensors, weights):
    """``sum_k p_k x_k``."""
    total = sum(weights)
    return sum(
        weight / total * tensor.double().numpy()
        for tensor, weight in zip(tensors, weights, strict=True)
    )


def relative(difference, to):
    return np.linalg.norm(difference) / np.linalg.norm(to)


def snapshot(state):
    """All that an adapter holds, as bytes and numbers."""
    tensors = dict(state.tensors())
    for name, beside in state.residual.items():
        tensors[f"U/{name}"] = beside.U
        if beside.V is not None:
            tensors[f"V/{name}"] = beside.V
    values = {name: (t.dtype, t.shape, t.numpy().tobytes()) for name, t in tensors.items()}
    return values, dict(state.scaling)


@st.composite
def federations(draw):
    """(server, trained adapters, weights) of 1 to 5 clients, some without samples."""
    shapes = {
        f"layer{index}": (draw(st.integers(1, 8)), draw(st.integers(1, 8)))
        for index in range(draw(st.integers(1, 2)))
    }
    options = {
        "rank": draw(st.integers(1, 4)),
        "scaling": draw(st.sampled_from([0.5, 1.0, 4.0])),
        "shapes": shapes,
    }
    seed = draw(st.integers(0, 2**32 - 1))
    weights = draw(
        st.lists(st.integers(0, 1000), min_size=1, max_size=5).filter(lambda given: sum(given))
    )
    trained = [adapter([seed, 1 + index], **options) for index in range(len(weights))]
    return fresh([seed, 0], **options), trained, weights
