from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

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
        added={"fc2": Residual(torch.ones(2, 1), torch.ones(1, 2))},
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
    assert cut.residual == cut.added == {}
    assert all(tensor is dict(state.tensors())[name] for name, tensor in cut.tensors())
    assert names(state) == ["A/fc1", "B/fc1", "other/head", "other/scale"]
    assert (len(state.residual), len(state.added)) == (2, 1)


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
    assert both.added == base.added
    assert names(AdapterState().over(base)) == names(base.over(AdapterState())) == names(base)


def test_over_takes_the_newer_residual():
    newer = Residual(torch.zeros(3, 5))
    both = AdapterState(residual={"fc1": newer}, added={"fc1": newer}).over(whole())
    assert both.residual["fc1"] is both.added["fc1"] is newer
    assert set(both.residual) == set(both.added) == {"fc1", "fc2"}


def test_nbytes():
    # 10 + 6 + 3 numbers, residuals of 3 + 5 and 4, 2 + 2 added, all float32
    assert whole().nbytes == (10 + 6 + 3 + 3 + 5 + 4 + 2 + 2) * 4
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
    assert back.residual["fc2"].V is None
    for part in ("residual", "added"):
        assert getattr(back, part).keys() == getattr(state, part).keys()
        for name, change in getattr(state, part).items():
            found = getattr(back, part)[name]
            assert torch.equal(found.dense(), change.dense())
            assert found.nbytes == change.nbytes


def test_states_are_frozen():
    with pytest.raises(FrozenInstanceError):
        whole().A = {}
    with pytest.raises(FrozenInstanceError):
        Round(0).idx = 1


# Cut and padded.


def layers(seed=0, ranks=(4, 2)):
    """Two layers, of unequal ranks unless told, with numbers that float32 holds exactly."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return torch.from_numpy(rng.integers(-8, 9, shape).astype(np.float32))

    shapes = dict(zip(("fc1", "fc2"), zip(ranks, (3, 6), (5, 7), strict=True), strict=True))
    return AdapterState(
        A={name: draw(r, n) for name, (r, _, n) in shapes.items()},
        B={name: draw(m, r) for name, (r, m, _) in shapes.items()},
        other={"head": draw(2)},
        scaling={"fc1": 2.0, "fc2": 0.5},
        residual={"fc1": Residual(draw(3, 5))},
        added={"fc1": Residual(draw(3, 1), draw(1, 5))},
    )


def products(state):
    """``s B A`` of each layer in numpy."""
    return {
        name: state.scaling[name] * state.B[name].double().numpy() @ state.A[name].double().numpy()
        for name in state.A
    }


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_cut_keeps_the_first_slots(rank, scale):
    state = layers()
    cut = state.cut(rank, scale)
    for name in state.A:
        assert torch.equal(cut.A[name], state.A[name][:rank])
        assert torch.equal(cut.B[name], state.B[name][:, :rank] / scale)
    assert cut.ranks == {"fc1": rank, "fc2": min(rank, 2)}
    assert cut.scaling == {"fc1": 2.0 * scale, "fc2": 0.5 * scale}
    assert cut.other is state.other
    assert (cut.residual, cut.added) == (state.residual, state.added)


@pytest.mark.parametrize("rank", [0, 4, 9])
def test_a_cut_to_no_less_is_the_state_itself(rank):
    state = layers()
    assert state.cut(rank) is state


@pytest.mark.parametrize("rank", [0, 4, 9])
@pytest.mark.parametrize("scale", [2.0, 0.5, 3.0])
def test_another_scaling_serves_the_same(rank, scale):
    state = layers()
    cut = state.cut(rank, scale)
    assert cut.ranks == state.ranks
    assert cut.scaling == {"fc1": 2.0 * scale, "fc2": 0.5 * scale}
    for name, product in products(state).items():
        np.testing.assert_allclose(products(cut)[name], product, rtol=1e-6, atol=1e-5)


def test_what_a_cut_serves_is_the_sum_over_its_slots():
    state = layers()
    for name, found in products(state.cut(2, 4.0)).items():
        A, B = state.A[name].double().numpy(), state.B[name].double().numpy()
        want = state.scaling[name] * sum(np.outer(B[:, i], A[i]) for i in range(2))
        np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("parts", [["A"], ["B"], ["other"], ["A", "other"], []])
def test_part_of_a_state_is_cut_alike(parts):
    state = layers()
    one, other = state.only(parts).cut(2, 4.0), state.cut(2, 4.0).only(parts)
    assert names(one) == names(other)
    for (name, left), (_, right) in zip(one.tensors(), other.tensors(), strict=True):
        assert torch.equal(left, right), name
    assert one.scaling == other.scaling


def test_a_cut_leaves_its_state_alone():
    state, same = layers(), layers()
    state.cut(1, 2.0)
    for (name, left), (_, right) in zip(state.tensors(), same.tensors(), strict=True):
        assert torch.equal(left, right), name
    assert state.scaling == same.scaling


def test_padding_adds_slots_of_zeros():
    state = layers()
    padded = state.padded({"fc1": 4, "fc2": 5, "fc3": 1})
    assert padded.A["fc1"] is state.A["fc1"]
    assert padded.B["fc1"] is state.B["fc1"]
    assert torch.equal(padded.A["fc2"][:2], state.A["fc2"])
    assert torch.equal(padded.B["fc2"][:, :2], state.B["fc2"])
    assert tuple(padded.A["fc2"].shape) == (5, 7)
    assert tuple(padded.B["fc2"].shape) == (6, 5)
    assert not padded.A["fc2"][2:].any()
    assert not padded.B["fc2"][:, 2:].any()
    assert (padded.scaling, padded.residual) == (state.scaling, state.residual)
    for name, product in products(state).items():
        np.testing.assert_array_equal(products(padded)[name], product)


def test_what_changes_nothing_gives_the_state_itself():
    state = replace(layers(), residual={}, added={})
    assert state.padded(state.ranks) is state
    assert state.only(["A", "B", "other"]) is state
    assert AdapterState().over(state) is state
    served = replace(state, residual={"fc1": Residual(torch.ones(2, 2))})
    assert not served.only(["A", "B", "other"]).residual


@pytest.mark.parametrize("parts", [["A"], ["B", "other"]])
def test_part_of_a_state_is_padded(parts):
    padded = layers().only(parts).padded({"fc1": 6, "fc2": 6})
    assert names(padded) == names(layers().only(parts))
    assert padded.ranks == {"fc1": 6, "fc2": 6}


@pytest.mark.parametrize(("rank", "scale"), [(1, 1.0), (2, 4.0), (3, 0.5)])
def test_cut_then_padded_has_the_shapes_from_before_and_serves_the_cut(rank, scale):
    state = layers()
    cut = state.cut(rank, scale)
    back = cut.padded(state.ranks)
    assert [tuple(t.shape) for _, t in back.tensors()] == [
        tuple(t.shape) for _, t in state.tensors()
    ]
    for name, product in products(cut).items():
        np.testing.assert_array_equal(products(back)[name], product)
    again = back.cut(rank)
    for name in state.A:
        assert torch.equal(again.A[name], cut.A[name])
        assert torch.equal(again.B[name], cut.B[name])


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
