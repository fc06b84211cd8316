"""Which round was best, and keeping it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from fedlora.callbacks.base import FederatedCallback, Row
from fedlora.errors import FedloraError

if TYPE_CHECKING:
    from fedlora.modules.classifier import CLIPLoRAClassifier
    from fedlora.trainer import FederatedTrainer


class RoundCheckpoint(FederatedCallback):
    """Keeps ``checkpoints/best.ckpt``, the round with the best value of a metric.

    The earliest of equal rounds counts. ``last.ckpt`` is written by the trainer, whatever is here.

    Args:
        monitor: a column of ``metrics.csv`` that is not of the test set; None: ``val/acc``, or
            ``clients/acc_mean`` where each client has a model of its own.
        mode: whether larger (``max``) or smaller (``min``) is better.

    Raises:
        FedloraError: for another mode, or a metric of the test set.
    """

    def __init__(self, monitor: str | None = None, mode: Literal["max", "min"] = "max") -> None:
        if mode not in ("max", "min"):
            raise FedloraError(f"mode should be one of max, min but got {mode!r}.")
        if monitor is not None and monitor.startswith("test/"):
            raise FedloraError(
                f"monitor must not be of the test set, got {monitor!r}. Use val/acc."
            )
        self.monitor = monitor
        self.mode = mode
        self.best_value: float | None = None
        self.best_round: int | None = None

    def consider(self, row: Row, monitor: str) -> None:
        """Remember a row that is better than all before in the column ``monitor``."""
        value = row.get(monitor)
        if value is None or math.isnan(value):
            return
        best = self.best_value
        if best is None or (value > best if self.mode == "max" else value < best):
            self.best_value, self.best_round = value, int(row["round"] or 0)

    def on_round_evaluated(
        self, trainer: FederatedTrainer, pl_module: CLIPLoRAClassifier, row: Row
    ) -> None:
        """Compare, before the checkpoint that holds :meth:`state_dict` is written."""
        self.consider(row, self.monitor or trainer.rounds.monitor)

    def on_round_end(
        self, trainer: FederatedTrainer, pl_module: CLIPLoRAClassifier, row: Row
    ) -> None:
        """Give the checkpoint just written the name ``best.ckpt`` where it is the best.

        Called again on resume, since a kill may have come between the two.
        """
        if self.best_round == row["round"]:
            trainer.keep_as_best()

    def state_dict(self) -> dict[str, Any]:
        """The best so far."""
        return {"best_value": self.best_value, "best_round": self.best_round}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from it."""
        self.best_value, self.best_round = state_dict["best_value"], state_dict["best_round"]
