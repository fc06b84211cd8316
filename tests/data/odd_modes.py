"""Pictures of every mode and depth, with their pixels."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
from PIL import Image, features

from tests.data.picture_bytes import chunk, colours, encode, greys, png, tiff

# Name, content, expected pixels (H, W) or (H, W, 3), how far off they may be.
Good = tuple[str, bytes, np.ndarray, int]


def good(name: str, content: bytes, pixels: np.ndarray, tolerance: int = 0) -> Good:
    """With a tolerance of 0 unless said otherwise."""
    return name, content, pixels, tolerance


def modes() -> Iterator[Good]:
    """Every mode of PIL with 8 bits."""
    rgb, grey = colours(), greys()
    yield good("rgb.png", encode(rgb, "PNG"), rgb)
    yield good("grey.png", encode(grey, "PNG"), grey)
    two = np.where(grey > 99, 255, 0).astype(np.uint8)
    yield good("black-and-white.png", encode(Image.fromarray(two).convert("1"), "PNG"), two)

    opacity = np.broadcast_to(np.linspace(0, 255, 20).astype(np.uint8), (12, 20))
    over = (rgb * (opacity / 255)[..., None] + 255 - opacity[..., None]).round()
    rgba = np.dstack([rgb, opacity])
    yield good("transparent-rgba.png", encode(rgba, "PNG"), over, 1)
    yield good("transparent-rgba.tif", encode(rgba, "TIFF"), over, 1)
    grey_alpha = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(opacity.copy())])
    yield good("transparent-grey.png", encode(grey_alpha, "PNG"), np.dstack([over[..., 0]] * 3), 1)
    opaque = np.dstack([rgb, np.full_like(grey, 255)])
    yield good("opaque-rgba.png", encode(opaque, "PNG"), rgb)

    which = np.add.outer(np.arange(12), np.arange(20)).astype(np.uint8) % 3
    table = np.array([[250, 0, 0], [0, 90, 0], [0, 0, 120]], np.uint8)
    palette = Image.fromarray(which, "P")
    palette.putpalette(table.tobytes())
    yield good("palette.png", encode(palette, "PNG"), table[which])
    for kind in ("GIF", "BMP", "TIFF"):
        yield good(f"palette.{kind.lower()}", encode(palette, kind), table[which])
    white = np.array([[250, 0, 0], [255, 255, 255], [0, 0, 120]], np.uint8)
    for kind in ("PNG", "GIF"):
        content = encode(palette, kind, transparency=1)
        yield good(f"palette-one-transparent.{kind.lower()}", content, white[which])
    # 128 of 255 of the colour, the rest white: 250 * 128 / 255 + 127 = 252.5, 0 + 127
    half = np.array([[252, 127, 127], [0, 90, 0], [255, 255, 255]], np.uint8)
    content = encode(palette, "PNG", transparency=bytes([128, 255, 0]))
    yield good("palette-half-transparent.png", content, half[which], 1)
    see_through = np.where(grey == grey[5, 5], 255, grey)
    content = encode(grey, "PNG", transparency=int(grey[5, 5]))
    yield good("grey-one-transparent.png", content, np.dstack([see_through] * 3))

    # PIL's CMYK to RGB: (255 - C) * (255 - K) / 255. JPEG at its best still loses a little.
    cmyk = np.dstack([rgb, np.full_like(grey, 50)])
    by_hand = (255 - rgb.astype(float)) * (205 / 255)
    best = {"quality": 100, "subsampling": 0}
    yield good("cmyk.jpg", encode(Image.fromarray(cmyk, "CMYK"), "JPEG", **best), by_hand, 2)
    yield good("cmyk.tif", encode(Image.fromarray(cmyk, "CMYK"), "TIFF"), by_hand, 1)
    # YCCK: the luma and chroma of the inverted inks, which are the colours; no black.
    ycc = np.asarray(Image.fromarray(255 - rgb).convert("YCbCr"))
    ycck = Image.fromarray(np.dstack([255 - ycc, np.zeros_like(grey)]), "CMYK")
    content = encode(ycck, "JPEG", **best).replace(b"Adobe\0d\0\0\0\0\0", b"Adobe\0d\0\0\0\0\2")
    yield good("ycck.jpg", content, rgb, 6)
    yield good("ycbcr.tif", encode(Image.fromarray(rgb).convert("YCbCr"), "TIFF"), rgb, 3)
    if features.check("littlecms2"):
        yield good("lab.tif", encode(Image.fromarray(rgb).convert("LAB"), "TIFF"), rgb, 16)


def deep() -> Iterator[Good]:
    """More than 8 bits."""
    values = (np.arange(12 * 20).reshape(12, 20) * 273).astype(np.uint16)
    high = values >> 8
    yield good("grey16.png", encode(values, "PNG"), high)
    yield good("grey16.tif", encode(values, "TIFF"), high)
    yield good("grey16-lzw.tif", encode(values, "TIFF", compression="tiff_lzw"), high)
    yield good("grey16.pgm", b"P5 20 12 65535\n" + values.astype(">u2").tobytes(), high)
    # 4095 is white: stretched to 16 bits, rounded
    yield good(
        "grey12.pgm",
        b"P5 20 12 4095\n" + (values >> 4).astype(">u2").tobytes(),
        ((values >> 4) * (65535 / 4095)).round().astype(int) >> 8,
    )
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    content = png((12, 20), 16, 0, rows, chunk(b"tRNS", struct.pack(">H", values[3, 3])))
    yield good("grey16-one-transparent.png", content, np.where(values == values[3, 3], 255, high))
    colour = np.dstack([values, values[::-1], values[:, ::-1]])
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colour)
    yield good("rgb16.png", png((12, 20), 16, 2, rows), colour >> 8)
    data = values.astype("<u2").tobytes()
    yield good("grey16-white-is-0.tif", tiff((12, 20), 16, data, True), 255 - high)
    pairs = (values >> 4).astype(int).reshape(-1, 2)
    packed = [(a >> 4, (a & 15) << 4 | b >> 8, b & 255) for a, b in pairs]
    yield good("grey12.tif", tiff((12, 20), 12, np.array(packed, np.uint8).tobytes()), high)
