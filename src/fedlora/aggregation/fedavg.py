"""FedAvg on the factors (FedIT)."""

from __future__ import annotations

from fedlora.aggregation.base import WeightedMean


class FedAvg(WeightedMean):
    """The mean of A and the mean of B, weighted by samples.

    FedAvg (arXiv 1602.05629, algorithm 1) of the adapter's state, as FedIT does (arXiv 2305.05644,
    section 3.2). The product of the means is not the mean of the products: what is lost is
    ``sum_k p_k (B_k - mean B)(A_k - mean A)`` per layer, reported as ``agg/error``.
    """
