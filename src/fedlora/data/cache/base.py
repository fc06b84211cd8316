"""Pictures at the model's size: read once, resized once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.data.decode import BadImageError
from fedlora.data.preprocess import ImagePreprocess
from fedlora.data.sources.base import ImageSource

# Most pictures read at a time, and about how many bytes of them: bounds the memory needed beside
# the result.
_CHUNK = 512
_PIECE_BYTES = 16_000_000
# Up to so many bytes the call costs more than the resizing, and pictures of one shape share one;
# larger ones are slower together (at 300 x 400 twice as slow), as they fall out of the CPU's cache.
_TINY = 16_384


class Reporter(Protocol):
    """Whom to tell how far it is; the trainer's progress display is one."""

    def say(self, text: str) -> None:
        """One line."""

    def track(self, what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """A progress bar; what it gives is called with the number of further steps done."""


class Pictures(ABC):
    """All pictures of a source as uint8 at one size.

    Attributes:
        preprocess: how they were brought to it.
        bad: row -> why it cannot be read. Such rows must not be asked for.
    """

    def __init__(self, preprocess: ImagePreprocess, bad: Mapping[int, str]) -> None:
        self.preprocess = preprocess
        self.bad = dict(bad)

    @abstractmethod
    def __getitem__(self, rows: Tensor) -> Tensor:
        """Pictures of some rows.

        Args:
            rows: (n,) int64.

        Returns:
            (n, 3, size, size), uint8, on the CPU.
        """


class MemoryPictures(Pictures):
    """All pictures in memory, for sources that hold theirs there anyway.

    Args:
        source: where they come from; ``load()`` was called.
        num_rows: how many there are.
        preprocess: the size that they are brought to.
    """

    def __init__(self, source: ImageSource, num_rows: int, preprocess: ImagePreprocess) -> None:
        size = preprocess.size
        bad: dict[int, str] = {}
        self._images = np.empty((num_rows, 3, size, size), dtype=np.uint8)
        for start in range(0, num_rows, _CHUNK):
            rows = range(start, min(start + _CHUNK, num_rows))
            found = resized(source, rows, preprocess, self._images[rows.start : rows.stop])
            bad |= {row: str(error) for row, error in found.items()}
        super().__init__(preprocess, bad)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Pictures of some rows."""
        # numpy copies on one thread: for a batch, waking torch's others costs more than it saves.
        return torch.from_numpy(self._images.take(rows.numpy(), axis=0))


def resized(
    source: ImageSource, rows: Sequence[int], preprocess: ImagePreprocess, out: NDArray[np.uint8]
) -> dict[int, BadImageError]:
    """Read and resize some rows.

    Args:
        source: where they come from.
        rows: which, n of them.
        preprocess: the size.
        out: (n, 3, size, size), filled; what stands in the place of a bad picture is undefined.

    Returns:
        row -> why it cannot be read.
    """
    found: dict[int, BadImageError] = {}
    start = 0
    for good, bad in read_in_pieces(source, rows, preprocess):
        found |= bad
        end = start + len(good) + len(bad)
        piece = enumerate(rows[start:end], start)
        resize_into({i: good[row] for i, row in piece if row in good}, preprocess, out)
        start = end
    return found


def read_in_pieces(
    source: ImageSource, rows: Sequence[int], preprocess: ImagePreprocess
) -> Iterator[tuple[dict[int, Tensor], dict[int, BadImageError]]]:
    """Read some rows in their order, of large pictures few at a time.

    How large they are shows when they are read: first one, then as many of its size as are to be in
    memory at once.

    Yields:
        row -> (C, H, W), uint8, emptied when the next ones are asked for; and row -> why it cannot
        be read or brought to the size.
    """
    start, length = 0, 1
    while start < len(rows):
        good, bad = _read_rows(source, rows[start : start + length], preprocess)
        start += length
        largest = max((image.nbytes for image in good.values()), default=_PIECE_BYTES)
        length = max(1, _PIECE_BYTES // largest)
        yield good, bad
        good.clear()


def _read_rows(
    source: ImageSource, rows: Sequence[int], preprocess: ImagePreprocess
) -> tuple[dict[int, Tensor], dict[int, BadImageError]]:
    good: dict[int, Tensor] = {}
    bad: dict[int, BadImageError] = {}
    for row, image in zip(rows, source.read(rows), strict=True):
        if isinstance(image, BadImageError):
            bad[row] = image
            continue
        refusal = preprocess.refuses(*image.shape[-2:])
        if refusal is None:
            good[row] = image
        else:
            bad[row] = BadImageError(refusal)
    return good, bad


def resize_into(
    images: Mapping[int, Tensor], preprocess: ImagePreprocess, out: NDArray[np.uint8]
) -> None:
    """Resize pictures; the result for one does not depend on the others.

    Args:
        images: position in ``out`` -> (C, H, W), uint8; sizes may differ.
        preprocess: the size.
        out: (n, 3, size, size), filled at these positions.
    """
    alike: defaultdict[torch.Size, list[int]] = defaultdict(list)
    for position, image in images.items():
        if image.nbytes <= _TINY:
            alike[image.shape].append(position)
        else:
            out[position] = preprocess.resize(image).numpy()
    for positions in alike.values():
        batch = torch.stack([images[position] for position in positions])
        out[positions] = preprocess.resize(batch).numpy()
