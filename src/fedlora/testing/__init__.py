"""For authors of rules: check in your own tests that a rule keeps every promise.

Example::

    from fedlora.testing import check_aggregator

    def test_my_rule():
        check_aggregator(lambda: MyRule(beta=2))
"""

from __future__ import annotations

from fedlora.testing.harness import CHECKS, check_aggregator

__all__ = ["CHECKS", "check_aggregator"]
