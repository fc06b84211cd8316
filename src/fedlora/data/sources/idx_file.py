"""The idx format of MNIST and its likes: bytes with a shape, plain or gzipped."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedlora.data.sources.files_on_disk import printable
from fedlora.errors import FedloraError

_GZIP = b"\x1f\x8b"
# No more comes out of a byte of gzip: tells a broken header before memory is asked for.
_MOST_PER_BYTE = 1040


@dataclass(frozen=True)
class IdxFile:
    """An array of bytes in a file, its header read and its content not.

    Attributes:
        path: the file.
        shape: of the array.
    """

    path: Path
    shape: tuple[int, ...]

    @classmethod
    def open(cls, path: Path, ndim: int) -> IdxFile:
        """Read and check the header.

        Args:
            path: the file; whether it is gzipped is told by its content.
            ndim: how many axes the array must have.

        Raises:
            FedloraError: if it cannot be read, is no idx file of unsigned bytes with that many
                axes, or its length does not fit its header.
        """
        with _content(path) as file:
            header = file.read(4 + 4 * ndim)
        if header[:4] != bytes([0, 0, 8, ndim]):
            raise _broken(
                path,
                f"is no idx file of bytes with {ndim} axes: it begins with "
                f"{header[:4].hex(' ') or 'nothing'}, not 00 00 08 {ndim:02x}",
            )
        if len(header) < 4 + 4 * ndim:
            raise _broken(path, "is cut short within its header")
        shape = struct.unpack(f">{ndim}I", header[4:])
        expected, length = len(header) + math.prod(shape), path.stat().st_size
        if not _is_gzipped(path) and length != expected:
            raise _broken(path, f"has {length:,} bytes, its header tells of {expected:,}")
        if expected > _MOST_PER_BYTE * length:
            raise _broken(path, f"is too small for the {expected:,} bytes its header tells of")
        return cls(path, shape)

    def read_into(self, out: NDArray[np.uint8]) -> None:
        """Read the content.

        Args:
            out: contiguous, of this file's shape; filled.

        Raises:
            FedloraError: if there is less or more content than the header says.
        """
        view = out.data.cast("B")
        with _content(self.path) as file:
            file.read(4 + 4 * len(self.shape))
            position = 0
            # In pieces: gzip makes a copy of whatever is asked for at once.
            while position < len(view):
                count = file.readinto(view[position : position + (1 << 20)])
                if not count:
                    raise _broken(self.path, "is cut short")
                position += count
            if file.read(1):  # at the end gzip compares its checksum, too
                raise _broken(self.path, "has more content than its header tells of")


@contextmanager
def _content(path: Path) -> Iterator[BufferedIOBase]:
    try:
        with gzip.open(path) if _is_gzipped(path) else path.open("rb") as file:
            yield file
    except EOFError as error:
        raise _broken(path, "is cut short") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise _broken(path, f"is a broken gzip file ({error})") from error
    except OSError as error:
        raise FedloraError(
            f"the file {printable(str(path))} cannot be read: {error.strerror or error}."
        ) from error


def _is_gzipped(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == _GZIP


def _broken(path: Path, what: str) -> FedloraError:
    return FedloraError(f"the file {printable(str(path))} {what}. Download it again.")
