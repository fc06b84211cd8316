"""The cache folder: a sub-folder for the pictures of one source at one size, and who uses it."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from fedlora.data.cache.base import Reporter
from fedlora.data.cache.index import pixels_files
from fedlora.data.preprocess import ImagePreprocess
from fedlora.data.sources.base import ImageSource
from fedlora.data.sources.files_on_disk import printable
from fedlora.errors import FedloraError
from fedlora.files import write_json

# Part of the digest: a new layout, or a new way to decode or to resize, makes new sets.
_FORMAT = 1
_NAME = re.compile(r".+-[0-9a-f]{16}")
_FULL = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class SetFolder:
    """Where the pictures of one source at one size are kept.

    Attributes:
        root: the cache folder.
        name: of the sub-folder.
    """

    root: Path
    name: str

    path = property(lambda self: self.root / self.name)
    index = property(lambda self: self.path / "index")
    about = property(lambda self: self.path / "about.json")
    plan = property(lambda self: self.path / "plan")
    shown = property(lambda self: printable(str(self.path)))  # in messages
    in_work = property(lambda self: self.path / "in-work.lock")
    # Beside the folder, and left there when the folder is cleared away: whoever waits for it holds
    # the one that counts. Its time of change is that of the last use.
    in_use = property(lambda self: self.root / f"{self.name}.lock")

    @classmethod
    def of(cls, root: Path, source: ImageSource, preprocess: ImagePreprocess) -> SetFolder:
        """The folder of a set.

        Args:
            root: the cache folder.
            source: its ``place`` tells it from others, and so does its way to read: a subclass that
                overrides ``read()`` makes other pixels of the same files.
            preprocess: the size; scaling (mean, std) changes no stored pixel and does not count.
        """
        told = json.dumps(_about(source, preprocess), sort_keys=True)
        digest = hashlib.sha256(told.encode()).hexdigest()
        last = source.place.rstrip("/").rpartition("/")[2]
        readable = re.sub(r"[^A-Za-z0-9._]+", "-", last)[:40].strip("-.") or "pictures"
        return cls(root, f"{readable}-{preprocess.size}px-{digest[:16]}")

    def others(self) -> list[SetFolder]:
        """The other sets in the cache folder, and nothing else that may be there."""
        found = [
            SetFolder(self.root, path.name)
            for path in self.root.iterdir()
            if path.name != self.name and _NAME.fullmatch(path.name)
        ]
        return [other for other in found if other.about.is_file()]

    def describe(self, source: ImageSource, preprocess: ImagePreprocess) -> None:
        """Write ``about.json``, for people, if it is not there."""
        if not self.about.exists():
            write_json(
                self.about, {"what": "pictures kept by fedlora"} | _about(source, preprocess)
            )

    def last_used(self) -> int:
        """When it was last opened, in ns."""
        try:
            found: int = self.in_use.stat().st_mtime_ns
            return found
        except FileNotFoundError:
            return 0

    def num_bytes(self) -> int:
        """Bytes of pixels that it has or is about to have."""
        try:
            planned = int(self.plan.read_text())
        except (OSError, ValueError):
            planned = 0
        return max(planned, self.kept_bytes())

    def kept_bytes(self) -> int:
        """Bytes of pixels that it has."""
        kept = 0
        for file in pixels_files(self.path).values():
            with suppress(FileNotFoundError):  # cleared away a moment ago
                kept += file.stat().st_size
        return kept


def _about(source: ImageSource, preprocess: ImagePreprocess) -> dict[str, str | int | bool]:
    read = type(source).read
    return {
        "format": _FORMAT,
        "place": printable(source.place),
        "read_by": f"{read.__module__}.{read.__qualname__}",
        "size": preprocess.size,
        "crop": preprocess.crop,
        "resample": preprocess.resample,
    }


@contextmanager
def clear_cache_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk, an unwritable folder and the like into one line that names ``folder``."""
    try:
        yield
    except OSError as error:
        raise _clear(folder, error) from error
    except FedloraError as error:
        # Of fedlora.files, whose advice is about runs.
        if isinstance(error.__cause__, OSError):
            raise _clear(folder, error.__cause__) from error
        raise


def _clear(folder: Path, error: OSError) -> FedloraError:
    space = "Free space, or keep fewer with data.cache_gb=X (the others are decoded when needed). "
    return FedloraError(
        f"data.cache_dir: cannot keep pictures in {folder}: {error.strerror or error}. "
        f"{space if error.errno in _FULL else ''}Another folder: data.cache_dir=FOLDER. What was "
        "kept before stays valid."
    )


def hold(folder: SetFolder) -> FileIO:
    """Make the folder of a set and mark it as in use, so that nobody clears it away.

    Returns:
        A file to close when it is no longer in use; the end of the process closes it too.

    Raises:
        FedloraError: if the folder cannot be made or knows no locks.
    """
    with clear_cache_errors(folder.path):
        folder.root.mkdir(parents=True, exist_ok=True)
        held = FileIO(open_lock(folder.in_use))
        try:
            lock(held.fileno(), fcntl.LOCK_SH, folder.root)
            folder.path.mkdir(exist_ok=True)
            with suppress(OSError):  # another user's
                os.utime(folder.in_use)
        except BaseException:
            held.close()
            raise
    return held


@contextmanager
def working(folder: SetFolder, reporter: Reporter | None) -> Iterator[None]:
    """Only one process at a time adds pictures to a set; the others wait here.

    Raises:
        FedloraError: if the folder cannot be written or knows no locks.
    """
    with clear_cache_errors(folder.path):
        descriptor = os.open(folder.in_work, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, folder.root):
            if reporter is not None:
                reporter.say(
                    f"waiting for another process that reads the pictures in {folder.shown}"
                )
            lock(descriptor, fcntl.LOCK_EX, folder.root)
        try:
            yield
        finally:
            # Not only closed: a child forked in between has the descriptor too.
            lock(descriptor, fcntl.LOCK_UN, folder.root)
    finally:
        os.close(descriptor)


def open_lock(path: Path) -> int:
    """A descriptor to :func:`lock`, not inherited by other programs.

    Raises:
        OSError: if there is no such file and none can be made.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EROFS):
            raise
        # What another user keeps, or a disk that is read-only, can be used all the same.
        with suppress(FileNotFoundError):
            return os.open(path, os.O_RDONLY)
        raise


def lock(descriptor: int, how: int, root: Path) -> bool:
    """Lock or unlock.

    Args:
        descriptor: of :func:`open_lock`.
        how: as :func:`fcntl.flock` takes it.
        root: the cache folder, for the message.

    Returns:
        False if that would block and ``how`` says not to.

    Raises:
        FedloraError: on a file system that has no locks.
    """
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    except OSError as error:
        raise FedloraError(
            f"data.cache_dir {root}: this file system has no file locks ({error.strerror}). Choose "
            "a folder on a local disk: data.cache_dir=FOLDER."
        ) from None
    return True
