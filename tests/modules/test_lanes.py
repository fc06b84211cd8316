"""Several clients in one step against each of them alone, in the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedlora.errors import FedloraError
from fedlora.modules.clip import FederatedCLIPModel
from fedlora.modules.clip_wrapper import CLIPLoRAWrapper
from fedlora.modules.config import LoRAConfig
from fedlora.modules.dropout import KeyedDropout
from fedlora.modules.lanes import LaneStack, Ticket, why_not
from fedlora.modules.quick import make_quick
from fedlora.state import AdapterState, Residual
from tests.small_clip import NAMES, SIZE, TEMPLATES, adapted, pictures, shake
from tests.small_siglip import make_siglip

SETTINGS: list[dict[str, Any]] = [
    {},
    {"placement": "all"},
    {"towers": "both"},
    {"head": "text"},
    {"head": "text", "towers": "both"},
    {"bias": "all", "train_norm": True},
    {"head": "text", "towers": "both", "bias": "all", "train_norm": True},
    {"bias": "lora_only"},
    {"target_components": ["encoder", "classifier"]},
    {"target_components": ["classifier"], "bias": "all"},
    {"layers": [-1]},
]
ROWS = [2, 3, 1]  # of the lanes of three clients
SEATS = [0, 1, 2]


def quick(folder: Path, **settings: Any) -> CLIPLoRAWrapper:
    torch.manual_seed(0)
    lora = adapted(folder, **settings)
    make_quick(lora.federated)
    lora.federated.train()
    return lora


def tickets(seats: Sequence[int] = SEATS) -> list[Ticket]:
    return [Ticket(seat, ROWS[seat], key=100 + seat, number=seat) for seat in seats]


def clients(lora: CLIPLoRAWrapper) -> list[AdapterState]:
    """What three clients have: other factors and heads, of other scalings."""
    start, found = lora.state(), []
    for seat in SEATS:
        lora.load(start)
        shake(lora, seed=seat)
        scaling = {n: s * (seat + 1) / 3 for n, s in start.scaling.items()}
        found.append(replace(lora.state(), scaling=scaling))
    lora.load(start)
    return found


def seated(lora: CLIPLoRAWrapper, states: Sequence[AdapterState]) -> LaneStack:
    stack = LaneStack(lora, len(states))
    for seat, state in enumerate(states):
        stack.put(seat, state)
    return stack


def same(one: AdapterState, other: AdapterState) -> bool:
    mine, yours = dict(one.tensors()), dict(other.tensors())
    equal = mine.keys() == yours.keys() and all(torch.equal(t, yours[n]) for n, t in mine.items())
    return equal and one.scaling == other.scaling


def batch(seat: int) -> tuple[Tensor, Tensor]:
    labels = torch.arange(ROWS[seat]).add(seat) % len(NAMES)
    return pictures(ROWS[seat], seed=10 + seat), labels


def alone(lora: CLIPLoRAWrapper, state: AdapterState, ticket: Ticket) -> dict[str, Tensor]:
    """Logits and gradients of one client's step."""
    lora.load(state)
    lora.federated.zero_grad()
    images, labels = batch(ticket.seat)
    lora.set_dropout_key(ticket.key, ticket.number)
    logits = lora.federated(images)
    nn.functional.cross_entropy(logits, labels).backward()
    lora.set_dropout_key(None)
    gradients = {n: p.grad.clone() for n, p in lora.trainable().items() if p.grad is not None}
    return {"logits": logits.detach()} | gradients


def together(
    lora: CLIPLoRAWrapper, stack: LaneStack, work: Sequence[Ticket]
) -> list[dict[str, Tensor]]:
    """What one step of all of them gives to each."""
    images, labels = zip(*(batch(ticket.seat) for ticket in work), strict=True)
    rows = [ticket.rows for ticket in work]
    leaves = [stack.memory.seats[ticket.seat].leaves() for ticket in work]
    lora.federated.zero_grad()
    with stack.together(work):
        logits = lora.federated(torch.cat(images)).split(rows)
        losses = map(nn.functional.cross_entropy, logits, labels)
        torch.stack(list(losses)).sum().backward()
    assert all(p.grad is None for p in lora.federated.parameters())  # the model's own
    return [
        {"logits": own.detach()} | {n: p.grad for n, p in of.items() if p.grad is not None}
        for own, of in zip(logits, leaves, strict=True)
    ]


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], close: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # A bias of keys moves nothing: its gradient is what rounding leaves of zero.
        limit = close * max(1e-2, float(tensor.abs().max()))
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=limit)


def bound(lora: CLIPLoRAWrapper) -> list[str]:
    """Where something of a step is left."""
    modules = list(lora.federated.named_modules())
    left = [name for name, each in modules if getattr(each, "lanes", None) is not None]
    drawn = [each for _, each in modules if isinstance(each, KeyedDropout)]
    return left + ["draws" for each in drawn if each.draws is not None]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_is_put_in_comes_out_to_the_bit(settings: dict[str, Any], folder: Path) -> None:
    lora = quick(folder, **settings)
    states = clients(lora)
    stack = seated(lora, states)
    assert not any(same(one, other) for one, other in pairwise(states))
    for seat in (2, 0, 1, 0):
        assert same(stack.take(seat), states[seat])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_leaves_are_a_seats_own_memory(settings: dict[str, Any], folder: Path) -> None:
    lora = quick(folder, **settings)
    states = clients(lora)
    stack = seated(lora, states)
    leaves = stack.memory.seats[1].leaves()
    trained = lora.trainable()
    assert {n: p.shape for n, p in leaves.items()} == {n: p.shape for n, p in trained.items()}
    with torch.no_grad():
        for leaf in leaves.values():
            leaf.add_(1)
    for seat, state in enumerate(states):
        moved = dict(stack.take(seat).tensors())
        for name, tensor in state.tensors():
            assert torch.equal(moved[name], tensor + (seat == 1))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_each_lane_has_the_gradients_it_has_alone(
    settings: dict[str, Any], dropout: float, folder: Path
) -> None:
    lora = quick(folder, lora_dropout=dropout, **settings)
    states = clients(lora)
    expected = [alone(lora, state, own) for state, own in zip(states, tickets(), strict=True)]
    stack = seated(lora, states)
    found = together(lora, stack, tickets())
    for one, other in zip(found, expected, strict=True):
        compare(one, other)
    assert bound(lora) == []
    # Every gradient that there is says something.
    silent = [n for n, gradient in expected[0].items() if not gradient.abs().max() > 1e-7]
    assert [name for name in silent if not name.endswith("k_proj.bias")] == []


def test_in_float64_they_are_the_same(folder: Path) -> None:
    settings = {"head": "text", "towers": "both", "bias": "all", "train_norm": True}
    lora = quick(folder, placement="all", lora_dropout=0.3, **settings)
    states = clients(lora)
    lora.federated.double()
    expected = [alone(lora, state, own) for state, own in zip(states, tickets(), strict=True)]
    for one, other in zip(together(lora, seated(lora, states), tickets()), expected, strict=True):
        compare(one, other, close=1e-10)


@pytest.mark.parametrize("head", ["linear", "text"])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast(kept: torch.dtype, head: str, folder: Path) -> None:
    lora = quick(folder, head=head, lora_dropout=0.3)
    states = clients(lora)
    lora.set_base_dtype(kept)
    stack = seated(lora, states)
    exact = together(lora, stack, tickets())
    with torch.autocast("cpu", torch.bfloat16):
        found = together(lora, seated(lora, states), tickets())
        expected = [alone(lora, state, own) for state, own in zip(states, tickets(), strict=True)]
    for one, other, truth in zip(found, expected, exact, strict=True):
        assert one.keys() == other.keys() == truth.keys()
        for name, tensor in truth.items():
            rounding = (other[name] - tensor).norm()
            assert (one[name] - tensor).norm() < 2 * rounding + 0.02 * tensor.norm()


def test_with_recomputation(folder: Path) -> None:
    lora = quick(folder, lora_dropout=0.3)
    states = clients(lora)
    expected = together(lora, seated(lora, states), tickets())
    lora.enable_gradient_checkpointing()
    for one, other in zip(together(lora, seated(lora, states), tickets()), expected, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], tensor) for name, tensor in other.items())


def test_another_order_of_lanes(folder: Path) -> None:
    lora = quick(folder, lora_dropout=0.3)
    states = clients(lora)
    work = tickets([2, 0, 1])
    expected = [alone(lora, states[own.seat], own) for own in work]
    for one, other in zip(together(lora, seated(lora, states), work), expected, strict=True):
        compare(one, other)


@pytest.mark.parametrize("seats", [[1], [0, 2], [2, 1]], ids=str)
def test_some_of_the_seats(seats: list[int], folder: Path) -> None:
    lora = quick(folder, lora_dropout=0.3)
    states = clients(lora)
    expected = [alone(lora, states[own.seat], own) for own in tickets(seats)]
    stack = seated(lora, states)
    others = {seat: stack.memory.seats[seat].leaves() for seat in SEATS if seat not in seats}
    for one, other in zip(together(lora, stack, tickets(seats)), expected, strict=True):
        compare(one, other)
    for seat, leaves in others.items():
        assert not any(leaf.grad.any() for leaf in leaves.values() if leaf.grad is not None)
        assert same(stack.take(seat), states[seat])


def test_a_step_moves_only_who_takes_it(folder: Path) -> None:
    """Optimizers work in the stack, so what they did is there and in nobody else's place."""
    lora = quick(folder)
    states = clients(lora)
    stack = seated(lora, states)
    leaves = {seat: stack.memory.seats[seat].leaves() for seat in (0, 2)}
    optimizers = [torch.optim.SGD(own.values(), lr=0.1) for own in leaves.values()]
    work = tickets([0, 2])
    images = torch.cat([batch(own.seat)[0] for own in work])
    for _ in range(2):
        with stack.together(work):
            lora.federated(images).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        for seat in (0, 2):
            stack.memory.seats[seat].forget_gradients()
    assert same(stack.take(1), states[1])
    for seat, own in leaves.items():
        moved = stack.take(seat)
        assert not same(moved, states[seat])
        assert all(torch.equal(dict(moved.tensors())[name], leaf) for name, leaf in own.items())


def test_gradients_of_several_batches_add_up(folder: Path) -> None:
    lora = quick(folder)
    stack = seated(lora, clients(lora))
    leaves = [stack.memory.seats[seat].leaves() for seat in SEATS]
    images = torch.cat([batch(seat)[0] for seat in SEATS])
    found = []
    for _ in range(2):
        with stack.together(tickets()):
            lora.federated(images).square().sum().backward()
        found.append([{n: p.grad.clone() for n, p in own.items()} for own in leaves])
    for first, both in zip(*found, strict=True):
        assert all(torch.equal(both[name], 2 * gradient) for name, gradient in first.items())


def test_ranks_that_are_padded_with_zeros(folder: Path) -> None:
    """What a smaller client has not stays zero, to the bit."""
    lora = quick(folder, lora_dropout=0.3)
    states = clients(lora)
    small = replace(
        states[1],
        A={n: torch.cat([A[:1], torch.zeros_like(A[1:])]) for n, A in states[1].A.items()},
        B={n: torch.cat([B[:, :1], torch.zeros_like(B[:, 1:])], 1) for n, B in states[1].B.items()},
    )
    states[1] = small
    found = together(lora, seated(lora, states), tickets())[1]
    for name, gradient in found.items():
        if name.startswith("A/"):
            assert not gradient[1:].any()
            assert gradient[:1].any()
        elif name.startswith("B/"):
            assert not gradient[:, 1:].any()
            assert gradient[:, :1].any()
    one = quick(folder, lora_dropout=0.3, r=1)
    cut = replace(
        small,
        A={name: A[:1] for name, A in small.A.items()},
        B={name: B[:, :1] for name, B in small.B.items()},
    )
    expected = alone(one, cut, tickets()[1])
    shown = {n: g[:1] if n[0] == "A" else g[:, :1] if n[0] == "B" else g for n, g in found.items()}
    compare(shown, expected)


@pytest.mark.parametrize("part", ["A", "B", "other"])
def test_a_part_that_is_not_trained(part: str, folder: Path) -> None:
    """It may differ between clients all the same."""
    lora = quick(folder, lora_dropout=0.3, bias="all", train_norm=True)
    lora.set_trainable({"A", "B", "other"} - {part})
    states = clients(lora)
    expected = [alone(lora, state, own) for state, own in zip(states, tickets(), strict=True)]
    stack = seated(lora, states)
    assert not [name for name in stack.memory.seats[0].leaves() if name.startswith(part)]
    for one, other in zip(together(lora, stack, tickets()), expected, strict=True):
        compare(one, other)


@pytest.mark.parametrize("frozen", ["bias", "weight"])
def test_a_head_that_is_half_frozen_keeps_the_other_half(frozen: str, folder: Path) -> None:
    model = FederatedCLIPModel(str(folder), class_names=NAMES, templates=TEMPLATES)
    nn.init.normal_(model.classifier.bias)
    getattr(model.classifier, frozen).requires_grad_(False)
    lora = CLIPLoRAWrapper(model, LoRAConfig(r=3, lora_dropout=0.0), towers="vision").apply()
    make_quick(model)
    states = clients(lora)
    expected = [alone(lora, state, own) for state, own in zip(states, tickets(), strict=True)]
    assert f"other/self.classifier.{frozen}" not in expected[0]
    for one, other in zip(together(lora, seated(lora, states), tickets()), expected, strict=True):
        compare(one, other)


def test_after_an_error_nothing_stays_bound(folder: Path) -> None:
    lora = quick(folder, bias="all", train_norm=True, lora_dropout=0.3)
    states = clients(lora)
    stack = seated(lora, states)
    expected = alone(lora, states[0], tickets()[0])
    inside = []

    def step() -> None:
        with stack.together(tickets()):
            inside.extend(bound(lora))
            lora.federated(torch.cat([batch(seat)[0] for seat in SEATS])[:, :1])  # of one colour

    with pytest.raises(RuntimeError):
        step()
    assert {"", "classifier", "draws"} <= set(inside)
    assert bound(lora) == []
    compare(alone(lora, states[0], tickets()[0]), expected, close=0)
    for seat, state in enumerate(states):
        assert same(stack.take(seat), state)


def test_a_residual_is_common_to_all(folder: Path) -> None:
    lora = quick(folder)
    generator = torch.Generator().manual_seed(0)
    R = {
        name: Residual(0.1 * torch.randn(weight.shape, generator=generator))
        for name, weight in lora.base_weights().items()
    }
    without = together(lora, seated(lora, clients(lora)), tickets())[0]["logits"]
    lora.load(replace(lora.state(), residual=R))
    states = clients(lora)
    expected = [alone(lora, state, own) for state, own in zip(states, tickets(), strict=True)]
    found = together(lora, seated(lora, states), tickets())
    assert (found[0]["logits"] - without).abs().max() > 1e-2
    for one, other in zip(found, expected, strict=True):
        compare(one, other)


# What cannot be.


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_there_is_nothing_against_it(settings: dict[str, Any], folder: Path) -> None:
    assert why_not(quick(folder, **settings)) == ""


def test_without_lora_nothing_is_shared(folder: Path) -> None:
    lora = quick(folder, enabled=False)
    reason = "without LoRA (model.lora.enabled=false) clients have nothing frozen to share"
    assert why_not(lora) == reason
    with pytest.raises(FedloraError) as error:
        LaneStack(lora, 2)
    assert str(error.value) == f"trainer.lanes must be 1 here: {reason}."


def test_a_parameter_that_no_layer_of_lanes_holds_is_named(tmp_path: Path) -> None:
    lora = quick(make_siglip(tmp_path / "siglip"), bias="all")
    conv, pooling = "embeddings.patch_embedding.bias", "head.attention.in_proj_bias"
    ending = " is trained, of which lanes cannot have one each"
    assert why_not(lora) == f"logit_bias{ending}"
    for name in ("logit_bias", f"vision_model.{conv}"):
        del lora.parameters["other"][name]
    assert why_not(lora) == f"vision_model.{pooling}{ending}"
    with pytest.raises(FedloraError, match=r"must be 1 here: vision_model\.head\.attention"):
        LaneStack(lora, 2)


def test_siglip_itself_can(tmp_path: Path) -> None:
    lora = quick(make_siglip(tmp_path / "siglip"), lora_dropout=0.3, placement="all")
    assert lora.federated.preprocess.size == SIZE
    states = clients(lora)
    expected = [alone(lora, state, own) for state, own in zip(states, tickets(), strict=True)]
    for one, other in zip(together(lora, seated(lora, states), tickets()), expected, strict=True):
        compare(one, other)


def test_a_model_that_was_not_made_quick_is_named(folder: Path) -> None:
    lora = adapted(folder)
    first = next(iter(lora.layers))
    assert why_not(lora) == f"{first} is trained, of which lanes cannot have one each"


def test_running_statistics_would_be_mixed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = quick(folder)
    monkeypatch.setattr(lora, "has_statistics", lambda: True)
    assert why_not(lora) == "the model keeps running statistics, which clients would mix"
