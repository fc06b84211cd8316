"""Pictures kept on disk: read once, resized once, shared by runs and by processes."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.data.cache.base import MemoryPictures, Pictures, Reporter, resized
from fedlora.data.cache.build import Builder, num_threads
from fedlora.data.cache.folder import SetFolder, hold, working
from fedlora.data.cache.index import BAD, NO_PIXELS, UNKNOWN, Index, keys_of
from fedlora.data.cache.store import Store, load_index
from fedlora.data.preprocess import ImagePreprocess
from fedlora.data.sources.base import ImageSource, ImageTable
from fedlora.data.sources.files_on_disk import MISSING
from fedlora.errors import FedloraError


def open_pictures(
    source: ImageSource,
    table: ImageTable,
    preprocess: ImagePreprocess,
    *,
    folder: Path,
    limit_gb: float,
    reporter: Reporter | None = None,
) -> Pictures:
    """All pictures of a source at the model's size; reads those that are not kept yet.

    May be called by several processes at once: one reads, the others wait.

    Args:
        source: where they come from.
        table: of ``source.load()``. With stamps the pictures are kept on disk, else in memory.
        preprocess: the size.
        folder: the cache folder, for all sources and sizes together.
        limit_gb: bytes of pixels in it, in 10^9. Sets not used for longest make room for new
            pictures; those that do not fit are decoded whenever they are asked for. With a limit
            below what is there already nothing is removed, but nothing is added either.
        reporter: whom to tell.

    Raises:
        FedloraError: if the limit is no number from 0, the folder cannot be written or has no
            locks, or its disk has no room for what the limit allows.
    """
    if table.stamps is None:
        return MemoryPictures(source, len(table), preprocess)
    if not limit_gb >= 0:
        raise FedloraError(f"data.cache_gb must be at least 0 (GB, 10^9 bytes), got {limit_gb}.")
    place = SetFolder.of(folder, source, preprocess)
    keys = keys_of(table.keys, table.stamps)
    pictures = _open(source, table, preprocess, place, keys, limit_gb, reporter)
    if pictures.num_not_kept and reporter is not None:
        reporter.say(
            f"{pictures.num_not_kept:,} of {len(table):,} pictures are beyond data.cache_gb="
            f"{limit_gb:g} and are decoded each time they are needed"
        )
    return pictures


def _open(
    source: ImageSource,
    table: ImageTable,
    preprocess: ImagePreprocess,
    place: SetFolder,
    keys: Sequence[bytes],
    limit_gb: float,
    reporter: Reporter | None,
) -> DiskPictures:
    opened = partial(DiskPictures, source, table, preprocess, place, keys)
    with hold(place):
        index, _ = load_index(place, 3 * preprocess.size**2)
        # What another user keeps is used as it is.
        fill = limit_gb > 0 and os.access(place.path, os.W_OK)
        if index is not None and _is_complete(index.find(keys), fill):
            with suppress(FileNotFoundError):  # copied together a moment ago
                return opened(index)
        with working(place, reporter):
            store = Store(place, preprocess.size)
            gone = np.asarray(table.stamps) == MISSING
            builder = Builder(source, preprocess, place, keys, gone, reporter)
            try:
                builder.build(store, limit_gb * 1e9)
            finally:
                store.close()
            return opened(store.index, builder.passing)


def _is_complete(slots: NDArray[np.int64], fill: bool) -> bool:
    """Whether there is nothing to read."""
    return not ((slots == UNKNOWN) | ((slots == NO_PIXELS) & fill)).any()


class DiskPictures(Pictures):
    """Pictures in a file that is mapped into memory, and decoded on demand where they are not.

    The set is marked as in use as long as this object, or a copy in another process, lives. It can
    be forked and pickled: each process maps the file anew, and the system's cache of files is
    shared.

    Args:
        source: where they come from.
        table: of ``source.load()``.
        preprocess: the size that they were brought to.
        folder: of the set.
        keys: of all rows, as the index calls them.
        index: where they lie.
        passing: row -> why it cannot be read now, for those of which the index knows nothing.

    Attributes:
        num_not_kept: pictures that are decoded each time.

    Raises:
        FileNotFoundError: if the pixels were copied to another file since the index was read.
    """

    def __init__(
        self,
        source: ImageSource,
        table: ImageTable,
        preprocess: ImagePreprocess,
        folder: SetFolder,
        keys: Sequence[bytes],
        index: Index,
        passing: Mapping[int, str] | None = None,
    ) -> None:
        self._slots = index.find(keys)
        self.num_not_kept = int(np.count_nonzero(self._slots == NO_PIXELS))
        bad = {row: index.reasons[keys[row]] for row in np.flatnonzero(self._slots == BAD).tolist()}
        super().__init__(preprocess, bad | dict(passing or {}))
        self._source = source
        self._names = table.keys
        self._folder = folder
        self._path = folder.path / index.pixels
        self._attach()

    def _attach(self) -> None:
        size = self.preprocess.size
        num = int(self._slots.max(initial=-1)) + 1
        held = hold(self._folder)
        try:
            self._pixels: NDArray[np.uint8] = np.empty((0, 3, size, size), np.uint8)
            if num:
                mapped = np.memmap(self._path, np.uint8, "r", shape=(num, 3, size, size))
                self._pixels = np.asarray(mapped)
        except BaseException:
            held.close()
            raise
        weakref.finalize(self, held.close)

    def __getstate__(self) -> dict[str, Any]:
        """All but what belongs to this process."""
        return {name: value for name, value in vars(self).items() if name != "_pixels"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Map the pixels in another process."""
        vars(self).update(state)
        self._attach()

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Pictures of some rows.

        Raises:
            FedloraError: if one that is not kept cannot be read any more.
        """
        asked = rows.numpy()
        slots = self._slots[asked]
        kept = slots >= 0
        if kept.all():
            return torch.from_numpy(self._pixels.take(slots, axis=0))
        out = np.empty((len(asked), *self._pixels.shape[1:]), np.uint8)
        out[kept] = self._pixels[slots[kept]]
        self._decode(asked, np.flatnonzero(~kept), out)
        return torch.from_numpy(out)

    def _decode(
        self, rows: NDArray[np.int64], positions: NDArray[np.int64], out: NDArray[np.uint8]
    ) -> None:
        """Read the pictures of some positions in a batch."""
        # Threads of this call alone: a fork would not have them. Small pieces, as sizes differ.
        threads = num_threads()
        length = min(8, -(-len(positions) // threads))
        pieces = [positions[i : i + length] for i in range(0, len(positions), length)]

        def read(piece: NDArray[np.int64]) -> None:
            part = np.empty((len(piece), *out.shape[1:]), np.uint8)
            bad = resized(self._source, rows[piece].tolist(), self.preprocess, part)
            for row, error in bad.items():
                raise FedloraError(
                    f"cannot read the picture {self._names[row]}: {error}. Mend it and start again."
                )
            out[piece] = part

        with ThreadPoolExecutor(min(threads, len(pieces))) as pool:
            for _ in pool.map(read, pieces):
                pass
