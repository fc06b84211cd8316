from __future__ import annotations

import math

import pytest

from fedlora import FedloraError, RoundCheckpoint


@pytest.mark.parametrize(
    ("mode", "values", "best"),
    [
        ("max", [0.5, 0.7, 0.7, 0.6], 1),  # the earliest of equals
        ("min", [0.5, 0.7, 0.2, 0.6], 2),
        ("max", [0.5, None, math.nan, 0.4], 0),  # rounds that were not evaluated do not count
    ],
)
def test_the_best_round(mode, values: list[float | None], best: int) -> None:
    callback = RoundCheckpoint("val/acc", mode)
    for number, value in enumerate(values):
        callback.consider({"round": number, "val/acc": value}, "val/acc")
    assert callback.best_round == best
    again = RoundCheckpoint("val/acc", mode)
    again.load_state_dict(callback.state_dict())
    assert (again.best_round, again.best_value) == (best, values[best])


def test_a_mode_that_does_not_exist() -> None:
    with pytest.raises(FedloraError, match="mode should be one of max, min but got 'best'"):
        RoundCheckpoint("val/acc", "best")
