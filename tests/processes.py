"""Two processes of one run, as torchrun would start them, but forked with the imports done."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["fedlora.trainer", "fedlora.modules.classifier", "fedlora.data.datamodule", "peft"]
)


def in_processes(
    function: Callable[..., None], *args: Any, size: int = 2, within: float = 120.0
) -> list[int]:
    """Run a function of a module in each process of a world; returns their exit codes.

    One that raises says why on stderr and exits with 1.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        CONTEXT.Process(target=_run, args=(rank, size, port, function, args))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(within)
    hanging = [process for process in processes if process.exitcode is None]
    for process in hanging:
        process.kill()
        process.join()
    assert not hanging, f"{len(hanging)} processes did not end"
    return [process.exitcode or 0 for process in processes]


def _run(rank: int, size: int, port: int, function: Callable[..., None], args: Any) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "NODE_RANK": "0",
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "HF_HUB_OFFLINE": "1",
    }
    try:
        function(*args)
    except BaseException as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)
