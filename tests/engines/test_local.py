from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from fedlora.engines.lane import Lane
from fedlora.engines.local import LocalLoop, NonFiniteError
from fedlora.state import AdapterState, Client, Round


class Line(nn.Module):
    """y = w x with a squared error, and the little of a classifier that the loop uses."""

    def __init__(self, start: float, optimizer: Any) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([start]))
        self.make = optimizer
        self.keys: list[tuple[int | None, int]] = []
        self.lora = SimpleNamespace(
            load=lambda state: None,
            trainable=lambda: {"other/w": self.w},
            set_dropout_key=lambda key, step=0, rows=None: self.keys.append((key, step)),
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make([self.w])

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> dict[str, torch.Tensor]:
        losses = (self.w * batch["image"] - batch["label"]).square()
        return {"losses": losses, "correct": losses.detach() < 1}


def batches(*values: list[float]) -> Any:
    made = [{"image": torch.ones(len(v)), "label": torch.tensor(v)} for v in values]
    return lambda epoch: iter(made)


def train(loop: LocalLoop, lane: Lane, rnd: Round, per_epoch: int, data: Any) -> None:
    """From start to end."""
    loop.start(lane, rnd, per_epoch, data)
    while lane.left:
        loop.step([lane])
    loop.finish(lane, rnd)


def run(line: Line, data: Any, per_epoch: int, **settings: Any):
    loop = LocalLoop(Fabric(accelerator="cpu", devices=1), line, **settings)
    lane = loop.open(Client(0, 3), Round(0), AdapterState())
    train(loop, lane, Round(0), per_epoch, data)
    return lane


def sgd(lr: float = 0.25) -> Any:
    return lambda groups: torch.optim.SGD(groups, lr=lr)


def test_one_step_by_hand() -> None:
    # d/dw mean((w - y)^2) = 2 (w - mean y) = 2 (0 - 2) = -4; w = 0 + 0.25 * 4 = 1
    line = Line(0.0, sgd())
    lane = run(line, batches([1.0, 3.0]), 1)
    assert line.w.item() == 1.0
    assert lane.step == 1
    assert lane.metrics() == {"loss": (1 + 9) / 2, "acc": 0.0}


def test_accumulated_batches_are_one_step_of_their_mean() -> None:
    # gradients -2 and -6, their mean -4
    line = Line(0.0, sgd())
    lane = run(line, batches([1.0], [3.0]), 2, accumulate=2)
    assert lane.step == 1
    assert line.w.item() == 1.0


def test_a_last_incomplete_window_is_not_shrunk() -> None:
    # first step: mean of -2 and -6 moves w to 1; second: 2 (1 - 5) = -8 alone moves it by 2
    line = Line(0.0, sgd())
    lane = run(line, batches([1.0], [3.0], [5.0]), 3, accumulate=2)
    assert lane.step == 2
    assert line.w.item() == 3.0


def test_clipping_bounds_the_step() -> None:
    line = Line(0.0, sgd(1.0))
    run(line, batches([100.0]), 1, clip=0.5)
    assert line.w.item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "seen"),
    [
        ({"epochs": 2}, 4),
        ({"steps": 3}, 3),
        ({"steps": 5}, 5),
        ({"epochs": 3, "limit_batches": 1}, 3),
        ({"steps": 2, "accumulate": 2}, 4),
    ],
)
def test_how_many_batches_are_seen(settings: dict, seen: int) -> None:
    lane = run(Line(0.0, sgd(0.0)), batches([1.0], [2.0]), 2, **settings)
    assert lane.seen == seen


def test_dropout_keys_differ_by_batch_and_are_taken_back() -> None:
    line = Line(0.0, sgd(0.0))
    run(line, batches([1.0], [2.0], [3.0]), 3, accumulate=2)
    used = [key for key in line.keys if key[0] is not None]
    assert len(set(used)) == len(used) == 3
    assert line.keys[-1][0] is None


def test_not_a_number_is_named_and_dropout_keys_are_taken_back() -> None:
    line = Line(0.0, sgd())
    with pytest.raises(
        NonFiniteError, match="the loss of client 0 became NaN or infinite in round 0"
    ):
        run(line, batches([math.inf]), 1)
    assert line.keys[-1][0] is None
    line = Line(0.0, sgd(math.inf))
    with pytest.raises(NonFiniteError, match="the adapter of client 0"):
        run(line, batches([1.0]), 1)
