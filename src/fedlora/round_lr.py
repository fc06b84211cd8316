"""The learning rate of all clients over the rounds of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from fedlora.errors import FedloraError

Schedule = Literal["constant", "cosine", "step"]


@dataclass(frozen=True)
class RoundLR:
    """What the clients' learning rates are multiplied with, round by round.

    A client's optimizer starts anew in each round, so that a schedule within a client sees one
    round only. This one is over rounds: in a round all steps of all clients have the same factor.
    Cosine is that of Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts"
    (ICLR 2017, arXiv 1608.03983), without restarts.

    Args:
        schedule: ``constant``; ``cosine``, half a cosine from 1 to ``floor``; or ``step``, a drop
            to ``gamma`` of what it was after every ``every`` rounds.
        warmup_rounds: rounds of linear warm-up before the schedule starts: the factor is
            1 / (warmup_rounds + 1) in the first and 1 in the round after the last of them.
        rounds: cosine: the round, counted from 0 and with the warm-up, from which the factor is
            ``floor``; None: ``trainer.max_rounds``.
        floor: cosine: the last factor, from 0 to 1.
        every: step: rounds between drops; it must be given.
        gamma: step: factor of a drop, above 0, at most 1.
    """

    schedule: Schedule = "constant"
    warmup_rounds: int = 0
    rounds: int | None = None
    floor: float = 0.0
    every: int | None = None
    gamma: float = 0.1

    def validate(self) -> None:
        """Refuse values out of range and those of another schedule.

        Raises:
            FedloraError: names the field.
        """
        self._check_owners()
        # Ranges are asked for, not their opposites: NaN lies in none.
        rounds = math.inf if self.rounds is None else self.rounds
        for name, fits, must in (
            ("warmup_rounds", self.warmup_rounds >= 0, "at least 0"),
            ("rounds", rounds > self.warmup_rounds, f"above warmup_rounds={self.warmup_rounds}"),
            ("floor", 0 <= self.floor <= 1, "from 0 to 1"),
            ("every", self.every is None or self.every >= 1, "at least 1"),
            ("gamma", 0 < self.gamma <= 1, "above 0 and at most 1"),
        ):
            if not fits:
                got = getattr(self, name)
                raise FedloraError(f"trainer.round_lr.{name} must be {must}, got {got}.")

    def _check_owners(self) -> None:
        if self.schedule not in get_args(Schedule):
            raise FedloraError(
                f"trainer.round_lr.schedule must be one of {', '.join(get_args(Schedule))}, got "
                f"{self.schedule}."
            )
        usual = RoundLR()
        for name, owner in (
            ("rounds", "cosine"),
            ("floor", "cosine"),
            ("every", "step"),
            ("gamma", "step"),
        ):
            value = getattr(self, name)
            if owner != self.schedule and value != getattr(usual, name):
                raise FedloraError(
                    f"trainer.round_lr.{name}={value} belongs to schedule={owner}, the schedule is "
                    f"{self.schedule}. Set trainer.round_lr.schedule={owner}, or leave {name} out."
                )
        if self.schedule == "step" and self.every is None:
            raise FedloraError(
                "trainer.round_lr.every must be given with schedule=step: the number of rounds "
                "between drops."
            )

    def horizon(self, max_rounds: int) -> int | None:
        """The round from which cosine stays at its floor; None for other schedules.

        A run that goes on with more rounds has to keep the horizon it began with, or its rounds so
        far would have had other learning rates.

        Args:
            max_rounds: rounds of the run, ``trainer.max_rounds``.
        """
        if self.schedule != "cosine":
            return None
        return max_rounds if self.rounds is None else self.rounds

    def factor(self, idx: int, max_rounds: int) -> float:
        """What all clients' learning rates are multiplied with in a round.

        Args:
            idx: rounds completed before this one, from 0.
            max_rounds: rounds of the run; or the :meth:`horizon` that it began with.

        Returns:
            A factor in [0, 1].
        """
        since = idx - self.warmup_rounds
        if since < 0:
            return (idx + 1) / (self.warmup_rounds + 1)
        if self.schedule == "step" and self.every is not None:
            return float(self.gamma ** (since // self.every))
        horizon = self.horizon(max_rounds)
        if horizon is None:
            return 1.0
        span = horizon - self.warmup_rounds
        # First, as the warm-up can fill a short run: then there is no span to divide by.
        if since >= span:
            return self.floor
        return self.floor + (1 - self.floor) / 2 * (1 + math.cos(math.pi * since / span))
