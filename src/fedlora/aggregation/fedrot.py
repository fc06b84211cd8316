"""FedRot-LoRA: clients turn their factors towards the server's before the means are taken."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlora.aggregation.base import WeightedMean
from fedlora.errors import FedloraError
from fedlora.state import AdapterState, Client, Round

LEAST = torch.finfo(torch.float32).eps ** 0.5  # turn where rounding leaves R half its digits


class FedRotLoRA(WeightedMean):
    """The means of A and B, which each client first rotates without changing their product.

    ``(B R)(R^T A) = B A`` for every rotation R, so clients that agree may differ in their factors.
    In odd rounds R brings R^T A_k nearest to the A that was sent, in even rounds B_k R to its B:
    ``R = U V^T`` of the SVD of ``A_k A^T`` or ``B_k^T B``, never a reflection ("FedRot-LoRA", ICML
    2026, arXiv 2602.23638). What does not fix R, as the first round's B = 0, turns nothing.

    Args:
        strength: from 0 (no rotation: FedAvg) to 1 (R itself); between them the rotation nearest to
            ``(1 - strength) I + strength R``.
    """

    def __init__(self, strength: float = 1.0) -> None:
        if not 0 <= strength <= 1:
            raise FedloraError(f"aggregator.strength must be from 0 to 1, got {strength}.")
        self.strength = strength

    def upload(
        self, sent: AdapterState, trained: AdapterState, client: Client, rnd: Round
    ) -> AdapterState:
        """What was trained, turned towards what was sent."""
        up = super().upload(sent, trained, client, rnd)
        A, B = dict(up.A), dict(up.B)
        for name in A if self.strength else ():
            own, ref = (A[name].T, sent.A[name].T) if rnd.idx % 2 else (B[name], sent.B[name])
            R = _rotation(own.double(), ref.double(), self.strength)
            A[name] = (R.T @ A[name].double()).to(A[name].dtype)
            B[name] = (B[name].double() @ R).to(B[name].dtype)
        return AdapterState(A, B, up.other, up.scaling)


def _rotation(own: Tensor, ref: Tensor, strength: float) -> Tensor:
    """R (rank, rank) that brings ``own @ R`` near to ``ref``; I where none is best."""
    eye = torch.eye(own.shape[1], dtype=own.dtype)
    full, margin = _nearest(own.T @ ref)
    # Rounding moves the matrix by eps |own| |ref|, and R by that over the margin.
    sure = margin > LEAST * float(own.norm() * ref.norm())
    soft, margin = _nearest((1 - strength) * eye + strength * full)
    return soft if sure and margin > LEAST else eye  # half of a half turn could be either way


def _nearest(matrix: Tensor) -> tuple[Tensor, float]:
    """The nearest rotation and its margin: at 0 it is one of many."""
    left, values, right = torch.linalg.svd(matrix)
    right[-1] *= (sign := torch.linalg.det(left @ right).sign())
    return left @ right, float(values[-2:-1].sum() + sign * values[-1])
