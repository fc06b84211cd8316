"""The files of a set of pictures: pixels, and the index that names them once they are there."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from io import FileIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedlora.data.cache.folder import SetFolder, clear_cache_errors
from fedlora.data.cache.index import Index, header, pixels_files, pixels_name, read_index, records
from fedlora.files import sweep, write_atomically

# What a kill can cost: pictures added since the last commit. More often costs flushes.
_COMMIT_BYTES = 64_000_000
_COMMIT_SECONDS = 2.0


def load_index(folder: SetFolder, slot_bytes: int) -> tuple[Index | None, bool]:
    """What a set says about its pictures, whoever may be adding to it.

    Args:
        folder: of the set.
        slot_bytes: of one picture.

    Returns:
        The index, None if there is none that can be used; and whether it named pixels that are not
        there (somebody cut the file off), which are left out.

    Raises:
        FedloraError: if it cannot be read.
    """
    with clear_cache_errors(folder.path):
        index = read_index(folder.index, folder.name)
        if index is None:
            return None, False
        try:
            size = (folder.path / index.pixels).stat().st_size
        except FileNotFoundError:
            size = 0
        return index, index.drop_beyond(size // slot_bytes)


class Store:
    """Adds pictures to a set; for the one process that is working on it.

    Pixels are only ever appended, also behind those that a kill left without a record: a slot that
    any process may be reading from never changes.

    Args:
        folder: of the set.
        size: height and width of its pictures, in pixels.

    Attributes:
        index: what is recorded.
        slot_bytes: of one picture.
        num_slots: pictures in the file of pixels, recorded or not.

    Raises:
        FedloraError: if the folder cannot be read or written.
    """

    def __init__(self, folder: SetFolder, size: int) -> None:
        self.slot_bytes = 3 * size * size
        self._folder = folder
        self._slots: dict[bytes, int] = {}
        self._reasons: dict[bytes, str] = {}
        with clear_cache_errors(folder.path):
            sweep(folder.path)
        index, cut_off = load_index(folder, self.slot_bytes)
        if index is None or cut_off:
            _copy_together(folder, index, self.slot_bytes)
        self._open()

    @property
    def pixels_path(self) -> Path:
        """The file of pixels."""
        folder: Path = self._folder.path
        return folder / self.index.pixels

    @property
    def num_bytes(self) -> int:
        """Bytes of the file of pixels."""
        return self.num_slots * self.slot_bytes

    @property
    def num_recorded(self) -> int:
        """Pictures in the file of pixels that the index names; a kill leaves others."""
        return sum(slot >= 0 for slot in self.index.slots.values())

    def add(
        self,
        keys: Sequence[bytes],
        pixels: NDArray[np.uint8],
        others: Mapping[bytes, int],
        reasons: Mapping[bytes, str],
    ) -> None:
        """Add pictures. They are recorded at the next :meth:`commit`; it commits now and then.

        Args:
            keys: n pictures.
            pixels: (n, 3, size, size).
            others: further pictures -> ``NO_PIXELS`` or ``BAD``.
            reasons: why, for those that are bad.

        Raises:
            FedloraError: if they cannot be written.
        """
        with clear_cache_errors(self._folder.path):
            try:
                _write(self._pixels, pixels.reshape(-1).data, self.num_bytes)
            except OSError:
                with suppress(OSError):  # room for the index, which names those before
                    self._pixels.truncate(self.num_bytes)
                raise
        self._slots |= {key: self.num_slots + i for i, key in enumerate(keys)} | dict(others)
        self._reasons |= reasons
        self.num_slots += len(keys)
        due = time.monotonic() >= self._committed_at + _COMMIT_SECONDS
        if due or self.num_bytes >= self._committed_bytes + _COMMIT_BYTES:
            self.commit()

    def commit(self) -> None:
        """Record what was added: first the pixels reach the disk, then the index names them.

        Raises:
            FedloraError: if it cannot be written; what was added since the last time is lost.
        """
        if self._slots:
            block = records(self._slots, self._reasons)
            with clear_cache_errors(self._folder.path):
                try:
                    os.fsync(self._pixels.fileno())
                    _write(self._records, memoryview(block), self.index.end)
                except OSError:
                    # A second flush would succeed although the pixels of the first one are lost.
                    self._slots, self._reasons = {}, {}
                    raise
            # Interrupted before this is done, the next commit writes the same once more.
            self.index.add(self._slots, self._reasons)
            self.index.end += len(block)
            self._slots, self._reasons = {}, {}
        self._committed_at, self._committed_bytes = time.monotonic(), self.num_bytes

    def compact(self, without: Set[bytes]) -> None:
        """Copy the pixels to a new file; whoever has the old one open goes on reading from that.

        Args:
            without: pictures to leave out.

        Raises:
            FedloraError: if it cannot be written; all is then as it was.
        """
        _copy_together(self._folder, self.index, self.slot_bytes, without)
        self.close()
        self._open()

    def close(self) -> None:
        """Close the files; what was not committed is lost."""
        self._pixels.close()
        self._records.close()

    def _open(self) -> None:
        """Open what the index names, cut off what is torn, clear away what it does not name."""
        index, _ = load_index(self._folder, self.slot_bytes)
        with clear_cache_errors(self._folder.path):
            if index is None:
                raise OSError(errno.EIO, "the index changed while it was read")
            self.index = index
            _clear_unnamed(self._folder, index)
            self._pixels = FileIO(self.pixels_path, "r+")
            self._records = FileIO(self._folder.index, "r+")
            self.num_slots = os.fstat(self._pixels.fileno()).st_size // self.slot_bytes
            self._records.truncate(index.end)
        self._committed_at, self._committed_bytes = time.monotonic(), self.num_bytes


def _copy_together(
    folder: SetFolder, index: Index | None, slot_bytes: int, without: Set[bytes] = frozenset()
) -> None:
    """Write a new file of pixels and a new index that names it, both whole before they count."""
    with clear_cache_errors(folder.path):
        name = pixels_name(1 + max(pixels_files(folder.path), default=0))
        fresh = folder.path / name
        found = Index("") if index is None else index
        try:
            slots = _copy_pixels(folder.path / found.pixels, fresh, found, slot_bytes, without)
            content = header(folder.name, name) + records(slots, found.reasons)
            write_atomically(folder.index, lambda file: _write_bytes(file, content))
        except BaseException:
            # An interrupt may come when the new index is there already.
            _clear_unnamed(folder, read_index(folder.index, folder.name))
            raise


def _clear_unnamed(folder: SetFolder, index: Index | None) -> None:
    """Remove files of pixels that no index names: of a kill, or from before a copy."""
    for file in pixels_files(folder.path).values():
        if index is None or file.name != index.pixels:
            file.unlink()


def _copy_pixels(
    old: Path, fresh: Path, index: Index, slot_bytes: int, without: Set[bytes]
) -> dict[bytes, int]:
    """Copy slot after slot; returns what the index says of the new file."""
    slots = {key: slot for key, slot in index.slots.items() if key not in without}
    kept = [key for key, slot in slots.items() if slot >= 0]
    with fresh.open("xb") as target:
        if kept:
            with old.open("rb") as source:
                for position, key in enumerate(kept):
                    source.seek(slots[key] * slot_bytes)
                    pixels = source.read(slot_bytes)
                    if len(pixels) < slot_bytes:
                        raise OSError(errno.EIO, "the file of pixels was cut off while it was read")
                    target.write(pixels)
                    slots[key] = position
        target.flush()
        os.fsync(target.fileno())
    return slots


def _write_bytes(file: Path, content: bytes) -> None:
    file.write_bytes(content)


def _write(file: FileIO, data: memoryview, offset: int) -> None:
    while data:
        # A disk that is nearly full takes a part.
        written = os.pwrite(file.fileno(), data, offset)
        data, offset = data[written:], offset + written
