"""Reading pictures into a set: in parallel, in bounded memory, each of them once."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray

from fedlora.data.cache.base import Reporter, read_in_pieces, resize_into
from fedlora.data.cache.folder import SetFolder, clear_cache_errors
from fedlora.data.cache.index import BAD, NO_PIXELS, UNKNOWN
from fedlora.data.cache.room import check_free, is_free, release, reserve
from fedlora.data.cache.store import Store
from fedlora.data.decode import BadImageError
from fedlora.data.preprocess import ImagePreprocess
from fedlora.data.sources.base import ImageSource

# Most pictures in a chunk, and bytes of them at the model's size: more gain little.
_CHUNK = 16
_CHUNK_BYTES = 16_000_000
# Chunks that may wait to be written: reading goes on while the disk is flushed.
_AHEAD = 32
# Unused pixels below that are not worth a copy of the others.
_WASTE_BYTES = 64_000_000


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Rows that were read.

    ``rows``: all of them; ``kept``: those that ``pixels`` (len(kept), 3, size, size) are of.
    """

    rows: Sequence[int]
    kept: list[int]
    pixels: NDArray[np.uint8]
    bad: dict[int, BadImageError]


class Builder:
    """Fills a set with what is missing in it; for the one process that is working on it.

    Args:
        source: where pictures come from.
        preprocess: the size.
        folder: of the set.
        keys: of all rows, as the index calls them.
        gone: (rows,) True for files that were not there when the table was made: these are
            recorded, as their stamps change when they come.
        reporter: whom to tell.

    Attributes:
        passing: row -> why it cannot be read just now, which is not recorded: tried again next
            time.
    """

    def __init__(
        self,
        source: ImageSource,
        preprocess: ImagePreprocess,
        folder: SetFolder,
        keys: Sequence[bytes],
        gone: NDArray[np.bool_],
        reporter: Reporter | None,
    ) -> None:
        self.passing: dict[int, str] = {}
        self._source = source
        self._preprocess = preprocess
        self._folder = folder
        self._keys = keys
        self._gone = gone
        self._reporter = reporter
        self._room = 0
        self._slot_bytes = 3 * preprocess.size**2
        self._claims = Lock()

    def build(self, store: Store, limit: float) -> None:
        """Read what is missing and keep what the limit allows.

        Args:
            store: the files of the set.
            limit: bytes of pixels in the whole cache folder.

        Raises:
            FedloraError: if the disk has no room for what the limit allows, or cannot be written;
                what was read before that is kept.
        """
        found = store.index.find(self._keys)
        missing = np.flatnonzero((found == UNKNOWN) | (found == NO_PIXELS))
        if not len(missing):
            return
        with clear_cache_errors(self._folder.path):
            self._folder.describe(self._source, self._preprocess)
        try:
            self._room = self._make_room(store, len(missing), limit)
            check_free(self._folder, self._room * store.slot_bytes, self._room)
            # Beyond the room: read only to see whether they are good.
            beyond = missing[self._room :]
            rows = np.concatenate([missing[: self._room], beyond[found[beyond] == UNKNOWN]])
            self._read(store, rows.tolist())
        finally:
            release(self._folder)

    def _make_room(self, store: Store, wanted: int, limit: float) -> int:
        """How many pictures can be added; leaves out some that are not used, where need be."""
        superseded, others = store.index.unused(self._keys)
        if self._is_waste(store, len(superseded), wanted):
            self._compact(store, superseded)
            superseded = []
        room = self._reserve(store, wanted, limit)
        # Other tables of the same pictures may use them: no more than there is a need for, and none
        # where there is more than the limit already.
        out = [*superseded, *(others if room >= 0 else [])][: wanted - room]
        made = room + len(out) + store.num_slots - store.num_recorded
        if room < wanted and made > max(room, 0):
            self._compact(store, out)
            room = self._reserve(store, wanted, limit)
        return max(room, 0)

    def _reserve(self, store: Store, wanted: int, limit: float) -> int:
        size = store.slot_bytes
        return reserve(self._folder, store.num_bytes, wanted * size, limit, size) // size

    @staticmethod
    def _is_waste(store: Store, superseded: int, wanted: int) -> bool:
        """Whether more than half would be of no use to anybody once all is there."""
        used = store.num_recorded - superseded
        waste = store.num_slots - used
        return waste > used + wanted and waste * store.slot_bytes >= _WASTE_BYTES

    def _compact(self, store: Store, without: Sequence[bytes]) -> None:
        # The copy stands beside the old file for a while.
        if is_free(self._folder, store.num_bytes - len(without) * store.slot_bytes):
            store.compact(frozenset(without))

    def _read(self, store: Store, rows: list[int]) -> None:
        if not rows:
            return
        began = time.perf_counter()
        pool = ThreadPoolExecutor(num_threads(), thread_name_prefix="pictures")
        with _one_torch_thread(), self._track(len(rows)) as advance:
            try:
                for chunk in self._chunks(pool, rows):
                    self._add(store, chunk)
                    advance(len(chunk.rows))
            finally:
                try:
                    store.commit()
                finally:
                    pool.shutdown(cancel_futures=True)
        if self._reporter is not None:
            seconds = time.perf_counter() - began
            self._reporter.say(
                f"read {len(rows):,} picture{'s'[: len(rows) != 1]} in {seconds:.1f} s "
                f"({len(rows) / seconds:,.0f} a second) into {self._folder.shown}"
            )

    def _chunks(self, pool: ThreadPoolExecutor, rows: list[int]) -> Iterator[_Chunk]:
        """Chunks in their order, some of them being read ahead."""
        size = max(1, min(_CHUNK, _CHUNK_BYTES // self._slot_bytes))
        start = 0
        waiting: deque[Future[_Chunk]] = deque()
        while waiting or start < len(rows):
            while start < len(rows) and len(waiting) < _AHEAD + num_threads():
                waiting.append(pool.submit(self._read_chunk, rows[start : start + size]))
                start += size
            yield waiting.popleft().result()

    def _read_chunk(self, rows: Sequence[int]) -> _Chunk:
        """In one of several threads."""
        size = self._preprocess.size
        kept: list[int] = []
        found: dict[int, BadImageError] = {}
        pixels = np.empty((len(rows), 3, size, size), dtype=np.uint8)
        for good, bad in read_in_pieces(self._source, rows, self._preprocess):
            with self._claims:
                num = min(len(good), self._room)
                self._room -= num
            some = list(good)[:num]
            images = {i: good[row] for i, row in enumerate(some, len(kept))}
            resize_into(images, self._preprocess, pixels)
            kept += some
            found |= bad
        return _Chunk(rows, kept, pixels[: len(kept)], found)

    def _add(self, store: Store, chunk: _Chunk) -> None:
        kept = {self._keys[row] for row in chunk.kept}
        others: dict[bytes, int] = {}
        reasons: dict[bytes, str] = {}
        for row in chunk.rows:
            key, error = self._keys[row], chunk.bad.get(row)
            if error is None:
                if key not in kept:
                    others[key] = NO_PIXELS
            # A missing permission or a failing disk changes no stamp when it is mended.
            elif error.lasting or self._gone[row]:
                others[key], reasons[key] = BAD, str(error)
            else:
                self.passing[row] = str(error)
        store.add([self._keys[row] for row in chunk.kept], chunk.pixels, others, reasons)

    def _track(self, total: int) -> AbstractContextManager[Callable[[int], None]]:
        if self._reporter is None:
            return nullcontext(lambda _: None)
        return self._reporter.track("reading pictures", total)


def num_threads() -> int:
    """Threads for reading: as many as there are CPUs for this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Threads that begin in this block do not each start torch's own beside them.

    ``set_num_threads`` is for the calling thread and for those that begin later.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
