"""One of each odd picture, with what reading it must give, for tests of whatever reads pictures.

Expected pixels come from the arrays that the files are made of, not from reading the files.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin, features
from torch import Tensor

from tests.data.odd_modes import deep, modes
from tests.data.picture_bytes import (
    app,
    chunk,
    colours,
    encode,
    exif,
    greys,
    png,
    tensor,
    turned,
)

UNKNOWN = "not a picture of a known format"


@dataclass(frozen=True)
class OddPicture:
    """A file and what reading it gives.

    Attributes:
        name: of the file; says what is odd.
        content: its bytes; None for what is no file with bytes that can be read.
        pixels: (1, H, W) or (3, H, W), uint8, for a good one; None for a bad one.
        tolerance: how far off each pixel may be: formats that lose something.
        why: a regular expression for the reason, for a bad one.
        path: where ``write_odd_pictures`` has put it.
    """

    name: str
    content: bytes | None
    pixels: Tensor | None = None
    tolerance: int = 0
    why: str = ""
    path: Path | None = None

    @property
    def outcome(self) -> str:
        """ "ok" or "bad"."""
        return "bad" if self.pixels is None else "ok"


def write_odd_pictures(folder: Path) -> list[OddPicture]:
    """Write one of each into a folder that exists, links and special files too where possible."""
    written = []
    for odd in odd_pictures():
        path = folder / odd.name
        path.write_bytes(odd.content or b"")
        written.append(replace(odd, path=path))
    return written + list(_no_plain_files(folder))


@cache
def odd_pictures() -> tuple[OddPicture, ...]:
    """All that have a content, in memory."""
    found = [
        *(_good(*each) for each in (*modes(), *deep())),
        *_formats(),
        *_frames(),
        *_turned(),
        *_names(),
        *_sizes(),
        *_bad(),
    ]
    if len({odd.name for odd in found}) != len(found):
        raise ValueError("two odd pictures have the same name")
    return tuple(found)


def _good(name: str, content: bytes, pixels: np.ndarray, tolerance: int = 0) -> OddPicture:
    return OddPicture(name, content, tensor(pixels), tolerance)


def _formats() -> Iterator[OddPicture]:
    rgb, grey, best = colours(), greys(), {"quality": 100, "subsampling": 0}
    yield _good("rgb.jpg", encode(rgb, "JPEG", **best), rgb, 4)
    yield _good("grey.jpg", encode(grey, "JPEG", quality=100), grey, 3)
    yield _good("progressive.jpg", encode(rgb, "JPEG", progressive=True, **best), rgb, 4)
    yield _good("rgb.bmp", encode(rgb, "BMP"), rgb)
    yield _good("rgb.ppm", encode(rgb, "PPM"), rgb)
    yield _good("grey.pgm", encode(grey, "PPM"), grey)
    yield _good("plain.pgm", b"P2 # text\n2 1\n255\n7 250", np.array([[7, 250]]))
    yield _good("plain.pbm", b"P1 3 1 010", np.array([[255, 0, 255]]))
    for squeeze in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"):
        yield _good(f"{squeeze}.tif", encode(rgb, "TIFF", compression=squeeze), rgb)
    if features.check("webp"):
        yield _good("lossless.webp", encode(rgb, "WEBP", lossless=True), rgb)
        yield _good("lossy.webp", encode(rgb, "WEBP", quality=100), rgb, 12)
    if features.check("jpg_2000"):
        yield _good("rgb.jp2", encode(rgb, "JPEG2000"), rgb)
        yield _good("grey.j2k", encode(grey, "JPEG2000", no_jp2=True), grey)
    if features.check("avif"):
        content = encode(rgb, "AVIF", quality=100, subsampling="4:4:4")
        yield _good("rgb.avif", content, rgb, 4)


def _frames() -> Iterator[OddPicture]:
    rgb, best = colours(), {"quality": 100, "subsampling": 0}
    more = {"save_all": True, "append_images": [Image.fromarray(255 - rgb)] * 2}
    yield _good("animated.png", encode(rgb, "PNG", **more), rgb)
    yield _good("pages.tif", encode(rgb, "TIFF", **more), rgb)
    yield _good("two-in-one.mpo", encode(rgb, "MPO", **more, **best), rgb, 4)
    which = (greys() > 99).astype(np.uint8)
    table = np.array([[250, 0, 0], [0, 0, 120]], np.uint8)
    first, second = (Image.fromarray(part, "P") for part in (which, 1 - which))
    for frame in (first, second):
        frame.putpalette(table.tobytes())
    content = encode(first, "GIF", save_all=True, append_images=[second])
    yield _good("animated.gif", content, table[which])
    if features.check("webp"):
        yield _good("animated.webp", encode(rgb, "WEBP", lossless=True, **more), rgb)


def _turned() -> Iterator[OddPicture]:
    rgb, best = colours(), {"quality": 100, "subsampling": 0}
    formats: dict[str, dict[str, object]] = {"PNG": {}, "JPEG": best, "TIFF": {}}
    if features.check("webp"):
        formats["WEBP"] = {"lossless": True}
    for kind, options in formats.items():
        for orientation in range(1, 9):
            content = encode(rgb, kind, exif=exif(orientation), **options)
            name = f"turned-{orientation}.{kind.lower()}"
            yield _good(name, content, turned(rgb, orientation), 4 * (kind == "JPEG"))
    grey = turned(greys(), 6)
    yield _good("turned-grey.png", encode(greys(), "PNG", exif=exif(6)), grey)
    xmp = PngImagePlugin.PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    yield _good("turned-by-xmp.png", encode(rgb, "PNG", pnginfo=xmp), turned(rgb, 6))
    xml = b'<x tiff:Orientation="6"/>'
    content = app(1, b"http://ns.adobe.com/xap/1.0/\0" + xml, encode(rgb, "JPEG", **best))
    yield _good("turned-by-xmp.jpg", content, turned(rgb, 6), 4)
    yield _good("turned-by-xmp.tif", encode(rgb, "TIFF", tiffinfo={700: xml}), turned(rgb, 6))
    both = encode(rgb, "TIFF", tiffinfo={700: xml, 274: 6})
    yield _good("turned-by-both.tif", both, turned(rgb, 6))
    deep = np.full((12, 20), 5 << 8, np.uint16)
    deep[0, 0] = 9 << 8
    yield _good("turned-16.png", encode(deep, "PNG", exif=exif(6)), turned(deep >> 8, 6))

    # Metadata that is broken, pixels that are not.
    jpeg = encode(rgb, "JPEG", **best)
    yield _good("turned-9.jpg", encode(rgb, "JPEG", exif=exif(9), **best), rgb, 4)
    cut = exif(6)[:20]
    yield _good("exif-cut.jpg", encode(rgb, "JPEG", exif=cut, **best), rgb, 4)
    yield _good("exif-cut.png", encode(rgb, "PNG", exif=cut), rgb)
    yield _good("exif-nonsense.jpg", app(1, b"Exif\0\0nonsense", jpeg), rgb, 4)
    yield _good("exif-nonsense.png", encode(rgb, "PNG", exif=b"Exif\0\0nonsense"), rgb)
    # A resolution without a value, over which PIL stumbles before the orientation is asked for.
    dots = struct.pack(">HHII", 296, 3, 1, 2 << 16)
    tags = struct.pack(">HHHII", 2, 282, 7, 1, 0) + dots + bytes(4)
    yield _good("exif-resolution.jpg", app(1, b"Exif\0\0MM\0*\0\0\0\x08" + tags, jpeg), rgb, 4)
    yield _good("mpf-cut.jpg", app(2, b"MPF\0II*\0", jpeg), rgb, 4)
    yield _good("photoshop-cut.jpg", app(13, b"Photoshop 3.0\x008BIM\4\4", jpeg), rgb, 4)
    yield _good("icc-cut.jpg", app(2, b"ICC_PROFILE\0", jpeg), rgb, 4)


def _names() -> Iterator[OddPicture]:
    rgb = colours()
    content = encode(rgb, "PNG")
    names = ["png-in-truth.jpg", "no-extension", "UPPER.PNG", "two words.png", "Zoë 图 🐈.png"]
    names += ["a" * 200 + ".png", ".hidden.png", "a.b..png", "-rf.png", "100%s{}.png", "eps.eps"]
    for name in names:
        yield _good(name, content, rgb)


def _sizes() -> Iterator[OddPicture]:
    yield _good("1x1.png", encode(np.full((1, 1), 77, np.uint8), "PNG"), np.full((1, 1), 77))
    line = (np.arange(30_000) % 256).astype(np.uint8)
    yield _good("1x30000.png", encode(line[None], "PNG"), line[None])
    yield _good("30000x1.png", encode(line[:, None], "PNG"), line[:, None])
    yield _good("1x30000.jpg", encode(line[None] * 0 + 99, "JPEG"), line[None] * 0 + 99, 1)


def _bad() -> Iterator[OddPicture]:
    rgb, unknown = colours(), "32 bits, signed or floating point, whose white nobody knows"
    for name, dtype in (("float.tif", "f4"), ("int32.tif", "i4")):
        yield OddPicture(name, encode(np.zeros((9, 9), dtype), "TIFF"), why=unknown)
    yield OddPicture("float.pfm", b"Pf\n20 12\n-1.0\n" + bytes(960), why=unknown)
    yield OddPicture("empty.png", b"", why="^the file is empty$")
    pages = {
        "text.png": b"hello, this is no picture\n" * 9,
        "error-page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'><rect/></svg>",
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        "zip.png": b"PK\x03\x04" + bytes(40),
        "one-byte.png": b"\x89",
        "mark-only.png": b"\x89PNG\r\n\x1a\n",
        "zeros.png": bytes(1000),
        "no-height.png": png((0, 9), 8, 0, b""),
        "no-width.png": png((9, 0), 8, 0, bytes(9)),
        "broken-header.png": encode(rgb, "PNG").replace(b"IHDR\0", b"IHDR\1"),
    }
    for name, content in pages.items():
        yield OddPicture(name, content, why=UNKNOWN)
    for kind in ("PNG", "JPEG", "BMP", "PPM", "TIFF"):
        content = encode(rgb, kind)
        content = content[: -len(content) // 4]
        yield OddPicture(f"truncated.{kind.lower()}", content, why="^truncated$")
    if features.check("webp"):
        yield OddPicture("truncated.webp", encode(rgb, "WEBP")[:-20], why="cannot be decoded")
    bomb = png((65_000, 65_000), 1, 0, bytes(99))
    yield OddPicture("bomb.png", bomb, why="4225000000 pixels.* exceeds limit of 178956970")
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2 << 20)))
    content = png((1, 1), 8, 0, b"\0\0", text)
    yield OddPicture("text-bomb.png", content, why="cannot be decoded: Decompressed data too large")


def _no_plain_files(folder: Path) -> Iterator[OddPicture]:
    path = folder / "folder.png"
    path.mkdir()
    yield OddPicture(path.name, None, why="^a folder, not a file$", path=path)
    path = folder / "missing.png"
    yield OddPicture(path.name, None, why="^no such file$", path=path)
    path = folder / "rgb.png" / "below-a-file.png"
    yield OddPicture(path.name, None, why="^no such file$", path=path)
    yield from _links(folder)
    if hasattr(os, "mkfifo"):
        path = folder / "pipe.png"
        os.mkfifo(path)
        yield OddPicture(path.name, None, why="^not a regular file$", path=path)
    if hasattr(os, "geteuid") and os.geteuid() != 0:  # root may read all
        path = folder / "secret.png"
        path.write_bytes(b"secret")
        path.chmod(0)
        yield OddPicture(path.name, None, why="^no permission", path=path)


def _links(folder: Path) -> Iterator[OddPicture]:
    good, broken, loop = (folder / f"link-{name}.png" for name in ("good", "broken", "loop"))
    try:
        good.symlink_to(folder / "rgb.png")
    except OSError:  # Windows wants a privilege for it
        return
    yield OddPicture(good.name, None, tensor(colours()), path=good)
    broken.symlink_to(folder / "missing.png")
    yield OddPicture(broken.name, None, why="^no such file$", path=broken)
    loop.symlink_to(loop)
    yield OddPicture(loop.name, None, why="symbolic links", path=loop)
