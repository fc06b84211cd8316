"""A client's turn in a round: where it starts from, and what comes of it."""

from __future__ import annotations

import time
import traceback
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from fedlora.engines.lane import Lane
from fedlora.errors import FedloraError
from fedlora.personal import Kept
from fedlora.state import AdapterState, Client, ClientUpdate


@dataclass(frozen=True)
class Start:
    """Where a client starts a round from.

    Attributes:
        client: who, as the rule is told.
        sent: what the server knows of it.
        state: all that is loaded: with what the client kept in the place of the server's.
        kept: what stayed with it since it last played.
        down_nbytes: what travelled to it of the adapter.
    """

    client: Client
    sent: AdapterState
    state: AdapterState
    kept: Kept
    down_nbytes: int


# A client's turn as it goes on: yields each lane that is to take all of its steps.
Course: TypeAlias = Generator[Lane, None, tuple[ClientUpdate, Kept]]


@dataclass
class Clock:
    """The seconds that a turn takes beside its steps."""

    spent: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    def stop(self) -> None:
        """Others take their steps."""
        self.spent += time.perf_counter() - self.began

    def go_on(self) -> None:
        """It is the turn's own time again."""
        self.began = time.perf_counter()

    def seconds(self) -> float:
        """What it took until now."""
        return self.spent + time.perf_counter() - self.began


@dataclass(frozen=True)
class Turn:
    """What came of a client's turn.

    Attributes:
        update: what it sends; None where it does not answer.
        kept: whether something was written that stays with it.
        reason: why it does not answer.
        error: likewise, where that is an error.
    """

    update: ClientUpdate | None = None
    kept: bool = False
    reason: str = ""
    error: Exception | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data; of the update only what rank 0 does not know."""
        update = self.update
        if update is None:
            said = [] if self.error is None else [str(self.error), _trace(self.error)]
            return {"reason": self.reason, "error": said}
        return {
            "payload": update.payload.to_dict(),
            "weight": update.weight,
            "extra": dict(update.extra),
            "metrics": dict(update.metrics),
            "num_steps": update.num_steps,
            "down_nbytes": update.down_nbytes,
            "kept": self.kept,
        }

    @classmethod
    def from_dict(cls, plain: dict[str, Any], client: Client, sent: AdapterState) -> Turn:
        """The inverse of :meth:`to_dict`.

        Args:
            plain: of it.
            client: who, as the rule is told.
            sent: what the client started from.
        """
        if "reason" in plain:
            error = None
            if plain["error"]:
                text, trace = plain["error"]
                error = FedloraError(text)
                error.add_note(trace)  # a log shows it
            return cls(reason=plain["reason"], error=error)
        payload, kept = AdapterState.from_dict(plain.pop("payload")), plain.pop("kept")
        return cls(ClientUpdate(client=client, sent=sent, payload=payload, **plain), kept)


def _trace(error: Exception) -> str:
    return "".join(traceback.format_exception(error)).rstrip()
