"""FlexLoRA: the mean of the products, cut to a rank by its singular values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from fedlora import low_rank
from fedlora.aggregation.base import ProductMean, WeightedMean
from fedlora.errors import FedloraError
from fedlora.state import AdapterState, ClientUpdate, Part, Round


class FlexLoRA(WeightedMean):
    """The best approximation of the ideal update that the rank allows; ranks may differ.

    Per layer ``sum_k p_k s_k B_k A_k = U S V^T``; A becomes the first rows of V^T and s B the first
    columns of U S, as many for each client as its rank (Bai et al., "Federated Fine-tuning of Large
    Language Models under Heterogeneous Tasks and Client Resources", NeurIPS 2024, arXiv
    2402.11505). Lost is ``sqrt(sum sigma^2)`` over the singular values that are left out.

    Args:
        energy: keep only the fewest singular values that hold this share of ``sum sigma^2``, above
            0 and up to 1 (FLoRIST, MLSys 2026, arXiv 2506.09199); None: all that the rank allows.
            The others' slots get B = 0, travel all the same, and go on training.
    """

    mixed_ranks = True
    factors = "anew"
    averaged: frozenset[Part] = frozenset({"other"})

    def __init__(self, energy: float | None = None) -> None:
        if energy is not None and not 0 < energy <= 1:
            raise FedloraError(f"aggregator.energy must be above 0 and at most 1, got {energy}.")
        self.energy = energy

    def aggregate(
        self, server: AdapterState, updates: Iterable[ClientUpdate], rnd: Round
    ) -> AdapterState:
        """The factors of the mean product at the server's rank, and the mean of the rest."""
        products = ProductMean()
        mean = super().aggregate(server, products.watch(updates), rnd)
        A, B = dict(server.A), dict(server.B)
        for name, change in products.mean().items():
            old, scaling = server.A[name], server.scaling[name]
            left, values, right = low_rank.svd(change)
            _, new = low_rank.factors(left, self._kept(values), right, len(old), scaling)
            B[name] = new.to(old.dtype)
            # A slot without a direction keeps its A: zero in both, it would never train again.
            A[name] = torch.cat([right[: len(old)].to(old.dtype), old[len(right) :]])
        return replace(mean, A=A, B=B)

    def _kept(self, values: Tensor) -> Tensor:
        if self.energy is None:
            return values
        reached = values.square().cumsum(0)
        fewest = int((reached < self.energy * reached[-1]).sum()) + 1
        return torch.cat([values[:fewest], torch.zeros_like(values[fewest:])])
