"""The published ways to average LoRA adapters: each rule is one file of this folder.

What goes around a rule, as a server optimizer or a head that stays local, is in ``wrappers``.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from fedlora.aggregation.base import Aggregator, ProductMean, WeightedMean, product
from fedlora.aggregation.wrappers import WRAPPERS, ServerOptimizer, Wrapper

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Each rule's and each wrapper's class: below they are found, not listed."""


def _rules() -> dict[str, type[Aggregator]]:
    """The rules, by name: adding one is adding its file. Wrappers are no rules by themselves."""
    found = {}
    for module in iter_modules(__path__):
        here = import_module(f"{__name__}.{module.name}")
        for name, value in vars(here).items():
            is_rule = isinstance(value, type) and issubclass(value, Aggregator)
            if is_rule and value.__module__ == here.__name__ and module.name != "base":
                found[name] = value
    return found


RULES = _rules()
globals().update(RULES)
globals().update(WRAPPERS)

__all__ = [
    "RULES",
    "WRAPPERS",
    "Aggregator",
    "ProductMean",
    "ServerOptimizer",
    "WeightedMean",
    "Wrapper",
    "product",
    *RULES,
    *WRAPPERS,
]
