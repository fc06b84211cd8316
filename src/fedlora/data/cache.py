"""Pictures at the model's size, read and resized once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedlora.data.preprocess import ImagePreprocess
from fedlora.data.sources import ImageSource

# Pictures read and resized at a time: bounds the memory needed beside the result.
_CHUNK = 512


class PictureCache:
    """All pictures of a source as uint8, in memory.

    Args:
        source: where they come from; ``load()`` was called.
        num_rows: how many there are.
        preprocess: the size that they are brought to.
    """

    def __init__(self, source: ImageSource, num_rows: int, preprocess: ImagePreprocess) -> None:
        self.preprocess = preprocess
        size = preprocess.size
        self._images = np.empty((num_rows, 3, size, size), dtype=np.uint8)
        for start in range(0, num_rows, _CHUNK):
            rows = range(start, min(start + _CHUNK, num_rows))
            found = source.read(rows)
            if isinstance(found, Tensor):
                self._images[rows.start : rows.stop] = preprocess.resize(found).numpy()
            else:
                for row, image in zip(rows, found, strict=True):
                    self._images[row] = preprocess.resize(image).numpy()

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Pictures of some rows.

        Args:
            rows: (n,) int64.

        Returns:
            (n, 3, size, size), uint8, on the CPU.
        """
        # numpy copies on one thread: for a batch, waking torch's others costs more than it saves.
        return torch.from_numpy(self._images.take(rows.numpy(), axis=0))
