"""LoRA-FAIR: the mean of B, corrected towards the ideal update."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from fedlora.aggregation.base import ProductMean, WeightedMean, check_least
from fedlora.state import AdapterState, ClientUpdate, Residual, Round


class LoRAFAIR(WeightedMean):
    """The means of A and B, and on B the correction that brings their product nearest.

    Per layer B = mean B + D with the D that minimises ``||dW - (mean B + D)(mean A)||_F^2 + lam
    ||D||_F^2``, ``dW = sum_k p_k (s_k / s) B_k A_k`` (Bian et al., "LoRA-FAIR: Federated LoRA
    Fine-Tuning with Aggregation and Initialization Refinement", ICCV 2025, arXiv 2411.14961). The
    paper compares by cosine similarity and minimises by SGD; here it is the Frobenius norm and its
    closed form, ``D = (dW - (mean B)(mean A)) (mean A)^T ((mean A)(mean A)^T + lam I)^-1``. So it
    is never further from the ideal than FedAvg, and no dearer to send.

    Args:
        lam: holds B near the mean; 0 is the nearest product, large values are FedAvg.
    """

    def __init__(self, lam: float = 0.01) -> None:
        check_least("lam", lam, 0)
        self.lam = lam

    def aggregate(
        self, server: AdapterState, updates: Iterable[ClientUpdate], rnd: Round
    ) -> AdapterState:
        """The means, B corrected for what their product loses."""
        products = ProductMean()
        mean = super().aggregate(server, products.watch(updates), rnd)
        B = dict(mean.B)
        for name, lost in products.minus(mean).items():
            step = _times(lost, self._inverse(mean.A[name])) / server.scaling[name]
            B[name] = (B[name].double() + step).to(B[name].dtype)
        return replace(mean, B=B)

    def _inverse(self, A: Tensor) -> Tensor:
        """``A^T (A A^T + lam I)^-1``, (in_features, rank), float64."""
        left, values, right = torch.linalg.svd(A.double(), full_matrices=False)
        # Below the rounding of A a direction is noise, and dividing by it blows B up without lam.
        noise = torch.finfo(A.dtype).eps * max(A.shape) * values[0]
        gains = torch.where(values > noise, values / (values.square() + self.lam), 0.0)
        inverse: Tensor = (right.T * gains) @ left.T
        return inverse


def _times(change: Residual, matrix: Tensor) -> Tensor:
    return change.U @ (matrix if change.V is None else change.V @ matrix)
