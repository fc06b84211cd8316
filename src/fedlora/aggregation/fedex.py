"""FedEx-LoRA: what averaging the factors loses is served beside them."""

from __future__ import annotations

from collections.abc import Iterable

from fedlora.aggregation.base import ProductMean, WeightedMean, check_least, grown, product
from fedlora.low_rank import svd, truncate
from fedlora.state import AdapterState, ClientUpdate, Residual, Round


class FedExLoRA(WeightedMean):
    """The means of A and B, and a residual that makes the served weight exact.

    Per layer, ``sum_k p_k s B_k A_k - s (mean B)(mean A)`` is added to the frozen weight on the
    server and on every client, and accumulates over rounds (Singhal et al., "FedEx-LoRA: Exact
    Aggregation for Federated and Efficient Fine-Tuning", ACL 2025, arXiv 2410.09432). It
    travels down with the factors and is counted with them. Its rank grows by up to (K - 1) r a
    round for K clients: thin until the matrix itself is smaller.

    Args:
        residual_rank: keep only the best approximation of this rank of what each round adds; None
            keeps all. No longer exact: ``agg/error`` says by how much.
    """

    factors = "corrected"

    def __init__(self, residual_rank: int | None = None) -> None:
        check_least("residual_rank", residual_rank, 1)
        self.residual_rank = residual_rank
        self.exact = residual_rank is None

    def aggregate(
        self, server: AdapterState, updates: Iterable[ClientUpdate], rnd: Round
    ) -> AdapterState:
        """The means with ``server.residual`` plus this round's loss; any ``update`` order."""
        products = ProductMean()
        mean = super().aggregate(server, products.watch(updates), rnd)
        lost = {
            name: self._cut(change, mean, name) for name, change in products.minus(mean).items()
        }
        return grown(server, mean, lost)

    def _cut(self, change: Residual, mean: AdapterState, name: str) -> Residual:
        # Where clients hardly differ, the rounding of the means would fill as many columns again.
        served = float(svd(product(mean, name))[1][0])
        return truncate(change, mean.A[name].dtype, self.residual_rank, beside=served)
