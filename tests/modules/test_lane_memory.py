"""What clients train, side by side: the same steps as apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedlora.modules.lane_memory import LaneMemory, Seat

# Of odd sizes too: the last entries of a tensor may be computed by other instructions.
SHAPES = {
    "A/x": (8, 19),
    "A/y": (3, 7),
    "B/x": (13, 8),
    "other/idle": (5,),
    "other/bias": (10,),
    "other/scale": (),
}
IDLE = "other/idle"  # what no backward pass comes to
HEAD = ("other/bias", "other/scale")
MAKE: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": partial(torch.optim.Adam, fused=True, amsgrad=True),
    "AdamW": partial(torch.optim.AdamW, fused=True, weight_decay=0.1),
    "AdamW, not fused": partial(torch.optim.AdamW, weight_decay=0.1),
    "SGD": partial(torch.optim.SGD, fused=True, weight_decay=0.1),
    "RMSprop": torch.optim.RMSprop,
}


@pytest.fixture
def own() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}


def make_memory(own: Mapping[str, nn.Parameter], kind: str = "AdamW") -> LaneMemory:
    """With three seats, to two of which a pass came before."""
    memory = LaneMemory(own, 3, type(MAKE[kind]([{"params": [nn.Parameter(torch.ones(1))]}])))
    for seat in memory.seats:
        put(seat)
    passed(memory, [0, 2])
    return memory


def put(seat: Seat) -> None:
    """Let a seat have what is in the model."""
    with torch.no_grad():
        for name, value in seat.every.items():
            value.copy_(seat.memory.own[name])
    seat.clear()


@pytest.fixture
def memory(own: Mapping[str, nn.Parameter]) -> LaneMemory:
    return make_memory(own)


def draw(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) for n, s in SHAPES.items() if n != IDLE}


def passed(memory: LaneMemory, seats: list[int], seed: int = 0) -> None:
    """A pass that leaves the gradients of :func:`draw`, of another seed for each seat."""
    values, index = memory.chosen(seats)
    for name in draw(0):
        values[name].grad = torch.stack([draw(seed + seat)[name] for seat in seats])
    memory.add_gradients(values, index)


def groups(parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    head = [parameters[name] for name in HEAD]
    rest = [p for name, p in parameters.items() if name not in HEAD]
    return [{"params": rest}, {"params": head, "lr": 0.3}]


@pytest.mark.parametrize("kind", list(MAKE))
def test_a_step_of_all_as_one_is_a_step_of_each_to_the_bit(
    kind: str, own: Mapping[str, nn.Parameter]
) -> None:
    memory = make_memory(own, kind)
    for number in (0, 2, 0):  # a seat that is used again, too
        seat = memory.seats[number]
        alone = {name: nn.Parameter(p.detach().clone()) for name, p in own.items()}
        put(seat)
        leaves = seat.leaves()
        joined, apart = (MAKE[kind](g, lr=0.1) for g in (seat.groups(groups), groups(alone)))
        for step in range(3):
            passed(memory, [1, number], seed=10 * step)
            for name, gradient in draw(10 * step + number).items():
                alone[name].grad = gradient
            joined.step()
            apart.step()
            seat.forget_gradients()
            for name, parameter in alone.items():
                assert torch.equal(leaves[name], parameter), name
        assert torch.equal(leaves[IDLE], own[IDLE])  # no weight decay either
        assert not torch.equal(leaves["A/x"], own["A/x"])


def in_one_group(parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": list(parameters.values())}]


def count(made: list[dict[str, Any]]) -> list[int]:
    return [len(group["params"]) for group in made]


def sizes(optimizer: torch.optim.Optimizer) -> list[list[int]]:
    return [[p.numel() for p in group["params"]] for group in optimizer.param_groups]


def test_what_lies_side_by_side_is_one_of_its_group(memory: LaneMemory) -> None:
    seat = memory.seats[0]
    optimizer = MAKE["AdamW"](seat.groups(groups), lr=0.1)
    assert sizes(optimizer) == [[5, 8 * 19 + 3 * 7 + 13 * 8], [10 + 1]]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.3]


def test_only_what_is_trained_is_joined(
    own: Mapping[str, nn.Parameter], memory: LaneMemory
) -> None:
    seat = memory.seats[0]
    assert count(seat.groups(groups)) == [2, 1]
    own["A/y"].requires_grad_(False)
    assert "A/y" not in seat.leaves()
    optimizer = MAKE["AdamW"](seat.groups(in_one_group))
    assert sizes(optimizer) == [[5, 8 * 19, 13 * 8, 10 + 1]]
    own["A/y"].requires_grad_(True)  # parts may take turns
    assert count(seat.groups(groups)) == [2, 1]


class MyAdam(torch.optim.Adam):
    """Somebody's own, which may look at shapes."""


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop, MyAdam, None])
def test_what_may_not_work_entry_by_entry_keeps_its_tensors(
    kind: Any, own: Mapping[str, nn.Parameter]
) -> None:
    memory = LaneMemory(own, 2, kind)
    passed(memory, [0, 1])
    assert memory.seats[0].groups(groups) == groups(memory.seats[0].leaves())


def test_before_any_pass_nothing_is_known_to_have_gradients(
    own: Mapping[str, nn.Parameter],
) -> None:
    memory = LaneMemory(own, 2, torch.optim.Adam)
    assert count(memory.seats[0].groups(groups)) == [4, 2]
    passed(memory, [1])
    assert count(memory.seats[0].groups(groups)) == [2, 1]


def test_what_an_optimizer_does_to_its_groups_is_its_own(memory: LaneMemory) -> None:
    first = torch.optim.AdamW(memory.seats[0].groups(groups), lr=0.1)
    first.param_groups[0]["lr"] *= 2
    first.param_groups[0]["params"].clear()
    second = torch.optim.AdamW(memory.seats[0].groups(groups), lr=0.1)
    assert [group["lr"] for group in second.param_groups] == [0.1, 0.3]
    assert count(second.param_groups) == [2, 1]


def test_a_gradient_that_somebody_replaced_counts(memory: LaneMemory) -> None:
    seat = memory.seats[2]
    put(seat)
    leaves = seat.leaves()
    optimizer = torch.optim.Adam(seat.groups(in_one_group), betas=(0.0, 0.0), eps=1e-12)
    passed(memory, [2])
    before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    leaves["A/x"].grad = torch.full((8, 19), -1.0)
    leaves["B/x"].grad = None
    leaves["other/bias"].grad.mul_(0)
    seat.settle_gradients()
    optimizer.step()
    assert torch.allclose(leaves["A/x"], before["A/x"] + 1e-3)  # a step of lr against its sign
    for name in ("B/x", "other/bias"):
        assert torch.equal(leaves[name], before[name])
    assert not torch.equal(leaves["A/y"], before["A/y"])
    # The next client finds nothing of it.
    leaves["A/x"].grad = torch.ones(8, 19)
    put(seat)
    seat.settle_gradients()
    assert not any(leaf.grad.any() for leaf in leaves.values() if leaf.grad is not None)


def test_a_pass_of_some_leaves_the_others_gradients(memory: LaneMemory) -> None:
    for seat in memory.seats:
        put(seat)
    passed(memory, [2, 0], seed=5)
    passed(memory, [2], seed=7)
    found = [seat.leaves()["A/x"].grad for seat in memory.seats]
    assert torch.equal(found[0], draw(5)["A/x"])
    assert not found[1].any()
    assert torch.equal(found[2], draw(7)["A/x"] + draw(9)["A/x"])


def test_types_are_kept_apart() -> None:
    own = {
        "a": nn.Parameter(torch.arange(3.0)),
        "b": nn.Parameter(torch.arange(4.0, dtype=torch.float64)),
        "c": nn.Parameter(torch.arange(5.0)),
    }
    memory = LaneMemory(own, 2, torch.optim.Adam)
    put(memory.seats[1])
    values, _ = memory.chosen([1])
    assert {n: t.dtype for n, t in values.items()} == {n: p.dtype for n, p in own.items()}
    assert all(torch.equal(values[name][0], p) for name, p in own.items())
    for value in values.values():
        value.grad = torch.ones_like(value)
    memory.add_gradients(values, torch.tensor([1]))
    joined = memory.seats[1].groups(in_one_group)
    assert [p.numel() for p in joined[0]["params"]] == [3, 4, 5]
