"""Files that are whole or absent: written under a temporary name, flushed, renamed."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedlora.errors import FedloraError

# How torch.save and safetensors report a disk that is full or a folder that is gone.
_WRITE_FAILED = re.compile(
    "PytorchStreamWriter|inline_container|Parent directory|Error while serializing"
)


def expand(path: str | os.PathLike[str], name: str = "path") -> Path:
    """A path with ``~`` and ``~user`` as what they stand for.

    Args:
        path: as the user wrote it.
        name: how messages call it.

    Raises:
        FedloraError: where nobody knows that home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise FedloraError(
            f"{name} {str(path)!r}: there is no home folder for {Path(path).parts[0]!r}. Write the "
            "path in full."
        ) from error


@contextmanager
def clear_os_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or an unwritable folder into one clear line that names ``path``."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise FedloraError(
            f"cannot write {path}: {reason}. Free space or choose another folder (of runs: "
            "--trainer.default_root_dir); what was written before is whole."
        ) from error
    except (RuntimeError, SafetensorError) as error:
        if not _WRITE_FAILED.search(str(error)):
            raise
        raise FedloraError(f"cannot write {path}: is the disk full?") from error


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` make a file under a temporary name beside ``path``, then rename it.

    Raises:
        FedloraError: when it cannot be written; ``path`` is then as it was before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with clear_os_errors(path):
        try:
            write(temporary)
            flush(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Make what was written to ``path`` survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda file: _write_text(file, text))


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> int:
    """Write a CSV file atomically; None becomes an empty field.

    Returns:
        The number of rows, without that of the columns' names.
    """
    count = 0

    def write(file: Path) -> None:
        nonlocal count
        with file.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(columns)
            for row in rows:
                writer.writerow(row)
                count += 1

    write_atomically(path, write)
    return count


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def swapped_folder(folder: Path) -> Iterator[Path]:
    """A fresh folder that takes the place of ``folder`` when it is complete.

    Hidden names beside it, ``.<name>.tmp`` and ``.<name>.old``, so that they stand in no other
    folder's way. A kill leaves the old folder or the new one; between the two renames the old one
    has its hidden name, under which :func:`present` finds it and :func:`sweep` brings it back.

    Raises:
        FedloraError: when it cannot be written; ``folder`` is then as it was before.
    """
    fresh = folder.with_name(f".{folder.name}.tmp")
    with clear_os_errors(folder):
        recover(folder)
        _remove(fresh)
        try:
            fresh.mkdir(parents=True)
            yield fresh
            for path in fresh.rglob("*"):
                if path.is_file():
                    flush(path)
            _swap(fresh, folder)
        finally:
            _remove(fresh)


def _swap(fresh: Path, folder: Path) -> None:
    old = _old(folder)
    _remove(old)
    if folder.exists():
        folder.rename(old)
    try:
        fresh.rename(folder)
    except OSError:
        recover(folder)
        raise
    _remove(old)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def present(folder: Path) -> Path:
    """Where a swapped folder is: itself, or its old version after a kill between two renames."""
    if not folder.name:  # the root, or the working folder as "."
        return folder
    old = _old(folder)
    return old if old.is_dir() and not folder.exists() else folder


def recover(folder: Path) -> None:
    """Give the old version its name back where the new one never took it."""
    if present(folder) != folder:
        _old(folder).rename(folder)


def sweep(folder: Path) -> None:
    """Clear away in ``folder`` what a kill left half-done; only where nobody else writes."""
    for old in folder.glob(".*.old"):
        recover(old.with_name(old.name[1 : -len(".old")]))
        _remove(old)
    for path in folder.glob(".*.tmp"):
        _remove(path)
