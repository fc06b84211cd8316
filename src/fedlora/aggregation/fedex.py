"""FedEx-LoRA: what averaging the factors loses is served beside them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from fedlora.aggregation.base import ProductMean, WeightedMean
from fedlora.state import AdapterState, ClientUpdate, Round


class FedExLoRA(WeightedMean):
    """The means of A and B, and a residual that makes the served weight exact.

    Per layer, ``sum_k p_k s B_k A_k - s (mean B)(mean A)`` is added to the frozen weight on the
    server and on every client, and accumulates over rounds (Singhal et al., "FedEx-LoRA: Exact
    Aggregation for Federated and Efficient Fine-Tuning", ACL 2025, arXiv 2410.09432, equations
    10 to 14). It travels down with the factors and is counted with them.
    """

    def aggregate(
        self, server: AdapterState, updates: Iterable[ClientUpdate], rnd: Round
    ) -> AdapterState:
        """The means with ``server.residual`` plus this round's loss; any ``update`` order."""
        products = ProductMean()
        mean = super().aggregate(server, products.watch(updates), rnd)
        residual = dict(server.residual)
        for name, lost in products.minus(mean).items():
            old = residual.get(name)
            new = lost if old is None else old.to(lost.U.dtype).add(lost)
            residual[name] = new.to(mean.A[name].dtype)
        return replace(mean, residual=residual)
