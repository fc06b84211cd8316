from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedlora.engines.rows import Rows
from fedlora.modules.dropout import Draws, KeyedDropout


def mask(key: int | None, layer: str = "a.b", p: float = 0.5, size: int = 64) -> Tensor:
    dropout = KeyedDropout(p, layer)
    dropout.draws = None if key is None else Draws([key])
    return dropout(torch.ones(size, size))


def test_the_mask_is_a_pure_function_of_key_and_layer() -> None:
    state = torch.get_rng_state()
    first = mask(7)
    torch.manual_seed(99)
    torch.rand(3)
    seeded = torch.get_rng_state()
    assert torch.equal(mask(7), first)
    assert torch.equal(torch.get_rng_state(), seeded)  # torch's own generator does not move
    torch.set_rng_state(state)


def test_another_key_or_layer_is_another_mask() -> None:
    same = (mask(7) == mask(8)).double().mean()
    assert abs(float(same) - 0.5) < 0.05  # independent halves agree in half of 4096 places
    same = (mask(7) == mask(7, layer="a.c")).double().mean()
    assert abs(float(same) - 0.5) < 0.05


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_mean_is_kept_and_the_share_of_zeros_is_p(p: float) -> None:
    count = 512 * 512
    y = mask(3, p=p, size=512)
    zeros = (y == 0).double().mean()
    tolerance = 5 * (p * (1 - p) / count) ** 0.5  # five standard deviations
    assert abs(float(zeros) - p) < tolerance
    assert abs(float(y.double().mean()) - 1) < tolerance / (1 - p)
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 1 / (1 - p)]))


def test_gradients_pass_through_the_same_mask() -> None:
    dropout = KeyedDropout(0.5, "a")
    dropout.draws = Draws([1])
    x = torch.randn(8, 8, requires_grad=True)
    dropout(x).sum().backward()
    assert torch.equal(x.grad, dropout(torch.ones(8, 8)))


def test_nothing_is_dropped_outside_of_training_or_with_p_zero() -> None:
    x = torch.randn(5, 5)
    dropout = KeyedDropout(0.9, "a").eval()
    dropout.draws = Draws([1])
    assert dropout(x) is x
    assert KeyedDropout(0.0, "a")(x) is x


def test_without_a_key_torch_decides() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = mask(None), mask(None)
        assert not torch.equal(first, second)
        torch.manual_seed(0)
        assert torch.equal(mask(None), first)


def test_the_type_of_the_input_is_kept() -> None:
    dropout = KeyedDropout(0.5, "a")
    dropout.draws = Draws([1])
    assert dropout(torch.ones(3, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_part_of_a_batch_has_its_part_of_the_mask() -> None:
    dropout = KeyedDropout(0.5, "layer")
    dropout.draws = Draws([3])
    x = torch.ones(7, 3, 5)
    whole = dropout(x)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)  # the same in another order in memory
    assert torch.equal(dropout(turned), whole)
    parts = []
    for start, stop in ((0, 4), (4, 7)):
        dropout.draws = Draws([3], part=Rows(start, stop, 7))
        parts.append(dropout(x[start:stop]))
        assert torch.equal(dropout(turned[start:stop]), parts[-1])
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole[:3], whole[4:])
    dropout.draws = Draws([3])
    assert not torch.equal(dropout(x[4:7]), parts[1])


@pytest.mark.parametrize("counts", [None, [2, 4]], ids=["equal", "unequal"])
def test_each_lane_has_the_mask_that_it_has_alone(counts: list[int] | None) -> None:
    dropout = KeyedDropout(0.5, "layer")
    x = torch.ones(6, 3, 5)
    dropout.draws = Draws([8, 9], counts)
    together = dropout(x)
    first = 3 if counts is None else counts[0]
    for key, rows in ((8, slice(None, first)), (9, slice(first, None))):
        dropout.draws = Draws([key])
        assert torch.equal(dropout(x[rows]), together[rows])
