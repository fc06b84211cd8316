"""What averaging does to the served weights, measured while the updates stream by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fedlora.sampling import derive_seed
from fedlora.state import AdapterState, ClientUpdate, Residual

Names = tuple[str, ...]
K = TypeVar("K")
AT_ONCE = 2**17  # entries of sketches that stay in a CPU's cache
COLUMNS = 32  # of the sketch: a relative error estimated from it is good to some ten percent


@dataclass(frozen=True)
class Figures:
    """What the meter found; None where no layer was watched.

    Attributes:
        error: ``||I - S||_F / ||I||_F`` over all adapted layers together, I the ideal average and
            S what is served.
        effective_rank: of the ideal average of the round's training, ``sum_k p_k s_k B_k A_k``:
            ``(sum sigma_i^2)^2 / sum sigma_i^4`` of its singular values, a mean over the layers. It
            is n for n equal ones, and none for a layer that is zero.
        drift_mean, drift_max: how far a client moved what it serves from what it was sent,
            ``||M_k - M_sent||_F`` with ``M = R + s B A`` over all layers; over clients.
    """

    error: float | None = None
    effective_rank: float | None = None
    drift_mean: float | None = None
    drift_max: float | None = None


class AggregationMeter:
    """Estimates how far a rule is from the ideal average, and what that average is like.

    I is the ideal ``sum_k p_k (R_k + s_k B_k A_k)`` and S what the new adapter serves beside the
    frozen weights, ``R' + s' B' A'``. Both are only ever multiplied with a fixed matrix Z of 32
    columns of seeded signs per layer (E ||M Z||^2 = 32 ||M||^2), so memory does not grow with
    clients, and the estimate of the error is zero, up to rounding, exactly where I = S.
    """

    def __init__(self) -> None:
        self._total = 0.0
        self._products: dict[Names, Tensor] = {}
        self._residuals: dict[str, Tensor] = {}
        self._drifts: list[float] = []
        self._basis: dict[Names, Tensor] = {}
        self._starts: dict[Names, tuple[list[Tensor], Tensor]] = {}
        self._beside: dict[str, tuple[Residual, Tensor]] = {}

    def watch(self, updates: Iterable[ClientUpdate]) -> Iterator[ClientUpdate]:
        """Pass the updates on, adding up their sketches."""
        for update in updates:
            if update.weight:
                self._add(update)
            yield update

    def _add(self, update: ClientUpdate) -> None:
        adapter, sent = update.adapter, update.sent
        moved = 0.0
        for names in _alike(adapter):
            term = self._product(adapter, names)
            _accumulate(self._products, names, term, update.weight)
            # In place: a fresh tensor of this size costs more than what is computed in it.
            moved += _square(term.sub_(self._sent(sent, names))) / COLUMNS
        for name, change in adapter.residual.items():
            if name in adapter.A and name in adapter.B:
                _accumulate(self._residuals, name, self._residual(change, name), update.weight)
        self._total += update.weight
        self._drifts.append(moved**0.5)

    def figures(self, served: AdapterState) -> Figures:
        """What was seen, with the error of what ``served`` serves."""
        if not self._products:
            return Figures()
        lost = ideal = 0.0
        ranks = []
        for name, total in self._sums().items():
            product = total / self._total
            want = product
            if name in self._residuals:
                want = product + self._residuals[name] / self._total
            got = self._product(served, (name,))[0]
            if name in served.residual:
                got = got.add_(self._residual(served.residual[name], name))
            ideal += _square(want)
            lost += _square(got.sub_(want))
            ranks += _participation(product)
        return Figures(
            error=0.0 if ideal == 0.0 else (lost / ideal) ** 0.5,
            effective_rank=sum(ranks) / len(ranks) if ranks else None,
            drift_mean=sum(self._drifts) / len(self._drifts),
            drift_max=max(self._drifts),
        )

    def _sums(self) -> dict[str, Tensor]:
        """By layer: clients of other ranks may have had others side by side."""
        sums: dict[str, Tensor] = {}
        for names, totals in self._products.items():
            for name, total in zip(names, totals, strict=True):
                _accumulate(sums, name, total, 1.0)
        return sums

    def _product(self, adapter: AdapterState, names: Names) -> Tensor:
        """``s B A Z`` of some layers: (layers, out_features, 32), a fresh tensor."""
        A, B = (torch.stack([part[n] for n in names]).float() for part in (adapter.A, adapter.B))
        scales = A.new_tensor([adapter.scaling[name] for name in names])
        return B @ (A @ self._z(names, A.shape[2]) * scales.view(-1, 1, 1))

    def _sent(self, sent: AdapterState, names: Names) -> Tensor:
        factors = [part[name] for part in (sent.A, sent.B) for name in names]
        known = self._starts.get(names)
        # Clients of the server's rank share one.
        if known is None or any(a is not b for a, b in zip(known[0], factors, strict=True)):
            known = self._starts[names] = (factors, self._product(sent, names))
        return known[1]

    def _residual(self, change: Residual, name: str) -> Tensor:
        """``R Z`` of one layer."""
        known = self._beside.get(name)
        if known is None or known[0] is not change:  # clients of a round share one residual
            own = change.to(torch.float32)
            Z = self._z((name,), change.shape[1])[0]
            value = own.U @ Z if own.V is None else own.U @ (own.V @ Z)
            known = self._beside[name] = (change, value)
        return known[1]

    def _z(self, names: Names, columns: int) -> Tensor:
        """Z of some layers, (layers, columns, 32)."""
        if names not in self._basis:
            self._basis[names] = torch.stack([_signs(name, columns) for name in names])
        return self._basis[names]


def _signs(name: str, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed("sketch", name))
    # Signs and not normal values: what a single column adds to the norm is then exact.
    ones = torch.randint(0, 2, (columns, COLUMNS), generator=generator, dtype=torch.int8)
    return ones.float().mul_(2).sub_(1)


def _alike(adapter: AdapterState) -> Iterator[Names]:
    """Layers whose factors have one shape, in their order, as many as are quicker at once."""
    alike: dict[tuple[torch.Size, torch.Size], list[str]] = {}
    for name, A in adapter.A.items():  # in its order: that of a set differs per process
        if name in adapter.B:
            alike.setdefault((A.shape, adapter.B[name].shape), []).append(name)
    for (_, shape), names in alike.items():
        size = max(1, AT_ONCE // (shape[0] * COLUMNS))
        for first in range(0, len(names), size):
            yield tuple(names[first : first + size])


def _accumulate(sums: dict[K, Tensor], name: K, term: Tensor, weight: float) -> None:
    if name not in sums:  # in float64: clients may be many
        sums[name] = torch.zeros_like(term, dtype=torch.float64)
    sums[name].add_(term, alpha=weight)


def _square(sketch: Tensor) -> float:
    """The squared Frobenius norm."""
    return float(torch.linalg.vector_norm(sketch)) ** 2


def _participation(sketch: Tensor) -> list[float]:
    """The effective rank of M from ``M Z``; none where M is zero.

    With G = M^T M and independent z_i, z_j of covariance 1: E (z_i^T G z_j)^2 = sum sigma^4 and
    E z_i^T G z_i z_j^T G z_j = (sum sigma^2)^2, so both are means over the pairs of columns.
    """
    products = sketch.T @ sketch
    norms = products.diagonal()
    pairs = (products.square().sum() - norms.square().sum()).item()
    return [(norms.sum().square() - norms.square().sum()).item() / pairs] if pairs > 0 else []
