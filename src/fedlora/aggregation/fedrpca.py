"""FedRPCA: what is not common to the clients counts more."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from fedlora.aggregation.base import WeightedMean, check_least
from fedlora.state import AdapterState, ClientUpdate, Part, Round


class FedRPCA(WeightedMean):
    """The mean of A and of B, in which what is not common to the clients counts ``beta`` times.

    Per layer and factor the clients' changes are the columns of a matrix M, which robust PCA splits
    into a common low-rank part L and a sparse part S; the server moves by the weighted mean of
    ``L + beta S`` (Jhunjhunwala et al., "FedRPCA: Enhancing Federated LoRA Aggregation Using Robust
    PCA", arXiv 2506.01194). The head is averaged. Keeps all updates of a round in memory. With
    few clients the sparse part holds much of what is common, too: ``beta`` then acts like a server
    step of that length.

    Args:
        beta: weight of the sparse part, 1 or above; 1 is FedAvg.
    """

    def __init__(self, beta: float = 2.0) -> None:
        check_least("beta", beta, 1)
        self.beta = beta

    def aggregate(
        self, server: AdapterState, updates: Iterable[ClientUpdate], rnd: Round
    ) -> AdapterState:
        """The means with ``beta - 1`` times the mean sparse parts on top."""
        kept = [update for update in updates if update.weight]
        mean = super().aggregate(server, kept, rnd)
        if not kept or self.beta == 1:
            return mean
        weights = torch.tensor([update.weight for update in kept], dtype=torch.float64)
        more = (self.beta - 1) * weights / weights.sum()

        def moved(part: Part, name: str) -> Tensor:
            start = server.part(part)[name].double()
            M = torch.stack([u.payload.part(part)[name].double() - start for u in kept], -1)
            old = mean.part(part)[name]
            # In the factors' own type: half of the time, and far below the tolerance.
            sparse = sparse_part(M.flatten(0, 1).to(old.dtype)).double() @ more
            return (old.double() + sparse.view_as(old)).to(old.dtype)

        A, B = ({n: moved(part, n) for n in mean.part(part)} for part in ("A", "B"))
        return replace(mean, A=A, B=B)


def sparse_part(M: Tensor, tolerance: float = 1e-4, most: int = 1000) -> Tensor:
    """The S of ``min ||L||_* + lam ||S||_1 with L + S = M``, ``lam = 1 / sqrt(max(M.shape))``.

    By alternating directions (Candes et al., "Robust principal component analysis?", JACM 2011,
    algorithm 1, with a step that is balanced at first). M (rows, columns) is tall: its singular
    values are had from the small Gram matrix. Equal columns have no part particular to one: 0.
    """
    S, dual = torch.zeros_like(M), torch.zeros_like(M)
    if (M - M[:, :1]).abs().max() <= 1e-12 * M.abs().max():
        return S
    step, lam = float(4 * M.abs().mean()), max(M.shape) ** -0.5
    for turn in range(most):
        X = (M - S).add_(dual)  # in place: fresh tensors of this size cost more than the sums
        squares, right = torch.linalg.eigh(X.T @ X)
        shrunk = (1 - step / squares.clamp(min=0).sqrt()).clamp(min=0)
        rest = (M + dual).addmm_(X, (right * shrunk) @ right.T, alpha=-1)
        before, S = S, torch.nn.functional.softshrink(rest, lam * step)
        rest -= S
        missing, moved = torch.dist(rest, dual), torch.dist(S, before)
        dual = rest
        if max(missing, moved) <= tolerance * M.norm():
            break
        factor = 0.5 if missing > 5 * moved else 2.0 if moved > 5 * missing else 1.0
        if turn < 100:  # for ever, it might never settle
            step, dual = step * factor, dual * factor
    return S
