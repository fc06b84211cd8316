from __future__ import annotations

import pytest

from fedlora.aggregation import FedAvg, FedExLoRA, FedSALoRA, FFALoRA


@pytest.fixture(params=[FedAvg, FFALoRA, FedExLoRA, FedSALoRA], ids=lambda rule: rule.__name__)
def make_rule(request):
    """The class of each rule in turn."""
    return request.param
