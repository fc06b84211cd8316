"""A client while it trains."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedlora.state import Client

if TYPE_CHECKING:
    from fedlora.callbacks.objective import Objective
    from fedlora.modules.lane_memory import Seat

Batch = dict[str, Tensor]
Window = Iterator[tuple[Batch, int]]  # the batches of an optimizer step, each with their number


@dataclass
class Lane:
    """One client while it trains.

    Attributes:
        client: who.
        parameters: the leaves that it trains, by name.
        optimizer: fresh for this round; where clients share steps, parameters that lie side by side
            may be one in it.
        seat: its place among the clients that share steps; None where it trains the model's own
            parameters.
        room: likewise, its values and gradients.
        step: optimizer steps taken.
        loss: sum of the samples' losses, float64, on the device.
        correct: samples classified right, on the device.
        seen: samples seen.
        seconds: that its steps took, its share of those that it took with others.
        objectives: what changes its gradients, or looks at how it went.
        anchor: of the parameters that the server averages, its values at the start, on the device.
        received: what came for the objectives beside the adapter.
        extra: of the objectives, to travel to the server beside the adapter.
        memory: what the client remembers for the objectives; they replace values, edit none.
        scratch: the objectives' own, for as long as the lane lasts.
        own: whether it trains the client's own model beside the common one.
        key: what its dropout masks are drawn from.
        windows: the batches of the steps to come.
        left: steps to come.
        scaler: its loss scale, under 16-mixed.
    """

    client: Client
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    objectives: Sequence[Objective] = ()
    anchor: Mapping[str, Tensor] = field(default_factory=dict)
    received: Mapping[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)
    scratch: dict[str, Tensor] = field(default_factory=dict)
    own: bool = False
    seat: int | None = None
    room: Seat | None = None
    step: int = 0
    loss: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    correct: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    seen: int = 0
    seconds: float = 0.0
    key: int = 0
    windows: Iterator[Window] = field(default_factory=lambda: iter(()))
    left: int = 0
    scaler: Any = None

    def metrics(self) -> dict[str, float]:
        """Mean training loss and accuracy over the samples seen."""
        count = max(self.seen, 1)
        return {"loss": float(self.loss) / count, "acc": float(self.correct) / count}

    def settle_gradients(self) -> None:
        """Let its optimizer find what is in ``grad`` of its parameters."""
        if self.room is not None:
            self.room.settle_gradients()

    def forget_gradients(self) -> None:
        """Get ready for the next step."""
        if self.room is None:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self.room.forget_gradients()

    def scaled(self, loss: Tensor) -> Tensor:
        """A loss as it is to be passed back."""
        scaled: Tensor = loss if self.scaler is None else self.scaler.scale(loss)
        return scaled

    def add(self, losses: Tensor, correct: Tensor) -> None:
        """Count what a step said of its rows, (n,) each."""
        self.loss += losses.detach().sum(dtype=torch.float64)
        self.correct += correct.sum()
        self.seen += len(losses)


def windows(stream: Iterable[Batch], size: int, total: int) -> Iterator[Window]:
    """The batches of each optimizer step, each with the number that its step really has."""
    stream = iter(stream)
    for start in range(0, total, size):
        yield _window(stream, min(size, total - start))


def _window(stream: Iterator[Batch], count: int) -> Window:
    return ((batch, count) for batch in itertools.islice(stream, count))
