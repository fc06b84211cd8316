"""Pictures broken in small ways, the same ones for the same seed."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import numpy as np
from PIL import Image, PngImagePlugin

from tests.data.odd_pictures import odd_pictures
from tests.data.picture_bytes import chunk, encode, exif


def small_pictures() -> list[bytes]:
    """PNG and JPEG files of many modes, a few hundred bytes each."""
    noise = np.random.default_rng(0).integers(0, 256, (13, 17, 4), dtype=np.uint8)
    rgba = Image.fromarray(noise, "RGBA")
    rgb, text = rgba.convert("RGB"), PngImagePlugin.PngInfo()
    text.add_text("a", "b" * 99, zip=True)
    found = [encode(rgba.convert(mode), "PNG") for mode in ("1", "L", "P", "LA", "RGB", "RGBA")]
    found += [encode(rgba.convert(mode), "JPEG") for mode in ("L", "RGB", "CMYK")]
    found += [encode(rgba.quantize(9), "PNG", exif=exif(6)), encode(rgb, "JPEG", exif=exif(5))]
    found += [encode(rgb, "JPEG", progressive=True), encode(rgb, "PNG", pnginfo=text)]
    frames = {"save_all": True, "append_images": [rgb]}
    found += [encode(rgb, "PNG", **frames), encode(rgb, "MPO", **frames)]
    by_hand = ("rgb16.png", "grey16-one-transparent.png")
    return found + [odd.content or b"" for odd in odd_pictures() if odd.name in by_hand]


def mutated(draw: random.Random, content: bytes, other: bytes) -> bytes:
    """``content`` with one to five mistakes, some taken from ``other``."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 5])):
        at, count = draw.randrange(len(data)), draw.choice([1, 2, 4, 30])
        draw.choice(_MISTAKES)(draw, data, at, count, other)
    whole = bytes(data)
    return _mended(whole) if draw.random() < 0.7 and whole[1:4] == b"PNG" else whole


def _flip(draw: random.Random, data: bytearray, at: int, count: int, other: bytes) -> None:
    data[at] ^= 1 << draw.randrange(8)


def _set(draw: random.Random, data: bytearray, at: int, count: int, other: bytes) -> None:
    data[at] = draw.choice([0, 255, 128])


def _noise(draw: random.Random, data: bytearray, at: int, count: int, other: bytes) -> None:
    data[at : at + count] = draw.randbytes(count)


def _cut(draw: random.Random, data: bytearray, at: int, count: int, other: bytes) -> None:
    del data[at + 1 :]


def _drop(draw: random.Random, data: bytearray, at: int, count: int, other: bytes) -> None:
    del data[at + 1 : at + 1 + count]


def _insert(draw: random.Random, data: bytearray, at: int, count: int, other: bytes) -> None:
    data[at:at] = draw.randbytes(count)


def _double(draw: random.Random, data: bytearray, at: int, count: int, other: bytes) -> None:
    data[at:at] = data[at : at + 4 * count]


def _number(draw: random.Random, data: bytearray, at: int, count: int, other: bytes) -> None:
    # Widths, heights and lengths of chunks among them; not so large that memory is at stake.
    value = draw.choice([0, 1, 2_000, len(data), 2**31 - 1, 2**32 - 1])
    data[at : at + 4] = struct.pack(">I", value)


def _mix(draw: random.Random, data: bytearray, at: int, count: int, other: bytes) -> None:
    data[at : at + count] = other[at : at + count] or b"x"


_MISTAKES: list[Callable[[random.Random, bytearray, int, int, bytes], None]] = [
    _flip,
    _set,
    _noise,
    _cut,
    _drop,
    _insert,
    _double,
    _number,
    _mix,
]


def _mended(data: bytes) -> bytes:
    """A PNG with checksums that fit, so that what is wrong is looked at."""
    found, at = data[:8], 8
    while at + 12 <= len(data):
        end = at + 8 + struct.unpack(">I", data[at : at + 4])[0]
        if end > len(data):
            break
        found += chunk(data[at + 4 : at + 8], data[at + 8 : end])
        at = end + 4
    return found + data[at:]
