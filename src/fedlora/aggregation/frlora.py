"""FRLoRA, federated residual low-rank adaption: rounds add up beside the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedlora.aggregation.base import WeightedMean, beside, product
from fedlora.low_rank import factors, svd
from fedlora.state import AdapterState, Client, ClientUpdate, Residual, Round


class FRLoRA(WeightedMean):
    """Each round's mean is kept beside the weight, and the factors go back to their start.

    That is ``B0 = U sqrt(S / s)``, ``A0 = sqrt(S / s) V^T`` of W's top singular values, beside
    ``W - s B0 A0``; rounds add ``s ((mean B)(mean A) - B0 A0)``, of which ``added`` is what clients
    do not know, ``s (mean B)(mean A)`` (Yan et al., ICLR 2025, openreview e0rQRMUhs7). W's main
    part passes through the adapter: train it with ``lora_dropout`` 0.
    """

    factors = "anew"

    def start(self, server: AdapterState, base: Mapping[str, Tensor], rnd: Round) -> AdapterState:
        """The factors of each weight, and their product less beside it: the same is served."""
        A, B, residual = dict(server.A), dict(server.B), dict(server.residual)
        for name, was in server.A.items():
            left, values, right = svd(Residual(base[name].cpu().double() / server.scaling[name]))
            new = factors(left, values.sqrt(), values.sqrt()[:, None] * right, was.shape[0], 1.0)
            A[name], B[name] = (factor.to(was.dtype) for factor in new)
            residual[name] = _less(residual.get(name), server.scaling[name] * B[name], A[name])
            if server.B[name].any():  # an adapter to go on with is served, too
                residual[name] = residual[name].add(product(server, name).to(was.dtype))
        return replace(server, A=A, B=B, residual=residual, added={})

    def distribute(self, server: AdapterState, client: Client, rnd: Round) -> AdapterState:
        """The head and what the client lacks of the means so far."""
        return beside(server.only({"other"}), server, client, rnd)

    def receive(self, had: AdapterState, down: AdapterState, rnd: Round) -> AdapterState:
        """The residual less A0 and B0, which the client has, with what was added."""
        residual = dict(had.residual)
        for name in down.added:
            residual[name] = _less(residual.get(name), had.scaling[name] * had.B[name], had.A[name])
        return super().receive(replace(had, residual=residual), down, rnd)

    def aggregate(
        self, server: AdapterState, updates: Iterable[ClientUpdate], rnd: Round
    ) -> AdapterState:
        """The head's mean, the residual with each ``update`` in it, and the factors of before."""
        mean = super().aggregate(server, updates, rnd)
        residual, added = dict(server.residual), {}
        for name, A in server.A.items():
            if mean.B[name] is not server.B[name]:  # else nothing was averaged
                added[name] = product(mean, name).to(A.dtype)
                before = _less(residual.get(name), server.scaling[name] * server.B[name], A)
                residual[name] = before.add(added[name])
        return replace(mean, A=server.A, B=server.B, residual=residual, added=added)


def _less(change: Residual | None, B: Tensor, A: Tensor) -> Residual:
    """``change - B A``; without new columns where the first rows of ``change`` are A already."""
    rank, change = A.shape[0], change or Residual(B[:, :0], A[:0])
    if change.V is None or not torch.equal(change.V[:rank], A):
        return Residual(-B, A).add(change)
    return Residual(torch.cat([change.U[:, :rank] - B, change.U[:, rank:]], 1), change.V)
