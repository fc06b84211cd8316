"""How far a rule's result is from the ideal average, measured while the updates stream by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from fedlora.sampling import derive_seed
from fedlora.state import AdapterState, ClientUpdate, Residual

COLUMNS = 32  # of the sketch: a relative error estimated from it is good to some ten percent


class AggregationMeter:
    """Estimates ``||I - S||_F / ||I||_F`` over all adapted layers together.

    I is the ideal ``sum_k p_k (R_k + s_k B_k A_k)`` and S what the new adapter serves beside the
    frozen weights, ``R' + s' B' A'``. Both are only ever multiplied with a fixed seeded Gaussian
    matrix Z of 32 columns per layer (E ||M Z||^2 = 32 ||M||^2), so memory does not grow with
    clients, and the estimate is zero, up to rounding, exactly where I = S.
    """

    def __init__(self) -> None:
        self._total = 0.0
        self._ideal: dict[str, Tensor] = {}
        self._basis: dict[str, Tensor] = {}
        self._residual_sketch: dict[str, tuple[Residual, Tensor]] = {}

    def watch(self, updates: Iterable[ClientUpdate]) -> Iterator[ClientUpdate]:
        """Pass the updates on, adding up their sketches."""
        for update in updates:
            if update.weight:
                adapter = update.adapter
                for name in adapter.A:  # in its order: that of a set differs per process
                    if name not in adapter.B:
                        continue
                    term = self._sketch(adapter, name).mul_(update.weight)
                    old = self._ideal.get(name)
                    self._ideal[name] = term if old is None else old.add_(term)
                self._total += update.weight
            yield update

    def error(self, served: AdapterState) -> float | None:
        """The relative error of what ``served`` serves; None where no layer was watched."""
        if not self._ideal:
            return None
        lost = ideal = 0.0
        for name, total in self._ideal.items():
            want = total / self._total
            lost += (want - self._sketch(served, name)).square().sum().item()
            ideal += want.square().sum().item()
        return 0.0 if ideal == 0.0 else (lost / ideal) ** 0.5

    def _sketch(self, adapter: AdapterState, name: str) -> Tensor:
        """``(R + s B A) Z`` of one layer: (out_features, 32), float64, a fresh tensor."""
        A, B = adapter.A[name].double(), adapter.B[name].double()
        Z = self._z(name, A.shape[1])
        sketch = B @ (A @ Z) * adapter.scaling[name]
        residual = self._beside(adapter.residual, name, Z)
        return sketch if residual is None else sketch.add_(residual)

    def _beside(self, residual: Mapping[str, Residual], name: str, Z: Tensor) -> Tensor | None:
        if name not in residual:
            return None
        change = residual[name]
        known = self._residual_sketch.get(name)
        if known is None or known[0] is not change:  # clients of a round share one residual
            wide = change.to(torch.float64)
            value = wide.U @ Z if wide.V is None else wide.U @ (wide.V @ Z)
            known = self._residual_sketch[name] = (change, value)
        return known[1]

    def _z(self, name: str, columns: int) -> Tensor:
        if name not in self._basis:
            generator = torch.Generator().manual_seed(derive_seed("sketch", name))
            self._basis[name] = torch.randn(
                columns, COLUMNS, generator=generator, dtype=torch.float64
            )
        return self._basis[name]
