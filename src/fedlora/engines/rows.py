"""The rows of a batch spread over processes that train the same client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fedlora.distributed.world import World
    from fedlora.engines.lane import Batch, Lane


@dataclass(frozen=True)
class Rows:
    """Which rows of a batch are a process's own.

    Attributes:
        start: the first.
        stop: the one behind the last.
        total: rows of the whole batch.
    """

    start: int
    stop: int
    total: int

    @classmethod
    def of(cls, batch: Batch, world: World | None) -> Rows | None:
        """This process's part of a batch; None where it has all of it.

        Parts differ by one row at most; a batch smaller than the number of processes leaves the
        last of them without any.
        """
        if world is None:
            return None
        total = len(batch["label"])
        start, stop = (-(-total * rank // world.size) for rank in (world.rank, world.rank + 1))
        return cls(start, stop, total)

    def cut(self, batch: Batch) -> Batch:
        """These rows of a batch."""
        return {name: value[self.start : self.stop] for name, value in batch.items()}


def add_gradients(parameters: Sequence[nn.Parameter], world: World) -> None:
    """Add up the gradients over the processes, in one message.

    Each process's are of its own rows, divided by the rows of the whole batch, so their sum is the
    gradient of the batch's mean whatever the parts. A parameter that none of them reached keeps
    None, which optimizers pass over.

    Args:
        parameters: float32, on one device, the same ones in every process.
        world: the processes.
    """
    reached = [parameter.grad is not None for parameter in parameters]
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flags = torch.tensor(reached, dtype=parts[0].dtype).to(parts[0].device)
    flat = torch.cat([*(part.flatten() for part in parts), flags])
    world.add_up(flat)
    if not all(reached):  # else there is no need to wait for the device
        reached = [count > 0 for count in flat[-len(parts) :].tolist()]
    totals: tuple[Tensor, ...]
    totals = torch.split(flat, [*(part.numel() for part in parts), len(parts)])
    for parameter, total, wanted in zip(parameters, totals[:-1], reached, strict=True):
        parameter.grad = total.view_as(parameter) if wanted else None


def add_figures(lane: Lane, world: World) -> None:
    """Add up over the processes what a lane counted."""
    seen = torch.full_like(lane.loss, lane.seen)
    figures = torch.stack([lane.loss, lane.correct.double(), seen])
    world.add_up(figures)
    lane.loss, lane.correct = figures[0], figures[1].round().long()
    lane.seen = int(figures[2])
