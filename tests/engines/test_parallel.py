from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.distributed.messages import decode, encode
from fedlora.engines.parallel import assign, lead
from fedlora.engines.turn import Turn
from fedlora.state import AdapterState, Client, ClientUpdate


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 5))
def test_nobody_has_more_than_one_item_too_many(costs: list[int], size: int) -> None:
    owners = assign(costs, size)
    assert len(owners) == len(costs)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(size)]
    assert sum(loads) == sum(costs)
    # Whoever ends last took up its last item when all others had at least as much.
    assert max(loads) - min(loads) <= max(costs, default=0)
    best = max(-(-sum(costs) // size), max(costs, default=0))
    assert 3 * max(loads) <= 4 * best + max(costs, default=0)
    assert owners == assign(costs, size)


def test_equal_items_take_turns_from_rank_0() -> None:
    assert assign([1, 1, 1, 1, 1], 2) == [0, 1, 0, 1, 0]
    assert assign([1, 9, 1, 1], 2) == [1, 0, 1, 1]
    assert assign([], 3) == []
    assert assign([1, 1, 1], 2, [5, 3]) == [1, 1, 0]


def test_rank_0_has_the_first_of_equal_items() -> None:
    owners, costs = [0, 1, 2, 0, 1, 2, 0], [5, 5, 5, 3, 5, 3, 3]
    # Of the fives 0, 1, 2, 1 and of the threes 0, 2, 0.
    assert lead(owners, costs, 100) == [0, 1, 1, 0, 2, 0, 2]
    assert lead(owners, costs, 2) == owners  # 5 5 | 5 3 | 5 3 | 3
    assert lead(owners, costs, 1) == owners
    assert lead([], [], 3) == []


@given(st.lists(st.integers(1, 4), max_size=40), st.integers(1, 5), st.integers(1, 50))
def test_nobody_has_more_to_do_for_it(costs: list[int], size: int, most: int) -> None:
    owners = assign(costs, size)
    found = lead(owners, costs, most)
    assert sorted(zip(costs, found, strict=True)) == sorted(zip(costs, owners, strict=True))
    for first in range(0, len(costs), most):
        window = slice(first, first + most)
        for cost in set(costs[window]):
            alike = [o for o, c in zip(found[window], costs[window], strict=True) if c == cost]
            assert alike == sorted(alike)


def test_a_turn_arrives_with_all_that_rank_0_does_not_know() -> None:
    client, sent = Client(3, 20, 2, "site"), AdapterState(A={"x": torch.ones(2, 3)})
    payload = AdapterState(B={"x": torch.randn(4, 2)}, scaling={"x": 0.3})
    update = ClientUpdate(
        client,
        sent,
        payload,
        20.0,
        {"c": torch.randn(3)},
        {"loss": 0.1},
        num_steps=7,
        down_nbytes=9,
    )
    arrived = Turn.from_dict(decode(encode(Turn(update, True).to_dict())), client, sent)
    assert arrived.kept
    found = arrived.update
    assert found is not None
    assert (found.client, found.sent) == (client, sent)
    assert torch.equal(found.payload.B["x"], payload.B["x"])
    assert torch.equal(found.extra["c"], update.extra["c"])
    for name in ("weight", "metrics", "num_steps", "down_nbytes", "nbytes"):
        assert getattr(found, name) == getattr(update, name), name
    assert found.payload.scaling == payload.scaling


def test_an_absence_arrives_with_where_its_error_is_from() -> None:
    def breaks() -> None:
        raise KeyError("lost")

    with pytest.raises(KeyError) as caught:
        breaks()
    turn = Turn(reason="error: KeyError: 'lost'", error=caught.value)
    arrived = Turn.from_dict(decode(encode(turn.to_dict())), Client(0, 1), AdapterState())
    assert arrived.update is None
    assert arrived.reason == turn.reason
    assert str(arrived.error) == "'lost'"
    [note] = arrived.error.__notes__
    assert 'raise KeyError("lost")' in note
    quiet = Turn.from_dict(Turn(reason="not finite").to_dict(), Client(0, 1), AdapterState())
    assert quiet.error is None
