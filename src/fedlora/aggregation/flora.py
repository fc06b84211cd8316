"""FLoRA: the stacked products go into the served weights, and the adapter starts afresh."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from fedlora.aggregation.base import ProductMean, WeightedMean, beside, check_least, grown
from fedlora.low_rank import truncate
from fedlora.sampling import derive_seed
from fedlora.state import PARTS, AdapterState, Client, ClientUpdate, Part, Round


class FLoRA(WeightedMean):
    """Stacks what the clients trained: exact, and their ranks may differ.

    Per layer ``sum_k p_k s_k B_k A_k``, the product of the stacked B_k and p_k s_k A_k, is added to
    what is served beside the frozen weight and travels down. The next round trains a new adapter,
    which clients draw: A from the seed, B zero (Wang et al., "FLoRA: Federated Fine-Tuning Large
    Language Models with Heterogeneous Low-Rank Adaptations", NeurIPS 2024, arXiv 2409.05976).

    Args:
        residual_rank: keep only the best approximation of this rank of what a round adds, which is
            not exact (``agg/error`` says by how much); None keeps all.
    """

    averaged: frozenset[Part] = frozenset({"other"})
    mixed_ranks = True
    factors = "anew"

    def __init__(self, residual_rank: int | None = None) -> None:
        check_least("residual_rank", residual_rank, 1)
        self.residual_rank = residual_rank
        self.exact = residual_rank is None

    def distribute(self, server: AdapterState, client: Client, rnd: Round) -> AdapterState:
        """The head and what the client lacks of the stacks so far."""
        # Which adapter was drawn follows from the round, but after one in which none was.
        drawn = server.added or not rnd.idx
        return beside(server.only({"other"} if drawn else PARTS), server, client, rnd)

    def receive(self, had: AdapterState, down: AdapterState, rnd: Round) -> AdapterState:
        """The stacks that came, and the adapter of this round, drawn here too."""
        got = super().receive(had, down, rnd)
        return got if down.A or not rnd.idx else _fresh(got, got.A, rnd.idx - 1, rnd.seed)

    def aggregate(
        self, server: AdapterState, updates: Iterable[ClientUpdate], rnd: Round
    ) -> AdapterState:
        """The head's mean, the residual with every ``update`` in it, and a new adapter."""
        products = ProductMean()
        mean = super().aggregate(server, products.watch(updates), rnd)
        stacks = {
            name: truncate(stack, mean.A[name].dtype, self.residual_rank)
            for name, stack in products.mean().items()
        }
        return grown(server, _fresh(mean, stacks, rnd.idx, rnd.seed), stacks)


def _fresh(state: AdapterState, names: Iterable[str], idx: int, seed: int) -> AdapterState:
    """A new adapter in these layers: A uniform within 1 / sqrt(in_features), B zero."""
    A, B = dict(state.A), dict(state.B)
    for name in names:
        generator = torch.Generator().manual_seed(derive_seed(seed, "flora", idx, name))
        bound = A[name].shape[1] ** -0.5
        A[name] = torch.empty_like(A[name]).uniform_(-bound, bound, generator=generator)
        B[name] = torch.zeros_like(B[name])
    return replace(state, A=A, B=B)
