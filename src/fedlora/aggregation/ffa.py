"""FFA-LoRA: one factor frozen, so that averaging is exact."""

from __future__ import annotations

from fedlora.aggregation.base import WeightedMean
from fedlora.state import Part, Round


class FFALoRA(WeightedMean):
    """A stays as it was drawn from the seed; B is trained, sent and averaged.

    With one A for all, the mean of B A is (mean of B) A, so no aggregation error remains, and half
    of the factors travel (Sun et al., "Improving LoRA in Privacy-preserving Federated Learning",
    ICLR 2024, arXiv 2403.12313, section 4). B must be the trained one: it starts from zero, and
    frozen at zero it would leave A without a gradient.
    """

    exact = True

    def trainable(self, rnd: Round) -> frozenset[Part]:
        """Everything but A."""
        return frozenset({"B", "other"})
