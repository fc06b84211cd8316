"""HetLoRA: clients of unequal ranks, padded with zeros and averaged."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import torch

from fedlora.aggregation.base import WeightedMean, product
from fedlora.errors import FedloraError
from fedlora.state import AdapterState, ClientUpdate, Round


class HetLoRA(WeightedMean):
    """The mean of A and the mean of B, each padded with zeros to the server's rank.

    A slot that few clients hold shrinks (Cho et al., "Heterogeneous LoRA for Federated Fine-tuning
    of On-Device Foundation Models", EMNLP 2024, arXiv 2401.06432). B_k counts times s_k / s, so a
    padded client serves what it served. The paper's regulariser that prunes ranks is not built.

    Args:
        weighting: ``norm``: clients weigh ``||s_k B_k A_k||_F`` over all layers together; by
            samples where that is 0 for all. ``samples``: as in FedAvg.
    """

    mixed_ranks = True

    def __init__(self, weighting: Literal["norm", "samples"] = "norm") -> None:
        if weighting not in ("norm", "samples"):
            raise FedloraError(f"aggregator.weighting must be norm or samples, got {weighting!r}.")
        self.weighting = weighting

    def aggregate(
        self, server: AdapterState, updates: Iterable[ClientUpdate], rnd: Round
    ) -> AdapterState:
        """The mean of the padded factors; a slot that nobody of the round holds keeps its A."""
        mean = super().aggregate(server, (self._padded(server, u) for u in updates), rnd)
        A = dict(mean.A)
        for name, B in mean.B.items():  # a slot that is zero in both would never train again
            dead = ~(A[name].any(1) | B.any(0))
            A[name] = torch.where(dead[:, None], server.A[name], A[name])
        return replace(mean, A=A)

    def _padded(self, server: AdapterState, update: ClientUpdate) -> ClientUpdate:
        payload, weight = update.payload, update.weight
        if weight and self.weighting == "norm":
            weight = _norm(payload) or weight * 2.0**-200  # counts only where all norms are 0
        B = {n: B * (payload.scaling[n] / server.scaling[n]) for n, B in payload.B.items()}
        padded = replace(payload, B=B).padded(server.ranks)
        return replace(update, payload=padded, weight=weight)


def _norm(adapter: AdapterState) -> float:
    """``||s B A||_F`` over all layers: ``||B A||_F^2 = trace((B^T B)(A A^T))``."""
    factors = [(product(adapter, name).U, A.double()) for name, A in adapter.A.items()]
    squared = sum(float(((B.T @ B) * (A @ A.T)).sum()) for B, A in factors)
    return math.sqrt(max(squared, 0.0))  # rounding may leave less than 0
