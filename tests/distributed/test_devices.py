from __future__ import annotations

import os

import pytest
import torch

from fedlora.distributed.devices import make_fabric, set_threads
from fedlora.errors import FedloraError

STARTED = ("MASTER_ADDR", "SLURM_NTASKS", "LSB_JOBID", "OMPI_COMM_WORLD_SIZE")


def fabric(devices: int, num_nodes: int = 1, device: str = "cpu") -> int:
    return make_fabric(device, "32-true", devices, num_nodes, "auto", 60.0).world_size


def test_one_device_is_this_process() -> None:
    assert fabric(1) == 1
    assert make_fabric("cpu", "32-true", "auto", 1, "ddp", 60.0).world_size == 1


@pytest.mark.parametrize("started", [2, 3])
def test_torchrun_says_how_many_there_are(monkeypatch: pytest.MonkeyPatch, started: int) -> None:
    for name, value in {
        "TORCHELASTIC_RUN_ID": "x",
        "WORLD_SIZE": started,
        "LOCAL_WORLD_SIZE": started,
        "RANK": 1,
        "LOCAL_RANK": 1,
        "GROUP_RANK": 0,
    }.items():
        monkeypatch.setenv(name, str(value))
    assert make_fabric("cpu", "32-true", "auto", 1, "auto", 60.0).world_size == started
    with pytest.raises(FedloraError, match=f"torchrun started {started} processes, trainer.dev"):
        fabric(4)


def test_machines_that_do_not_know_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in STARTED:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(FedloraError, match="Start the run with torchrun or srun, or set MASTER_"):
        fabric(1, num_nodes=2)


def test_more_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(FedloraError, match="there are 0 GPUs here"):
        fabric(2, device="cuda")
    with pytest.raises(FedloraError, match="must be 1 on mps"):
        fabric(2, device="mps")


def test_a_notebook_cannot_be_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.ps1", ">>> ", raising=False)
    with pytest.raises(FedloraError, match="which a notebook cannot"):
        fabric(2)


def test_threads_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6), raising=False)
    try:
        set_threads(None, 2)
        assert torch.get_num_threads() == 3
        set_threads(None, 8)
        assert torch.get_num_threads() == 1
        set_threads(2, 2)
        set_threads(None, 1)
        assert torch.get_num_threads() == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        set_threads(None, 6)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
