from __future__ import annotations

import pytest
import torch

from fedlora import AdapterAveraging, FedloraError


def test_bf16_is_refused_where_the_gpu_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    with pytest.raises(FedloraError, match=r"Use 16-mixed or 32-true"):
        AdapterAveraging(precision="bf16-mixed").check_device("cuda")
    AdapterAveraging(precision="16-mixed").check_device("cuda")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_cpu_has_these(precision) -> None:
    AdapterAveraging(precision=precision).check_device("cpu")


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_float16_needs_a_gpu(device: str) -> None:
    with pytest.raises(FedloraError, match=f"needs a GPU, this run is on {device}"):
        AdapterAveraging(precision="16-mixed").check_device(device)
