"""RoLoRA: the two factors take turns, so that averaging is exact and both are learned."""

from __future__ import annotations

from dataclasses import replace

from fedlora.aggregation.base import WeightedMean, beside
from fedlora.state import AdapterState, Client, Part, Round


class RoLoRA(WeightedMean):
    """B is trained and averaged in even rounds, A in odd ones; the other factor is frozen.

    The frozen factor is the same on all clients, so the mean of the products is the product of the
    means, as in FFA-LoRA, but A is learned too (Chen et al., "Robust Federated Finetuning of LLMs
    via Alternating Optimization of LoRA", NeurIPS 2025, arXiv 2502.01755). Rounds count from 0: B
    comes first, since it starts from zero and A has no gradient until it has moved. Half of the
    factors travel up.
    """

    exact = True

    def trainable(self, rnd: Round) -> frozenset[Part]:
        """B in even rounds, A in odd ones, and the head in all."""
        return frozenset({"A" if rnd.idx % 2 else "B", "other"})

    def distribute(self, server: AdapterState, client: Client, rnd: Round) -> AdapterState:
        """The head, and the factors averaged since the client was last sent anything.

        For one that played in the round before that is one factor, the one now frozen; for one that
        never played nothing before round 0, whose factors it knows from the seed.
        """
        stale: set[Part] = {"other"}
        for idx in range(client.last_round or 0, rnd.idx):
            stale |= self.shared(replace(rnd, idx=idx))
        return beside(server.only(stale), server, client, rnd)
