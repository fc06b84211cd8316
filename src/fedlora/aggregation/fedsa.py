"""FedSA-LoRA: A is shared, every client keeps its own B."""

from __future__ import annotations

from fedlora.aggregation.base import WeightedMean
from fedlora.state import Part, Round


class FedSALoRA(WeightedMean):
    """A (and the head) is averaged; B is trained too but never leaves its client.

    A learns general knowledge, B what is particular to a client (Guo et al., "Selective
    Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025, arXiv 2410.01463,
    section 3). A client that has not played starts from B = 0; the model of a client is
    W0 + s B_k (mean A), and the global adapter alone serves the base model under the shared head.
    """

    def shared(self, rnd: Round) -> frozenset[Part]:
        """Everything but B."""
        return frozenset({"A", "other"})
