"""The factors in PEFT's file: with a residual their product is all that is served beside W0."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import mode
from typing import Any

import torch
from torch import Tensor

from fedlora.aggregation import product
from fedlora.low_rank import factors, svd
from fedlora.modules.config import LoRAConfig
from fedlora.state import AdapterState, Residual, pad

# What writing float32 costs at most, in units of the terms that add up to what is served.
ROUNDING = 4 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class PeftFactors:
    """Factors of one rank in all layers, as PEFT's file has them.

    Attributes:
        A: module path -> (rank, in_features).
        B: module path -> (out_features, rank).
        rank: the largest that a layer needs; the others have slots of zeros.
        error: of an adapter with a residual ``||served - B A||_F / ||served||_F`` over these layers
            together, served being ``R + s B A``; 0 where nothing but rounding to float32 differs.
            None of one without: its factors are as they are, and PEFT's settings scale them.
    """

    A: Mapping[str, Tensor]
    B: Mapping[str, Tensor]
    rank: int
    error: float | None = None


def peft_factors(
    adapter: AdapterState, names: Iterable[str], limit: int | None = None
) -> PeftFactors:
    """The factors that PEFT's file gets.

    Args:
        adapter: factors and residual.
        names: the layers that the file is about, at least one.
        limit: the largest rank; a layer that needs more gets its best approximation of that rank.
            Of an adapter without a residual nothing is cut. None: whatever is exact.
    """
    if not adapter.residual:
        return _of_one_rank({name: (adapter.A[name], adapter.B[name]) for name in names})
    pairs = {name: _written(_served(adapter, name), limit) for name in names}
    found = _of_one_rank(pairs)
    # A layer that was cut has the rank of the limit.
    return replace(found, error=_error(adapter, pairs) if found.rank == limit else 0.0)


def _of_one_rank(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> PeftFactors:
    rank = max(A.shape[0] for A, _ in pairs.values())
    A = {name: pad(pair[0], rank, 0) for name, pair in pairs.items()}
    B = {name: pad(pair[1], rank, 1) for name, pair in pairs.items()}
    return PeftFactors(A, B, rank)


def _terms(adapter: AdapterState, name: str) -> list[Residual]:
    """``s B A``, and the residual where there is one, in float64."""
    beside = adapter.residual.get(name)
    served = product(adapter, name)
    return [served] if beside is None else [served, beside.to(torch.float64)]


def _served(adapter: AdapterState, name: str) -> Residual:
    """All that one layer serves beside W0, thin while its rank is below the matrix's."""
    own, *beside = _terms(adapter, name)
    for change in beside:
        if change.V is None or own.V is None:
            return Residual(own.dense() + change.dense())
        thin = Residual(torch.cat([own.U, change.U], 1), torch.cat([own.V, change.V]))
        return thin if thin.U.shape[1] < min(thin.shape) else Residual(thin.dense())
    return own


def _written(served: Residual, limit: int | None) -> tuple[Tensor, Tensor]:
    """A and B in float32 with the product ``served``, or the nearest to it of rank ``limit``."""
    needed = min(served.shape) if served.V is None else served.U.shape[1]
    if limit is not None and needed > limit:
        A, B = factors(*svd(served), limit, scaling=1.0)
        return A.float(), B.float()
    if served.V is not None:
        return served.V.float(), served.U.float()
    # At full rank one factor is the identity and the other the whole change: exact, and no SVD.
    change = served.U.float()
    out_features, in_features = served.shape
    if out_features <= in_features:
        return change, torch.eye(out_features)
    return torch.eye(in_features), change


def _error(adapter: AdapterState, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    """``||served - B A||_F / ||served||_F`` of the factors as they are written."""
    gap = whole = terms = 0.0
    for name, (A, B) in pairs.items():
        served = _served(adapter, name)
        whole += _square(served)
        gap += _square(_minus(served, A.double(), B.double()))
        terms += sum(_square(term) for term in _terms(adapter, name))
    return math.sqrt(gap / whole) if gap > ROUNDING**2 * terms else 0.0


def _minus(served: Residual, A: Tensor, B: Tensor) -> Residual:
    if served.V is None:
        return Residual(served.U - B @ A)
    return Residual(torch.cat([served.U, -B], 1), torch.cat([served.V, A]))


def _square(change: Residual) -> float:
    """``||change||_F^2``; of a thin one without forming it, as trace((U^T U)(V V^T))."""
    if change.V is None:
        return change.U.square().sum().item()
    return max(0.0, ((change.U.T @ change.U) * (change.V @ change.V.T)).sum().item())


def scaling_settings(config: LoRAConfig, scaling: Mapping[str, float], rank: int) -> dict[str, Any]:
    """PEFT's ``r``, ``lora_alpha``, ``use_rslora`` and ``alpha_pattern`` for these scalings.

    Args:
        config: what the model was made with; where its own lora_alpha is meant, it is given as it
            is.
        scaling: module path -> what B A is multiplied with, at least one.
        rank: of all layers.
    """
    usual = mode(scaling.values())
    return {
        "r": rank,
        "lora_alpha": _alpha(config, usual, rank),
        "use_rslora": config.use_rslora,
        # PEFT looks for the pattern at the end of a path: ``^`` makes it the whole.
        "alpha_pattern": {
            f"^{re.escape(name)}": _alpha(config, value, rank)
            for name, value in scaling.items()
            if value != usual
        },
    }


def _alpha(config: LoRAConfig, scaling: float, rank: int) -> float:
    found = scaling * (math.sqrt(rank) if config.use_rslora else rank)
    likely = (config.lora_alpha, round(found))
    return next((number for number in likely if math.isclose(number, found)), found)
