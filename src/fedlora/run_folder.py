"""The folder of a run: where things are, who may write in it."""

from __future__ import annotations

import fcntl
import re
from pathlib import Path
from typing import IO

from fedlora.errors import CheckpointError, FedloraError
from fedlora.files import clear_os_errors, expand, sweep, write_text

VERSION = re.compile(r"^version_(\d+)$")
CHECKPOINTS = ("last", "previous", "best")


class RunFolder:
    """``<root>/version_N`` and the names of what it holds.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    config = property(lambda self: self.path / "config.yaml")
    metrics = property(lambda self: self.path / "metrics.csv")
    clients_csv = property(lambda self: self.path / "clients.csv")
    clients = property(lambda self: self.path / "clients")
    adapter = property(lambda self: self.path / "adapter")
    summary = property(lambda self: self.path / "summary.json")
    predictions = property(lambda self: self.path / "predictions.csv")
    per_class = property(lambda self: self.path / "per_class.csv")
    client_test = property(lambda self: self.path / "client_test.csv")
    skipped = property(lambda self: self.path / "skipped.csv")
    log = property(lambda self: self.path / "fedlora.log")

    def checkpoint(self, name: str) -> Path:
        """``checkpoints/<name>.ckpt``."""
        return self.path / "checkpoints" / f"{name}.ckpt"

    @classmethod
    def create(cls, root: Path) -> RunFolder:
        """A new folder under ``root``, its number one more than the largest there.

        Raises:
            FedloraError: when ``root`` cannot be written.
        """
        with clear_os_errors(root):
            root.mkdir(parents=True, exist_ok=True)
            number = 1 + max(_versions(root), default=-1)
            while True:
                path = root / f"version_{number}"
                try:
                    (path / "checkpoints").mkdir(parents=True)
                except FileExistsError:  # another process took that number a moment ago
                    number += 1
                    continue
                return cls(path)

    @classmethod
    def newest(cls, root: Path, ckpt_path: str = "last") -> RunFolder:
        """The newest run under ``root`` that got as far as writing its config.

        Raises:
            CheckpointError: when there is none.
        """
        for number in sorted(_versions(root), reverse=True):
            folder = cls(root / f"version_{number}")
            if folder.config.exists():
                return folder
        raise CheckpointError(
            f"ckpt_path {ckpt_path!r}: there is no run under {root}. Start one with fit --config "
            "FILE, or give --trainer.default_root_dir or the path of a run folder."
        )

    @classmethod
    def of(cls, ckpt_path: str, root: Path) -> tuple[RunFolder, str]:
        """The run that ``ckpt_path`` means, and which of its checkpoints.

        Args:
            ckpt_path: "last" or "best" of the newest run, a run folder, or a checkpoint in one.
            root: where runs are.

        Raises:
            CheckpointError: when there is no such run.
        """
        if ckpt_path in ("last", "best"):
            return cls.newest(root, ckpt_path), ckpt_path
        path = expand(ckpt_path, "ckpt_path")
        if (path / "checkpoints").is_dir():
            return cls(path), "last"
        if path.is_file() and path.suffix == ".ckpt" and path.parent.name == "checkpoints":
            return cls(path.parent.parent), path.stem
        raise CheckpointError(
            f"ckpt_path {ckpt_path!r} is neither 'last' nor 'best' nor a run folder nor a .ckpt "
            "file in the checkpoints folder of one. Check the path."
        )

    def write_config(self, text: str) -> None:
        """Write ``config.yaml`` once; a run that goes on adds ``config.resumeN.yaml``."""
        number, path = 0, self.config
        while path.exists():
            number += 1
            path = self.path / f"config.resume{number}.yaml"
        write_text(path, text)

    def lock(self) -> None:
        """Keep other processes out until this one ends (a kill releases it too).

        Raises:
            FedloraError: when another process holds it.
        """
        with clear_os_errors(self.path):
            file = (self.path / ".lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise FedloraError(
                f"another process is running in {self.path}. Wait until it ends, or start a new "
                "run."
            ) from error
        self._lock = file

    def sweep(self) -> None:
        """Remove what a kill left half-written; only with the lock held."""
        for folder in (self.path, self.path / "checkpoints", self.path / "adapters"):
            sweep(folder)

    def unlock(self) -> None:
        """Let others in."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _versions(root: Path) -> list[int]:
    if not root.is_dir():
        return []
    return [int(match[1]) for path in root.iterdir() if (match := VERSION.match(path.name))]
