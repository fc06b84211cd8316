"""Starting a process per device, and noticing when one of them is gone."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy

# Lightning's own kills the main process when another ends, before that can say a word.
from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import distributed
from torch.nn import Module

from fedlora.distributed.inbox import WAITING, UnderWay
from fedlora.distributed.world import World
from fedlora.errors import ElsewhereError, FedloraError, LostError

T = TypeVar("T")
CHATTER = ("lightning.fabric.utilities.distributed", "lightning.pytorch.utilities.rank_zero")
PARENT = "FEDLORA_PARENT"  # the environment variable by which a process knows who started it
RESUME = "Go on with fit --ckpt_path last."
GRACE_S = 3.0  # for a process to notice by itself that another is gone, or to end


class ClientParallelStrategy(DDPStrategy):
    """A process per device, each with the whole model; no module is wrapped.

    What travels is small and ours to send: a DDP wrapper would synchronise the parameters that it
    found when it was made, and others may be trained in the next round.

    Args:
        backend: of ``torch.distributed``.
        timeout_s: seconds that a process waits for another.
    """

    def __init__(self, backend: str, timeout_s: float) -> None:
        timeout = timedelta(seconds=timeout_s)
        super().__init__(process_group_backend=backend, timeout=timeout)

    def _configure_launcher(self) -> None:
        if self.cluster_environment is not None:
            self._launcher = Launcher(self.cluster_environment, self.num_processes, self.num_nodes)

    def _setup_distributed(self) -> None:
        if distributed.is_initialized():  # by an earlier call in the same program
            _check_same(self.num_processes * self.num_nodes)
        loggers = [logging.getLogger(name) for name in CHATTER]
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            # Another process may end before it gets here.
            UnderWay(super()._setup_distributed).result()
        except RuntimeError as error:
            raise LostError(
                f"not all processes of the run came together ({' '.join(str(error).split())[:200]})"
            ) from error
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)

    def setup_module(self, module: Module) -> Module:  # type: ignore[override]
        """The module as it is."""
        return module


def _check_same(size: int) -> None:
    there = distributed.get_world_size()
    if there != size:
        raise FedloraError(
            f"this program runs on {there} processes already, not {size}. Give every trainer in it "
            "the same devices and num_nodes, or start another program."
        )
    if World(0, there).last_words() is not None:
        raise FedloraError(
            "a run on several processes failed in this program, and they do not know of each other "
            "any more. Start the program again."
        )


class Launcher(_SubprocessScriptLauncher):
    """Runs the command again for each further device of this machine, and watches.

    Where torchrun or Slurm started the processes, they watch.

    Attributes:
        lost: rank on this machine and exit code of the first process that ended by an error.
    """

    lost: tuple[int, int] | None = None
    _over = False
    _before: Any = None

    def launch(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Start the others where that is ours to do, and call ``function``."""
        environment = self.cluster_environment
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not environment.creates_processes_externally:
            os.environ[PARENT] = str(os.getpid())
            # Else torch prints where in its own code it noticed that one is gone.
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
            self._call_children_scripts()
            self._watch_children()
        elif os.environ.get(PARENT) == str(os.getppid()):
            threading.Thread(target=self._watch_parent, args=(os.getppid(),), daemon=True).start()
        return function(*args, **kwargs)

    def _watch_children(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGUSR1, self._interrupt)
        for number, process in enumerate(self.procs, start=1):
            arguments = number, process, threading.get_ident()
            threading.Thread(target=self._watch, args=arguments, daemon=True).start()

    def _watch(self, rank: int, process: subprocess.Popen[bytes], waiting: int) -> None:
        code = process.wait()
        if code == 0 or self.lost is not None:
            return
        self.lost = rank, code
        time.sleep(GRACE_S)  # who waits for it hears of it sooner, and with its last words
        if not self._over and self._before is not None:
            signal.pthread_kill(waiting, signal.SIGUSR1)
        time.sleep(3 * GRACE_S)
        if not self._over:  # it hears nothing: it waits for a GPU that waits for the other
            print(f"fedlora: {self.how_it_ended()}. {RESUME}", file=sys.stderr, flush=True)
            for other in self.procs:
                other.kill()
            os._exit(1)

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        if not self._over:
            self._over = True
            raise LostError("another process of the run is gone")

    def how_it_ended(self) -> str:
        """What is known of the process that is gone; empty if nothing is."""
        until = time.monotonic() + GRACE_S
        while self.procs and self.lost is None and time.monotonic() < until:
            time.sleep(0.05)
        if self.lost is None:
            return ""
        rank, code = self.lost
        by = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return f"rank {rank} {by}"

    def end(self, failed: bool) -> None:
        """Stop watching; where this process failed, the others end too."""
        self._over = True
        if callable(self._before):  # else ours stays, which does nothing now: a signal may come
            signal.signal(signal.SIGUSR1, self._before)
        if not failed:
            return
        for process in self.procs:
            process.terminate()
        until = time.monotonic() + GRACE_S
        for process in self.procs:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
            process.kill()  # without effect on one that has ended
            process.wait()
        # They wait for nobody now. One that came back while Python ends would abort it.
        for thread in threading.enumerate():
            if thread.name == WAITING and self.procs:
                thread.join(GRACE_S)

    def _watch_parent(self, parent: int) -> None:
        """End with the process that started this one: it may be long until the next message."""
        while os.getppid() == parent and not self._over:
            time.sleep(0.5)
        time.sleep(GRACE_S)  # who waits for it hears of it sooner
        if not self._over:
            print("fedlora: rank 0 is gone, so this process ends too.", file=sys.stderr, flush=True)
            os._exit(1)


def explained(error: BaseException, world: World, fabric: Fabric) -> BaseException | None:
    """What to raise in the place of an error that concerns other processes; None: itself."""
    if isinstance(error, LostError):
        return _of_loss(error, world, fabric)
    if world.size == 1 or not isinstance(error, Exception):
        return None
    said = world.report(error)
    return None if world.is_zero else said


def _of_loss(error: LostError, world: World, fabric: Fabric) -> BaseException:
    words = world.last_words()
    if words is not None:
        return words if world.is_zero else ElsewhereError(str(words))
    launcher = fabric.strategy.launcher
    how = launcher.how_it_ended() if isinstance(launcher, Launcher) else ""
    who = "" if world.is_zero else f"rank {world.rank}: "
    return LostError(f"{who}{error}{how and f': {how}'}. {RESUME}")


def end(fabric: Fabric, failed: bool) -> None:
    """Stop watching the other processes, and end them where this one failed."""
    launcher = fabric.strategy.launcher
    if isinstance(launcher, Launcher):
        launcher.end(failed)
