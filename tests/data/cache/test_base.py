from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlora.data import BadImageError, ImagePreprocess, ImageSource, ImageTable
from fedlora.data.cache.base import MemoryPictures, resize_into, resized

GREY = (0.5, 0.5, 0.5)
PREPROCESS = ImagePreprocess(8, True, GREY, GREY)


class Given(ImageSource):
    """Pictures from a list, or one tensor; remembers in which chunks it was asked for them."""

    def __init__(self, images):
        super().__init__(["a {}."])
        self.images = images
        self.asked = []

    @property
    def class_names(self):
        return ["a", "b"]

    def load(self):
        n = len(self.images)
        return ImageTable(np.zeros(n, np.int64), np.full(n, "train"), np.arange(n))

    def read(self, rows):
        self.asked.append(list(rows))
        if isinstance(self.images, torch.Tensor):
            return self.images[list(rows)]
        return [self.images[row] for row in rows]


def noise(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, s, generator=generator, dtype=torch.uint8) for s in shapes]


def test_pictures_in_memory_are_read_once_in_chunks_and_copied_out():
    images = noise(*[(3, 9 + i % 3, 12) for i in range(600)])
    source = Given(images)
    pictures = MemoryPictures(source, 600, PREPROCESS)
    assert [len(rows) for rows in source.asked] == [1, 511, 1, 87]
    rows = torch.tensor([599, 0, 511, 512, 0])
    batch = pictures[rows]
    assert (batch.dtype, batch.shape) == (torch.uint8, (5, 3, 8, 8))
    assert torch.equal(batch, torch.stack([PREPROCESS.resize(images[row]) for row in rows]))
    batch.zero_()
    assert pictures[rows].sum() > 0
    assert (pictures.bad, len(source.asked)) == ({}, 4)


@pytest.mark.parametrize("shape", [(4, 1, 10, 20), (4, 3, 90, 100)])
def test_one_tensor_for_all(shape):
    (images,) = noise(shape)
    pictures = MemoryPictures(Given(images), 4, PREPROCESS)
    assert torch.equal(pictures[torch.arange(4)], PREPROCESS.resize(images))


def test_bad_pictures_are_told_by_row():
    images = [*noise((1, 8, 9)), BadImageError("truncated"), *noise((3, 20, 9))]
    pictures = MemoryPictures(Given(images), 3, PREPROCESS)
    assert pictures.bad == {1: "truncated"}
    assert torch.equal(pictures[torch.tensor([2])][0], PREPROCESS.resize(images[2]))
    out = np.empty((2, 3, 8, 8), np.uint8)
    assert resized(Given(images), [1, 0], PREPROCESS, out) == {1: images[1]}
    assert np.array_equal(out[1], PREPROCESS.resize(images[0]).numpy())


def test_a_source_that_returns_another_number_of_pictures():
    source = Given(noise((1, 8, 8), (1, 8, 8)))
    source.read = lambda rows: source.images[: len(rows) - 1]
    with pytest.raises(ValueError, match="shorter"):
        MemoryPictures(source, 2, PREPROCESS)


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("size", [7, 16, 64])
def test_together_as_alone_to_the_bit(size, crop, resample):
    preprocess = ImagePreprocess(size, crop, GREY, GREY, resample)
    shapes = [(3, 28, 28), (1, 28, 28), (3, 31, 50), (1, size, size), (3, 120, 90)] * 5
    images = noise(*shapes)
    # As decoders leave them: channels last in memory.
    images[::2] = [im.permute(1, 2, 0).contiguous().permute(2, 0, 1) for im in images[::2]]
    alone = np.stack([preprocess.resize(image).numpy() for image in images])
    together = np.zeros_like(alone)
    resize_into(dict(enumerate(images)), preprocess, together)
    assert np.array_equal(together, alone)
    backwards = np.zeros_like(alone)
    resize_into({i: images[i] for i in reversed(range(25))}, preprocess, backwards)
    assert np.array_equal(backwards, alone)
