"""No federation: what every client reaches alone."""

from __future__ import annotations

from collections.abc import Iterable

from fedlora.aggregation.base import Aggregator
from fedlora.state import AdapterState, Client, ClientUpdate, Part, Round


class LocalOnly(Aggregator):
    """Nothing is averaged and nothing travels: the lower baseline of a federated method.

    Every client keeps A, B and head and goes on from them whenever it plays; the server's adapter
    stays as it started. What counts is how the clients do (``clients/acc_mean``).
    """

    mixed_ranks = True

    def aggregate(
        self, server: AdapterState, updates: Iterable[ClientUpdate], rnd: Round
    ) -> AdapterState:
        """``server`` as it is; ``updates`` is not read here."""
        return server

    def distribute(self, server: AdapterState, client: Client, rnd: Round) -> AdapterState:
        """Nothing."""
        return AdapterState()

    def shared(self, rnd: Round) -> frozenset[Part]:
        """No part."""
        return frozenset()
