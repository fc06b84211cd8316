"""A command with all the processes that it starts: seconds, and the most memory."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

EVERY = 0.1  # seconds between two looks at the memory
MARK = "PEERS_RUN"  # in the environment of all processes of a command


@dataclass(frozen=True)
class Done:
    """A command that has ended well.

    Attributes:
        seconds: from its start to its end.
        peak: the most memory of all its processes together, in bytes, pages that several share
            counted once (proportional set size); 0 where nobody looked.
    """

    seconds: float
    peak: int


@dataclass
class Look(threading.Thread):
    """Adds up the memory of a process tree again and again.

    Attributes:
        root: the process at its top.
        mark: what those in it have in their environment, should they leave the tree.
        peak: the largest sum, in bytes.
    """

    root: int
    mark: bytes
    peak: int = 0
    known: dict[int, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)
        self.over = threading.Event()

    __hash__ = threading.Thread.__hash__

    def run(self) -> None:
        while not self.over.wait(EVERY):
            self.peak = max(self.peak, sum(_pss(pid) for pid in self._tree()))

    def _tree(self) -> list[int]:
        now = sorted(int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
        self.known = {pid: belongs for pid, belongs in self.known.items() if pid in set(now)}
        for pid in now:
            if pid not in self.known:
                self.known[pid] = self._belongs(pid)
        return [pid for pid in now if self.known[pid]]

    def _belongs(self, pid: int) -> bool:
        if pid == self.root:
            return True
        with suppress(OSError):
            after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if self.known.get(int(after_name[1])):
                return True
            return self.mark in Path(f"/proc/{pid}/environ").read_bytes()
        return False


def _pss(pid: int) -> int:
    with suppress(OSError):
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
        return int(found[1]) * 1024 if found else 0
    return 0  # it has ended


def run(
    command: Sequence[str], environment: Mapping[str, str], log: Path, memory: bool = False
) -> Done:
    """Run a command to its end.

    Args:
        command: and its arguments.
        environment: beside the one that this process has.
        log: where its output goes.
        memory: look at its memory meanwhile.

    Raises:
        SystemExit: where it fails, with the end of what it said.
    """
    mark = uuid.uuid4().hex
    given = {**os.environ, **environment, MARK: mark}
    began = time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=given, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        )
        look = Look(process.pid, f"{MARK}={mark}".encode())
        if memory:
            look.start()
        try:
            code = process.wait()
        except BaseException:
            process.terminate()  # not left behind by Ctrl-C
            raise
    seconds = time.perf_counter() - began
    look.over.set()
    if memory:
        look.join()
    if code:
        said = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise SystemExit(f"{said}\n{' '.join(command)}\nended with {code}; all it said: {log}")
    return Done(seconds, look.peak)
