from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fedlora.distributed.world import World
from fedlora.engines.rows import Rows, add_gradients


class Pretended(World):
    """One of two processes: what the other has is known beforehand."""

    def __init__(self, rank: int, other: list[float] | None = None) -> None:
        super().__init__(rank, 2)
        self.other = other

    def add_up(self, tensor: torch.Tensor) -> None:
        assert self.other is not None
        tensor += torch.tensor(self.other, dtype=tensor.dtype)


@pytest.mark.parametrize("total", [0, 1, 2, 3, 7, 32])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_each_row_is_one_process_s(total: int, size: int) -> None:
    batch = {"label": torch.arange(total), "image": torch.arange(total * 2.0).view(total, 2)}
    parts: list[Any] = [Rows.of(batch, World(rank, size)) for rank in range(size)]
    assert [part.total for part in parts] == [total] * size
    labels = torch.cat([part.cut(batch)["label"] for part in parts])
    assert labels.tolist() == list(range(total))
    counts = [len(part.cut(batch)["image"]) for part in parts]
    assert max(counts) - min(counts) <= 1
    if total:
        assert counts[0]  # where the display is


def test_alone_there_are_no_parts() -> None:
    assert Rows.of({"label": torch.ones(3)}, None) is None


def test_gradients_are_added_up_and_absent_ones_stay_so() -> None:
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), (1,), (2,))]
    parameters[0].grad = torch.ones(2, 2)
    # The other process has one of the second parameter, and nobody of the third.
    add_gradients(parameters, Pretended(0, [1, 2, 3, 4, 5, 0, 0, 1, 1, 0]))
    found = [None if p.grad is None else p.grad.tolist() for p in parameters]
    assert found == [[[2, 3], [4, 5]], [5], None]


def test_a_process_without_rows_gets_the_others_gradients() -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    add_gradients(parameters, Pretended(1, [1, 2, 0, 1, 0]))
    assert parameters[0].grad is not None
    assert parameters[0].grad.tolist() == [1, 2]
    assert parameters[1].grad is None
