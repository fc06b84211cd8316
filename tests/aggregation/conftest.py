from __future__ import annotations

import pytest

from fedlora.aggregation import RULES


@pytest.fixture(params=RULES.values(), ids=RULES)
def make_rule(request):
    """The class of each rule in turn."""
    return request.param
