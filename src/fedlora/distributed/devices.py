"""From the trainer's settings to Fabric: which devices, how many processes, which threads."""

from __future__ import annotations

import os
import sys
from typing import Literal

import torch
from lightning.fabric import Fabric

from fedlora.distributed.launch import ClientParallelStrategy
from fedlora.errors import FedloraError

Spread = Literal["clients", "ddp"]
STRATEGIES = ("auto", "clients", "ddp")
# By one of these processes on several machines find each other.
MEETING = ("MASTER_ADDR", "SLURM_NTASKS", "LSB_JOBID", "OMPI_COMM_WORLD_SIZE")


def check_devices(
    devices: int | str, num_nodes: int, strategy: str, timeout_s: float, on_client_error: str
) -> None:
    """Refuse what cannot be, before anything heavy is done.

    Raises:
        FedloraError: says why, and what to use instead.
    """
    if strategy.startswith(("fsdp", "deepspeed")):
        raise FedloraError(
            f"trainer.strategy={strategy} spreads a model's weights over devices, for models that "
            "do not fit one; here the base is frozen and each device holds it whole, and what is "
            "trained is small. Use clients or ddp, and averaging.gradient_checkpointing or "
            "base_dtype=bfloat16 where memory is short."
        )
    if strategy not in STRATEGIES:
        raise FedloraError(
            f"trainer.strategy should be one of {', '.join(STRATEGIES)} but got {strategy!r}."
        )
    if strategy == "ddp" and on_client_error == "skip":
        raise FedloraError(
            "trainer.on_client_error=skip does not go with strategy=ddp: an error in one process "
            "leaves the others in the middle of a client. Use strategy=clients, or stop."
        )
    if devices != "auto" and (not isinstance(devices, int) or devices < 1):
        raise FedloraError(f"trainer.devices must be at least 1 or auto, got {devices!r}.")
    if num_nodes < 1:
        raise FedloraError(f"trainer.num_nodes must be at least 1, got {num_nodes}.")
    if not timeout_s > 0:
        raise FedloraError(f"trainer.timeout must be above 0 (seconds), got {timeout_s}.")


def device_type(accelerator: str) -> str:
    """``cuda``, ``mps`` or ``cpu``; refuses an accelerator that is not there."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if accelerator == "auto":
        return next(name for name, available in there.items() if available)
    if accelerator == "gpu":
        accelerator = "mps" if there["mps"] and not there["cuda"] else "cuda"
    if not there[accelerator]:
        raise FedloraError(
            f"trainer.accelerator={accelerator}: there is no such device here. Use auto or cpu."
        )
    return accelerator


def make_fabric(
    device: str,
    precision: str,
    devices: int | Literal["auto"],
    num_nodes: int,
    strategy: str,
    timeout_s: float,
) -> Fabric:
    """Fabric, not launched yet: one process per device, or this one alone.

    Args:
        device: of :func:`device_type`.
        precision: of the forward and backward pass.
        devices: on each machine; ``auto``: as many processes as torchrun started, else every GPU.
        num_nodes: machines.
        strategy: ``auto`` and ``clients`` spread clients, ``ddp`` the rows of a batch.
        timeout_s: seconds that a process waits for another.

    Raises:
        FedloraError: for more devices than there are, or other numbers than were started.
    """
    count = _count(device) if devices == "auto" else devices
    _check_count(device, count, num_nodes)
    if count * num_nodes == 1:
        return Fabric(accelerator=device, devices=1, precision=precision)  # type: ignore[arg-type]
    if _is_interactive():
        raise FedloraError(
            f"trainer.devices={count} starts the program again for each device, which a notebook "
            "cannot. Run it as a script, or set devices=1."
        )
    # Gradients of ddp are on the devices; all else that travels is on the CPU.
    backend = "cpu:gloo,cuda:nccl" if (device, strategy) == ("cuda", "ddp") else "gloo"
    return Fabric(
        accelerator=device,
        devices=count,
        num_nodes=num_nodes,
        precision=precision,  # type: ignore[arg-type]
        strategy=ClientParallelStrategy(backend, timeout_s),
    )


def spread_of(strategy: str) -> Spread:
    """What is spread over the processes."""
    return "ddp" if strategy == "ddp" else "clients"


def per_machine(fabric: Fabric) -> int:
    """Processes of the run on this machine."""
    strategy = fabric.strategy
    return strategy.num_processes if isinstance(strategy, ClientParallelStrategy) else 1


def set_threads(threads: int | None, per_machine: int) -> None:
    """Torch's CPU threads in this process; by default the cores are shared out."""
    if threads is None and per_machine > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, _cores() // per_machine)
    if threads is not None:
        torch.set_num_threads(threads)


def _cores() -> int:
    # Those that this process may use; not every system can tell.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _count(device: str) -> int:
    started = os.environ.get("LOCAL_WORLD_SIZE")
    if started is not None and "TORCHELASTIC_RUN_ID" in os.environ:
        return int(started)
    return torch.cuda.device_count() if device == "cuda" else 1


def _check_count(device: str, count: int, num_nodes: int) -> None:
    if device == "cuda" and count > torch.cuda.device_count():
        raise FedloraError(
            f"trainer.devices={count}: there are {torch.cuda.device_count()} GPUs here. Lower it."
        )
    if device == "mps" and count * num_nodes > 1:
        raise FedloraError("trainer.devices must be 1 on mps. Use accelerator=cpu for more.")
    if num_nodes > 1 and not any(name in os.environ for name in MEETING):
        raise FedloraError(
            f"trainer.num_nodes={num_nodes}: the machines do not know of each other. Start the run "
            "with torchrun or srun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK on each."
        )
    started = int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else None
    if started not in (None, count * num_nodes):
        raise FedloraError(
            f"torchrun started {started} processes, trainer.devices={count} and "
            f"num_nodes={num_nodes} make {count * num_nodes}. Set trainer.devices to "
            "--nproc-per-node, or to auto, and num_nodes to --nnodes."
        )


def _is_interactive() -> bool:
    return hasattr(sys, "ps1")
