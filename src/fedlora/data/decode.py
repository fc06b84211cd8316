"""From a file or its bytes to pixels, for pictures as they really are."""

from __future__ import annotations

import io
import re
import stat
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedlora.errors import FedloraError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 178_956_970
"""Width x height of the largest picture that is decoded: where PIL, too, draws the line."""

# 8 bytes per pixel is the most that a picture has uncompressed (16-bit RGBA). Larger files are
# not read at all.
_MAX_BYTES = 8 * MAX_PIXELS

# Only formats that begin with a mark of their own, so that the content decides; the common ones
# first. What is not named here is never tried: PIL's EPS reader, for one, starts another program.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
_PIL = re.compile(r"PIL\.")

_JPEG_METADATA = (b"Exif\0\0", b"ICC_PROFILE\0", b"Photoshop 3.0\0")
_WHERE_EXIF_IS = frozenset({"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"})
_ORIENTATION = 274  # a tag of EXIF and TIFF, as are the next two
_BITS_PER_SAMPLE = 258
_PHOTOMETRIC = 262


class BadImageError(FedloraError):
    """A picture that cannot be read; says why in a few words, without the name of the picture.

    Args:
        why: the few words.
        lasting: False for what can pass while the file stays as it is: a missing permission, a
            failing disk, too little memory.
    """

    def __init__(self, why: str, lasting: bool = True) -> None:
        super().__init__(why)
        self.lasting = lasting


def decode(picture: Path | bytes) -> Tensor:
    """Read one picture; safe in several threads at once.

    The content decides on the format, not the extension: PNG, JPEG (MPO), WEBP, BMP, GIF, TIFF,
    PPM (PGM, PBM), JPEG 2000, and AVIF where PIL has it. Of several frames or pages the first is
    taken; the orientation that EXIF tells is applied; transparency is laid over white; 16-bit
    values are cut to their high byte. Whether a truncated picture is an error or is filled up with
    grey is PIL's ``ImageFile.LOAD_TRUNCATED_IMAGES``: an error unless somebody switched it on. The
    cache keeps what came of it: take another folder (``data.cache_dir``) after switching it.

    PIL's warnings (of odd metadata) are switched off for the process, and stay so.

    Args:
        picture: a file, or the content of one.

    Returns:
        (1, H, W) for grey or (3, H, W) for RGB, uint8. Colours with channels last in memory.

    Raises:
        BadImageError: says why.
    """
    content = _content(picture) if isinstance(picture, Path) else picture
    if not content:
        raise BadImageError("the file is empty")
    try:
        return _decoded(content)
    except BadImageError:
        raise
    except Exception as error:  # on broken bytes PIL raises nearly every type there is
        lasting = not isinstance(error, MemoryError)
        raise BadImageError(_reason(error), lasting) from error


def read_all(pictures: Sequence[Path | bytes]) -> list[Tensor | BadImageError]:
    """:func:`decode` of each; an error stands in the place of a picture that cannot be read."""
    found: list[Tensor | BadImageError] = []
    for picture in pictures:
        try:
            found.append(decode(picture))
        except BadImageError as error:
            # A new one: the traceback of the other keeps the picture's bytes in memory.
            found.append(BadImageError(str(error), error.lasting))
    return found


def to_rgb(image: Image) -> Image:
    """Bring a picture to RGB, transparency laid over white, as transformers' ``convert_to_rgb``.

    Args:
        image: of any mode that PIL converts; for grey of 16 or 32 bits PIL's conversion cuts off
            all values above 255.

    Returns:
        Mode "RGB"; may be ``image`` itself.
    """
    import PIL.Image

    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = PIL.Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _content(path: Path) -> bytes:
    try:
        status = path.stat()
        mistake = _mistake(status.st_mode, status.st_size)
        if mistake is None:
            with path.open("rb", buffering=0) as file:
                return file.readall()
    except OSError as error:
        raise BadImageError(_passing(error), lasting=False) from error
    except ValueError:  # a null byte, or a character that the file system cannot have
        mistake = "no such file"
    raise BadImageError(mistake)


def _passing(error: OSError) -> str:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "no such file"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    return f"cannot be read: {error.strerror}"


def _mistake(mode: int, size: int) -> str | None:
    """What is wrong with a file before it is opened: opening a pipe would wait for ever."""
    if stat.S_ISDIR(mode):
        return "a folder, not a file"
    if not stat.S_ISREG(mode):
        return "not a regular file"
    if size > _MAX_BYTES:
        return f"{size} bytes, more than the {_MAX_BYTES} of the largest picture allowed"
    return None


def _decoded(content: bytes) -> Tensor:
    _quiet()
    with _opened(content) as image:
        pixels = image.width * image.height
        if pixels > MAX_PIXELS:  # before anything is decoded
            raise BadImageError(
                f"Image size ({pixels} pixels) exceeds limit of {MAX_PIXELS} pixels"
            )
        image.load()
        return _tensor(_upright(image))


def _opened(content: bytes) -> Image:
    import PIL.Image

    try:
        return PIL.Image.open(io.BytesIO(content), formats=_formats())
    except Exception:
        # PIL reads some metadata of a JPEG at once and refuses the whole file over them; without
        # their marks they are comments.
        bare = content
        for mark in _JPEG_METADATA:
            bare = bare.replace(mark, mark[:-1] + b"-")
        if bare == content or not content.startswith(b"\xff\xd8"):
            raise
        return PIL.Image.open(io.BytesIO(bare), formats=_formats())


def _quiet() -> None:
    """Leave out PIL's warnings, for good.

    They are of no use in a list of thousands of pictures, and where warnings are errors they would
    turn good pictures into bad ones. ``warnings.catch_warnings`` swaps the filters of all threads
    and swaps them back in any order; a filter that is only ever added has no such races.
    """
    if not any(entry[3] == _PIL for entry in warnings.filters[:1]):
        warnings.filterwarnings("ignore", module=_PIL.pattern)


@cache
def _formats() -> tuple[str, ...]:
    from PIL import Image

    Image.init()  # PIL may be built without some
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _upright(image: Image) -> Image:
    """Turn a picture the way EXIF says.

    Not by ``ImageOps.exif_transpose``, which also writes the EXIF anew and so fails on broken
    entries that have nothing to do with the orientation. A TIFF was turned, and its tag taken out,
    in ``load()``.
    """
    from PIL.Image import Transpose

    if _WHERE_EXIF_IS.isdisjoint(image.info):
        return image
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        turn = turns.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # whatever is wrong with the EXIF, the pixels are there
        return image
    return image if turn is None else image.transpose(turn)


def _tensor(image: Image) -> Tensor:
    # Of the formats with mode I only TIFF has values of other than 16 bits in it.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format != "TIFF"):
        return _high_byte(image)
    if image.mode in ("I", "F"):
        raise BadImageError(
            "grey of 32 bits, signed or floating point, whose white nobody knows: save it with 8 "
            "bits"
        )
    if image.mode in ("L", "1") and not image.has_transparency_data:
        grey = image if image.mode == "L" else image.convert("L")
        return _bytes(grey).view(1, image.height, image.width)
    return _bytes(to_rgb(image)).view(image.height, image.width, 3).permute(2, 0, 1)


def _bytes(image: Image) -> Tensor:
    # Half the time of numpy.array for small pictures; torch warns of memory it may not write to.
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)


def _high_byte(image: Image) -> Tensor:
    """8 of 16 bits, as PIL does it with 16-bit RGB (and libpng with all: ``png_set_strip_16``)."""
    tags: Any = getattr(image, "tag_v2", {})  # of a TIFF
    values = np.asarray(image)
    # PIL stretches what has fewer bits to 16, but not in TIFF, where 12 are allowed.
    grey = values >> (tags.get(_BITS_PER_SAMPLE, (16,))[0] - 8)
    if tags.get(_PHOTOMETRIC) == 0:  # 0 is white; PIL turns it round for 8 bits only
        grey = 255 - grey
    transparent = image.info.get("transparency")  # one value that is to be seen through
    if isinstance(transparent, int):
        grey = np.where(values == transparent, 255, grey)
    return torch.from_numpy(grey.astype(np.uint8))[None]


def _reason(error: Exception) -> str:
    """One short line."""
    from PIL import Image, UnidentifiedImageError

    text = str(error)
    if isinstance(error, UnidentifiedImageError):
        return "not a picture of a known format, or its header is broken"
    if isinstance(error, Image.DecompressionBombError):
        return text.split(",")[0]
    if isinstance(error, MemoryError):
        return "too large for the memory there is"
    if "truncated" in text.lower():
        return "truncated"
    text = re.sub(r"<.*?>", "", text)  # objects, with their addresses
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return f"cannot be decoded: {text[:100] or type(error).__name__}"
