"""What sources of files share: folders, stamps, the pictures below a folder."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedlora.errors import FedloraError
from fedlora.files import expand

# Endings of pictures' names, in lower case.
PICTURE_ENDINGS = (
    *("png", "jpg", "jpeg", "jpe", "jfif", "webp", "bmp", "gif"),
    *("tif", "tiff", "ppm", "pgm", "pbm", "jp2", "avif", "mpo"),
)
# The stamp of a file that is not there, or whose link leads nowhere.
MISSING = "missing"

# What operating systems and archives leave beside a user's files; what begins with a dot, too.
_LITTER = (
    *("__MACOSX", "Thumbs.db", "desktop.ini", "lost+found"),
    *("@eaDir", "$RECYCLE.BIN", "System Volume Information"),
)


@dataclass(frozen=True)
class PictureFolder:
    """A folder that holds pictures itself.

    Attributes:
        parts: its name and those of the folders it lies in, from the root's child down.
        names: of its pictures, sorted.
        stamps: one per picture.
    """

    parts: tuple[str, ...]
    names: tuple[str, ...]
    stamps: tuple[str, ...]


def existing_folder(root: str | os.PathLike[str], name: str = "data.source.root") -> Path:
    """A folder as a full path without links; ``~`` is expanded.

    Args:
        root: as the user wrote it.
        name: how messages call it.

    Raises:
        FedloraError: if there is no such folder, it is a file, or it cannot be looked at.
    """
    folder = full_path(root, name)
    shown = printable(str(folder))
    try:
        is_folder = stat.S_ISDIR(folder.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FedloraError(
            f"{name} must be a folder, got {shown}, which does not exist. Mend the path; a "
            "relative one counts from the folder in which fedlora is started."
        ) from error
    except OSError as error:
        raise _unreadable(str(folder), error) from error
    if not is_folder:
        raise FedloraError(
            f"{name} must be a folder, got the file {shown}. Name the folder that it lies in; "
            "unpack an archive first."
        )
    return folder


def full_path(path: str | os.PathLike[str], name: str = "data.source.root") -> Path:
    """A path in full, without links and ``~``, whether it is there or not.

    Raises:
        FedloraError: where nobody knows the home folder, or it is not a usable path.
    """
    expanded = expand(path, name)
    try:
        return expanded.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a null byte
        raise FedloraError(f"{name} must be a path, got {str(path)!r}: {error}.") from error


def pictures_below(root: Path) -> tuple[list[PictureFolder], Counter[str]]:
    """Look through a folder and all below it; links are followed, none of them in a circle.

    Pictures are told by their names' endings (:data:`PICTURE_ENDINGS`, in any case). What begins
    with a dot and what operating systems leave behind is passed over.

    Returns:
        the folders with pictures, sorted; and how many other files there are, by ending.

    Raises:
        FedloraError: if a folder cannot be read.
    """
    found: list[PictureFolder] = []
    others: Counter[str] = Counter()
    # With each folder those that it lies in, by device and inode: a link to one of them is a
    # circle. Two links to one folder elsewhere are not, sites may share pictures.
    waiting: list[tuple[str, tuple[str, ...], tuple[tuple[int, int], ...]]] = [(str(root), (), ())]
    while waiting:
        path, parts, above = waiting.pop()
        try:
            here = os.stat(path)  # noqa: PTH116  # a Path per folder costs more than the look
            identity = (here.st_dev, here.st_ino)
            if identity in above:
                continue
            folders, pictures = _look_into(path, others)
        except OSError as error:
            raise _unreadable(path, error) from error
        if pictures:
            names, marks = zip(*sorted(pictures), strict=True)
            found.append(PictureFolder(parts, names, marks))
        waiting += [(f"{path}/{name}", (*parts, name), (*above, identity)) for name in folders]
    return sorted(found, key=lambda folder: folder.parts), others


def stamp(path: str | os.PathLike[str]) -> str | None:
    """What changes whenever a file does: ``"size:mtime_ns:ctime_ns"`` of what a link leads to.

    Returns:
        :data:`MISSING` where there is nothing, None for what is no file (a folder, a pipe).
    """
    try:
        return _stamp(os.stat(path))  # noqa: PTH116
    except (OSError, ValueError):
        return MISSING


def stamps(paths: Iterable[str | os.PathLike[str]]) -> NDArray[np.str_]:
    """The :func:`stamp` of each path, (n,); ``MISSING`` also for what is no file."""
    return np.array([stamp(path) or MISSING for path in paths], dtype=np.str_)


def printable(text: str) -> str:
    r"""Text that any file can hold: what is no valid Unicode is spelled out.

    Bytes of a file's name that are no UTF-8 reach Python as lone surrogates, which cannot be
    written anywhere.

    Example:
        >>> print(printable("caf\udce9.png"))
        caf\udce9.png
        >>> printable("café.png")
        'café.png'
    """
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _look_into(path: str, others: Counter[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Names of the folders, and names and stamps of the pictures, in one folder."""
    folders, pictures = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if name[0] == "." or name in _LITTER:
                continue
            if _is_folder(entry):
                folders.append(name)
                continue
            ending = name.rpartition(".")[2].lower() if "." in name else ""
            if ending not in PICTURE_ENDINGS:
                others[ending] += 1
                continue
            mark = _stamp_of_entry(entry)
            if mark is not None:
                pictures.append((name, mark))
    return folders, pictures


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _stamp_of_entry(entry: os.DirEntry[str]) -> str | None:
    try:
        return _stamp(entry.stat())
    except OSError:
        return MISSING


def _stamp(found: os.stat_result) -> str | None:
    if not stat.S_ISREG(found.st_mode):
        return None
    # What is moved to another's place keeps its size and time of change, but not its ctime.
    return f"{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"


def _unreadable(folder: str, error: OSError) -> FedloraError:
    return FedloraError(
        f"the folder {printable(folder)} cannot be read: {error.strerror or error}. Give yourself "
        "the right to read it, or take it out of data.source.root."
    )
