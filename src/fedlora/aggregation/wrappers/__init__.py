"""Wrappers: each goes around a rule and changes one thing of what that does."""

from __future__ import annotations

from fedlora.aggregation.wrappers.base import Wrapper
from fedlora.aggregation.wrappers.local import Local, LocalHead, LocalNorm
from fedlora.aggregation.wrappers.server import (
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedYogi,
    ServerOptimizer,
)

WRAPPERS: dict[str, type[Wrapper]] = {
    wrapper.__name__: wrapper
    for wrapper in (Local, LocalHead, LocalNorm, FedAvgM, FedAdam, FedYogi, FedAdagrad)
}

__all__ = [
    "WRAPPERS",
    "FedAdagrad",
    "FedAdam",
    "FedAvgM",
    "FedYogi",
    "Local",
    "LocalHead",
    "LocalNorm",
    "ServerOptimizer",
    "Wrapper",
]
