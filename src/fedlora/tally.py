"""What a round's answers say while they stream by, and whether there are enough."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fedlora.errors import FedloraError
from fedlora.sampling import Absence
from fedlora.state import Client, ClientUpdate, Round


class Tally:
    """Adds up the answers of a round.

    Args:
        rnd: the round.
        least: answers without which the round does not count.
    """

    def __init__(self, rnd: Round, least: int = 0) -> None:
        self.rnd = rnd
        self.least = least
        self.up = self.down = 0
        self.clients: list[Client] = []
        self._loss = self._weight = 0.0
        self._error: tuple[Absence, Exception] | None = None

    def miss(self, absence: Absence, error: Exception | None) -> None:
        """Remember the first client that did not answer because of an error."""
        if error is not None and self._error is None:
            # Without its frames, which hold the client's batch and graph.
            self._error = absence, error.with_traceback(None)

    def watch(self, updates: Iterable[ClientUpdate]) -> Iterator[ClientUpdate]:
        """Pass the updates on.

        Raises:
            FedloraError: at the end, where they are too few: before a rule commits anything.
        """
        for update in updates:
            self.clients.append(update.client)
            self.up += update.nbytes
            self.down += update.down_nbytes
            self._loss += update.metrics["loss"] * update.client.num_samples
            self._weight += update.client.num_samples
            yield update
        if len(self.clients) < self.least:
            self._refuse()

    def _refuse(self) -> None:
        first, error = self._error or (None, None)
        why = f"; of {first.client}: {first.reason}" if first else ""
        raise FedloraError(
            f"{len(self.clients)} clients answered in round {self.rnd.idx}, fewer than "
            f"trainer.min_clients={self.least}{why}. Mend that, and go on with fit --ckpt_path "
            "last; or start a new run with a lower trainer.min_clients."
        ) from error

    @property
    def loss(self) -> float | None:
        """Mean training loss over the samples of the clients that answered."""
        return self._loss / self._weight if self._weight else None
