"""The plainest rule for clients of unequal ranks."""

from __future__ import annotations

from dataclasses import replace

from fedlora.aggregation import WeightedMean


class PaddedMean(WeightedMean):
    """The mean of factors that are padded with zeros to the server's ranks."""

    mixed_ranks = True

    def aggregate(self, server, updates, rnd):
        padded = (replace(u, payload=u.payload.padded(server.ranks)) for u in updates)
        return super().aggregate(server, padded, rnd)
