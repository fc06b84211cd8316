"""FedSVD: FFA-LoRA whose frozen A the server chooses anew."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from fedlora.aggregation.base import beside, check_least
from fedlora.aggregation.ffa import FFALoRA
from fedlora.low_rank import factors, svd
from fedlora.state import AdapterState, Client, ClientUpdate, Part, Residual, Round


class FedSVD(FFALoRA):
    """Clients train B with A frozen; the server re-factorises B A by its singular values.

    With ``U S V^T = svd(B A)`` of the mean B, A becomes ``V^T`` and B ``U S``: the product is
    unchanged, so averaging stays exact, and A gets orthonormal rows that follow what was learned
    (Lee et al., "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA",
    NeurIPS 2025, arXiv 2505.12805). A is a function of the averages alone, which keeps differential
    privacy. B travels up; B, and A where it is new, travels down.

    Args:
        period: re-factorise after every so many rounds; 0 never does, which is FFA-LoRA.
    """

    factors = "anew"

    def __init__(self, period: int = 1) -> None:
        check_least("period", period, 0)
        self.period = period

    def _is_due(self, idx: int) -> bool:
        return self.period > 0 and (idx + 1) % self.period == 0

    def distribute(self, server: AdapterState, client: Client, rnd: Round) -> AdapterState:
        """B and the head, and A if it is newer than what the client was last sent."""
        new = any(self._is_due(idx) for idx in range(client.last_round or 0, rnd.idx))
        parts: frozenset[Part] = frozenset({"A", "B", "other"} if new else {"B", "other"})
        return beside(server.only(parts), server, client, rnd)

    def aggregate(
        self, server: AdapterState, updates: Iterable[ClientUpdate], rnd: Round
    ) -> AdapterState:
        """The mean of B, re-factorised where the round is due and an ``update`` had weight."""
        mean = super().aggregate(server, updates, rnd)
        A, B = dict(mean.A), dict(mean.B)
        for name in B if self._is_due(rnd.idx) else ():
            left, values, right = svd(Residual(B[name], A[name]))
            # Nothing was averaged where it is the server's; the vectors of zero are arbitrary.
            if B[name] is server.B[name] or not values.any():
                continue
            new = factors(left, values, right, A[name].shape[0], 1.0)
            A[name], B[name] = (factor.to(A[name].dtype) for factor in new)
        return replace(mean, A=A, B=B)
