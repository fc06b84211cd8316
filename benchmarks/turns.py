"""Runs that are open at the same time and take turns round by round, and their ratios.

So all of them meet the same noise. Evaluation is off; what counts is ``time/round_s`` of
``metrics.csv``: from the choice of clients until the averaged adapter is in the model.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from from_config import FromConfig
from round import BareLoop, _rows
from torch import Tensor

from fedlora.callbacks.base import FederatedCallback
from fedlora.state import AdapterState
from fedlora.trainer import FederatedTrainer

T = TypeVar("T")
Work = list[tuple[int, list[Tensor]]]  # of each client its weight and the rows of its batches


class Run:
    """A run of fedlora that has played its first round, which warms up, and goes on when asked.

    Attributes:
        trainer: what plays it.
        first: the adapter after the first round.
    """

    def __init__(self, trainer: FederatedTrainer) -> None:
        self.trainer = trainer
        self.first = trainer.server.adapter

    def play(self) -> float:
        """Play a round; returns its seconds."""
        self.trainer.rounds.play()
        return float(self.trainer.server.history[-1]["time/round_s"] or 0)

    def work(self) -> Work:
        """What the next round will be made of."""
        trainer = self.trainer
        rnd = trainer.rounds.round(trainer.server.round_idx)
        return [(c.num_samples, _rows(trainer, c, rnd)) for c in trainer.rounds.clients]


class Bare:
    """The rounds of a run once more, in a bare PyTorch loop."""

    def __init__(self, run: Run) -> None:
        trainer = run.trainer
        model, data = trainer.lightning_module, trainer.datamodule
        self._run = run
        self._loop = BareLoop(model, data, trainer.server.adapter)
        self._loop.play(run.work())  # warms up

    def play(self) -> float:
        """Play a round; returns its seconds."""
        work = self._run.work()
        began = time.perf_counter()
        self._loop.play(work)
        return time.perf_counter() - began


class _HandOver(FederatedCallback):
    """Calls something when the rounds of a run are over, before it is closed."""

    def __init__(self, then: Callable[[], None]) -> None:
        self._then = then

    def on_train_end(self, trainer: FederatedTrainer, pl_module: Any) -> None:
        self._then()


def with_runs(ways: Mapping[str, Sequence[str]], body: Callable[[dict[str, Run]], T]) -> T:
    """Open runs of different settings inside one another, and do something while all are open.

    Args:
        ways: name -> what follows ``fedlora fit``.
        body: is given all runs by name.

    Returns:
        What ``body`` returns.
    """
    runs: dict[str, Run] = {}
    results: list[T] = []

    def open_next(left: list[str]) -> None:
        if not left:
            gc.freeze()  # as fit does, which of these runs only the first one did
            results.append(body(runs))
            return
        name, *rest = left
        root = Path(folder) / str(len(runs))
        built = FromConfig(
            *ways[name], "--trainer.max_rounds=1", f"--trainer.default_root_dir={root}"
        )

        def then() -> None:
            runs[name] = Run(built.trainer)
            open_next(rest)

        built.trainer.callbacks.append(_HandOver(then))
        built.fit()

    with tempfile.TemporaryDirectory() as folder:
        open_next(list(ways))
    return results[0]


def take_turns(players: Mapping[str, Callable[[], float]], turns: int) -> dict[str, list[float]]:
    """What each returns in each turn; the order is reversed every other time."""
    found: dict[str, list[float]] = {name: [] for name in players}
    for turn in range(turns):
        for name in list(players) if turn % 2 == 0 else list(reversed(players)):
            found[name].append(players[name]())
    return found


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Within turns: the median, the least and the most; and that of the fastest."""
    each = [one / other for one, other in zip(above, below, strict=True)]
    return {
        "median": median(each),
        "least": min(each),
        "most": max(each),
        "fastest": min(above) / min(below),
    }


def said(found: Mapping[str, float]) -> str:
    """A ratio as tables have it."""
    return (
        f"{found['median']:.3f} ({found['least']:.3f} to {found['most']:.3f}), "
        f"of the fastest {found['fastest']:.3f}"
    )


def target(text: str, found: Mapping[str, float], most: float) -> dict[str, Any]:
    """A ratio beside what it may be at most, printed with PASS or MISS."""
    passed = found["median"] <= most
    print(f"  {'PASS' if passed else 'MISS'}  {text}: {said(found)}; at most {most:g}")
    return {"text": text, "ratio": dict(found), "most": most, "passed": passed}


def apart(one: AdapterState, other: AdapterState) -> float:
    """The largest difference of an entry of two adapters, head included."""
    tensors = dict(other.tensors())
    return max(float((tensor - tensors[name]).abs().max()) for name, tensor in one.tensors())


def numbers(text: str) -> list[int]:
    """A comma-separated option."""
    return [int(part) for part in text.split(",")]
