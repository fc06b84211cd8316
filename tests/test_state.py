from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.state import AdapterState, Client, ClientUpdate, Residual, Round


def whole():
    return AdapterState(
        A={"fc1": torch.arange(10.0).reshape(2, 5)},
        B={"fc1": torch.arange(6.0).reshape(3, 2)},
        other={"head": torch.tensor([7.0, 8.0]), "scale": torch.tensor(3.0)},
        scaling={"fc1": 2.0},
        residual={
            "fc1": Residual(torch.ones(3, 1), torch.ones(1, 5)),
            "fc2": Residual(torch.eye(2)),
        },
    )


def names(state):
    return [name for name, _ in state.tensors()]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([], []),
        (["A"], ["A/fc1"]),
        (["B"], ["B/fc1"]),
        (["other"], ["other/head", "other/scale"]),
        (["other", "A"], ["A/fc1", "other/head", "other/scale"]),
        (["A", "B", "other"], ["A/fc1", "B/fc1", "other/head", "other/scale"]),
    ],
)
def test_only(parts, expected):
    state = whole()
    cut = state.only(parts)
    assert names(cut) == expected
    assert cut.residual == {}
    assert all(tensor is dict(state.tensors())[name] for name, tensor in cut.tensors())
    assert names(state) == ["A/fc1", "B/fc1", "other/head", "other/scale"]
    assert len(state.residual) == 2


def test_over():
    base = whole()
    part = AdapterState(
        A={"fc1": torch.zeros(2, 5)}, other={"new": torch.zeros(1)}, scaling={"fc1": 4.0}
    )
    both = part.over(base)
    assert both.A["fc1"] is part.A["fc1"]
    assert both.B["fc1"] is base.B["fc1"]
    assert set(both.other) == {"head", "scale", "new"}
    assert both.scaling == {"fc1": 4.0}
    assert both.residual == base.residual
    assert names(AdapterState().over(base)) == names(base.over(AdapterState())) == names(base)


def test_over_takes_the_newer_residual():
    newer = Residual(torch.zeros(3, 5))
    both = AdapterState(residual={"fc1": newer}).over(whole())
    assert both.residual["fc1"] is newer
    assert set(both.residual) == {"fc1", "fc2"}


def test_nbytes():
    # 10 + 6 + 3 numbers, residuals of 3 + 5 and 4, all float32
    assert whole().nbytes == (10 + 6 + 3 + 3 + 5 + 4) * 4
    assert whole().only(["B"]).nbytes == 6 * 4
    assert AdapterState().nbytes == 0


def test_ranks_also_of_a_partial_adapter():
    assert whole().ranks == {"fc1": 2}
    assert whole().only(["A"]).ranks == whole().only(["B"]).ranks == {"fc1": 2}
    assert whole().only(["other"]).ranks == {}


def test_part():
    state = whole()
    assert state.part("A") is state.A
    assert state.part("B") is state.B
    assert state.part("other") is state.other


def test_to_dict_survives_saving_without_pickle(tmp_path):
    state = whole()
    torch.save(state.to_dict(), tmp_path / "state.pt")
    back = AdapterState.from_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert names(back) == names(state)
    for (name, left), (_, right) in zip(back.tensors(), state.tensors(), strict=True):
        assert torch.equal(left, right), name
        assert left.dtype == right.dtype
    assert back.scaling == state.scaling
    assert back.residual.keys() == state.residual.keys()
    assert back.residual["fc2"].V is None
    for name, residual in state.residual.items():
        assert torch.equal(back.residual[name].dense(), residual.dense())
        assert back.residual[name].nbytes == residual.nbytes


def test_states_are_frozen():
    with pytest.raises(FrozenInstanceError):
        whole().A = {}
    with pytest.raises(FrozenInstanceError):
        Round(0).idx = 1


# The residual.


def thin(out_features, columns, in_features, seed=0):
    rng = np.random.default_rng(seed)
    U = rng.integers(-3, 4, (out_features, columns)).astype(np.float32)
    V = rng.integers(-3, 4, (columns, in_features)).astype(np.float32)
    return Residual(torch.from_numpy(U), torch.from_numpy(V)), U @ V


def test_residual_by_hand():
    residual = Residual(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0, 5.0]]))
    assert residual.dense().tolist() == [[3.0, 4.0, 5.0], [6.0, 8.0, 10.0]]
    assert residual.shape == (2, 3)
    assert residual.nbytes == (2 + 3) * 4
    assert Residual(residual.dense()).shape == (2, 3)
    assert Residual(residual.dense()).nbytes == 6 * 4


def test_residual_to():
    residual, dense = thin(4, 1, 5)
    wide = residual.to(torch.float64)
    assert wide.U.dtype == wide.V.dtype == wide.dense().dtype == torch.float64
    assert wide.nbytes == 2 * residual.nbytes
    assert np.array_equal(wide.dense().numpy(), dense)
    assert Residual(torch.ones(2, 2)).to(torch.float64).V is None


# Thin takes k (out + in) numbers, dense out * in: 8 by 8 is dense from 4 columns on (4 * 16 = 64),
# 6 by 12 too (4 * 18 = 72), 9 by 9 only from 5 on (4 * 18 = 72 < 81 < 90).
@pytest.mark.parametrize(
    ("out_features", "in_features", "columns", "is_thin"),
    [
        (8, 8, 3, True),
        (8, 8, 4, False),
        (6, 12, 3, True),
        (6, 12, 4, False),
        (9, 9, 4, True),
        (9, 9, 5, False),
        (1, 1, 2, False),
    ],
)
def test_a_sum_is_dense_exactly_from_where_that_is_smaller(
    out_features, in_features, columns, is_thin
):
    one, one_dense = thin(out_features, 1, in_features, seed=1)
    rest, rest_dense = thin(out_features, columns - 1, in_features, seed=2)
    total = one.add(rest)
    assert (total.V is not None) == is_thin
    assert np.array_equal(total.dense().numpy(), one_dense + rest_dense)
    thin_size = columns * (out_features + in_features)
    assert total.nbytes == 4 * min(thin_size, out_features * in_features)


@settings(max_examples=50, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    columns=st.lists(st.integers(0, 5), min_size=2, max_size=4),
)
def test_sums_add_up_in_every_mix_of_forms(shape, columns):
    out_features, in_features = shape
    total, want = Residual(torch.zeros(out_features, 0), torch.zeros(0, in_features)), 0
    for seed, count in enumerate(columns):
        if count:
            term, dense = thin(out_features, count, in_features, seed)
        else:  # a dense one
            dense = np.full(shape, float(seed), dtype=np.float32)
            term = Residual(torch.from_numpy(dense))
        before = term.dense().clone()
        total, want = total.add(term), want + dense
        assert torch.equal(term.dense(), before)
    assert np.array_equal(total.dense().numpy(), want)
    assert total.nbytes <= 4 * out_features * in_features
    assert total.shape == shape


# Clients and updates.


def test_clients_are_named_as_users_name_them():
    assert str(Client(3, 10)) == "client 3"
    assert str(Client(3, 10, name="site_a")) == "client 3 (site_a)"


def test_an_update_is_counted_by_what_travels():
    update = ClientUpdate(
        Client(0, 5),
        sent=whole(),
        payload=whole().only(["B"]),
        weight=5.0,
        extra={"control": torch.zeros(3), "bit": torch.zeros((), dtype=torch.bool)},
    )
    assert update.nbytes == 6 * 4 + 3 * 4 + 1


def test_the_adapter_of_an_update_is_the_payload_over_what_was_sent():
    sent, payload = whole(), AdapterState(B={"fc1": torch.zeros(3, 2)})
    adapter = ClientUpdate(Client(0, 5), sent, payload, 5.0).adapter
    assert adapter.B["fc1"] is payload.B["fc1"]
    assert adapter.A["fc1"] is sent.A["fc1"]
    assert adapter.residual == sent.residual
