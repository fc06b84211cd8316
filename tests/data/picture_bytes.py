"""Bytes of small picture files, for tests: what PIL writes, and what it does not."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def colours(height: int = 12, width: int = 20) -> np.ndarray:
    """(H, W, 3): smooth, and different in every corner."""
    down, right = np.mgrid[:height, :width]
    channels = (20 + 200 * down // height, 230 - 200 * right // width, 40 + 8 * (down + right) // 2)
    return np.stack(channels, -1).clip(0, 255).astype(np.uint8)


def greys() -> np.ndarray:
    """(H, W)."""
    return np.ascontiguousarray(colours()[..., 0])


def tensor(pixels: np.ndarray) -> Tensor:
    """(H, W, 3) or (H, W) -> channels first."""
    first = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(first).astype(np.uint8))


def encode(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    """A file's bytes."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(shape: tuple[int, ...], bits: int, kind: int, rows: bytes, *more: bytes) -> bytes:
    """A PNG by hand: ``rows`` with their filter bytes, ``more`` chunks before them."""
    header = struct.pack(">IIBBBBB", shape[1], shape[0], bits, kind, 0, 0, 0)
    parts = (
        chunk(b"IHDR", header),
        *more,
        chunk(b"IDAT", zlib.compress(rows)),
        chunk(b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(shape: tuple[int, ...], bits: int, data: bytes, white_is_zero: bool = False) -> bytes:
    """An uncompressed grey TIFF by hand."""
    tags = [
        (256, shape[1]),
        (257, shape[0]),
        (258, bits),
        (259, 1),
        (262, 0 if white_is_zero else 1),
    ]
    tags += [(273, 8 + 2 + 12 * 8 + 4), (278, shape[0]), (279, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def exif(orientation: int) -> bytes:
    """EXIF with an orientation and a maker."""
    tags = Image.Exif()
    tags[274], tags[271] = orientation, "a maker"
    return tags.tobytes()


def app(number: int, data: bytes, jpeg: bytes) -> bytes:
    """A JPEG with an application segment put in front."""
    return jpeg[:2] + struct.pack(">BBH", 0xFF, 0xE0 + number, len(data) + 2) + data + jpeg[2:]


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """What is to be seen, by the table of the EXIF standard: where row 0 and column 0 are."""
    turns = {
        1: lambda x: x,  # top, left
        2: lambda x: x[:, ::-1],  # top, right
        3: lambda x: x[::-1, ::-1],  # bottom, right
        4: lambda x: x[::-1],  # bottom, left
        5: lambda x: x.swapaxes(0, 1),  # left, top
        6: lambda x: x.swapaxes(0, 1)[:, ::-1],  # right, top
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),  # right, bottom
        8: lambda x: x.swapaxes(0, 1)[::-1],  # left, bottom
    }
    return turns[orientation](pixels)
