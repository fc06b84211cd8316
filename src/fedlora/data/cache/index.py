"""The index of the pictures kept on disk: what lies where, appended to block by block."""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# What stands in the place of a slot where there is none.
NO_PIXELS = -1  # readable, but not kept
BAD = -2  # not readable
UNKNOWN = -3  # never read

# Keys are the digest of the row's key, then the digest of its stamp.
_ROW, _STAMP = 16, 8
_RECORD = np.dtype([("key", f"V{_ROW + _STAMP}"), ("slot", "<i8")])
_BLOCK = struct.Struct("<4sII")  # magic, length of the payload, its CRC-32
_COUNT = struct.Struct("<I")
_MAGIC = b"FLPX"
_PIXELS = re.compile(r"pixels-(\d+)\.u8")


@dataclass
class Index:
    """What an index says.

    Attributes:
        pixels: name of the file of pixels.
        slots: key -> position in that file, in pictures; ``NO_PIXELS`` or ``BAD``.
        reasons: key of a bad picture -> why it cannot be read.
        end: bytes of the index that are whole; the next block goes there.
    """

    pixels: str
    slots: dict[bytes, int] = field(default_factory=dict)
    reasons: dict[bytes, str] = field(default_factory=dict)
    end: int = 0

    def add(self, slots: Mapping[bytes, int], reasons: Mapping[bytes, str]) -> None:
        """Take in further records; of two about one picture the later one counts."""
        for key in slots.keys() & self.reasons.keys():
            del self.reasons[key]
        self.slots.update(slots)
        self.reasons.update(reasons)

    def find(self, keys: Sequence[bytes]) -> NDArray[np.int64]:
        """Where pictures lie: (n,), a slot, ``NO_PIXELS``, ``BAD`` or ``UNKNOWN``."""
        found = (self.slots.get(key, UNKNOWN) for key in keys)
        return np.fromiter(found, dtype=np.int64, count=len(keys))

    def drop_beyond(self, num_slots: int) -> bool:
        """Forget pictures that the file of pixels is too short for; True if there were any."""
        lost = [key for key, slot in self.slots.items() if slot >= num_slots]
        for key in lost:
            del self.slots[key]
        return bool(lost)

    def unused(self, keys: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
        """Pixels that none of these pictures needs.

        Returns:
            Those whose row is among ``keys`` with another stamp, and all others; oldest first.
        """
        needed, rows = set(keys), {key[:_ROW] for key in keys}
        unused = [k for k, slot in self.slots.items() if slot >= 0 and k not in needed]
        superseded = [key for key in unused if key[:_ROW] in rows]
        return superseded, [key for key in unused if key[:_ROW] not in rows]


def keys_of(rows: NDArray[Any], stamps: NDArray[np.str_]) -> list[bytes]:
    """What pictures are called in an index.

    Args:
        rows: (n,), keys of the table.
        stamps: (n,), stamps of the table.

    Returns:
        n keys of 24 bytes.
    """
    # repr() tells 1 from "1" and escapes what UTF-8 cannot say (file names need not be text).
    return [
        blake2b(repr(row).encode(), digest_size=_ROW).digest()
        + blake2b(repr(stamp).encode(), digest_size=_STAMP).digest()
        for row, stamp in zip(rows.tolist(), stamps.tolist(), strict=True)
    ]


def header(identity: str, pixels: str) -> bytes:
    """The first block of an index.

    Args:
        identity: of the set; an index with another one is not read.
        pixels: name of the file of pixels.
    """
    return _block(json.dumps({"set": identity, "pixels": pixels}).encode())


def records(slots: Mapping[bytes, int], reasons: Mapping[bytes, str]) -> bytes:
    """A further block.

    Args:
        slots: key -> slot, ``NO_PIXELS`` or ``BAD``.
        reasons: why, for those that are bad.
    """
    table = np.empty(len(slots), dtype=_RECORD)
    table["key"] = np.frombuffer(b"".join(slots), dtype=_RECORD["key"])
    table["slot"] = list(slots.values())
    bad = [reasons[key] for key, slot in slots.items() if slot == BAD]
    return _block(_COUNT.pack(len(slots)) + table.tobytes() + json.dumps(bad).encode())


def read_index(path: Path, identity: str) -> Index | None:
    """Read an index, up to the first block that is torn or damaged.

    Args:
        path: the file.
        identity: of the set.

    Returns:
        None if there is no index of this set.

    Raises:
        OSError: if there is one that cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    blocks = _blocks(data)
    index = _start(next(blocks, None), identity)
    if index is None:
        return None
    # No earlier than after the last block does it count as read.
    for payload, index.end in blocks:
        index.add(*_parse(payload))
    return index


def pixels_name(number: int) -> str:
    """The name of a file of pixels; each time they are copied together the number is a new one."""
    return f"pixels-{number}.u8"


def pixels_files(folder: Path) -> dict[int, Path]:
    """All files of pixels in a folder, by their numbers."""
    found = ((_PIXELS.fullmatch(path.name), path) for path in folder.glob("pixels-*.u8"))
    return {int(match[1]): path for match, path in found if match}


def _block(payload: bytes) -> bytes:
    return _BLOCK.pack(_MAGIC, len(payload), zlib.crc32(payload)) + payload


def _blocks(data: bytes) -> Iterator[tuple[memoryview, int]]:
    """Payload of each whole block, and where the next block starts."""
    start, view = 0, memoryview(data)
    while start + _BLOCK.size <= len(data):
        magic, length, checksum = _BLOCK.unpack_from(data, start)
        payload = view[start + _BLOCK.size :][:length]
        if magic != _MAGIC or len(payload) < length or zlib.crc32(payload) != checksum:
            return
        start += _BLOCK.size + length
        yield payload, start


def _start(first: tuple[memoryview, int] | None, identity: str) -> Index | None:
    if first is None:
        return None
    try:
        told = json.loads(bytes(first[0]))
        known = told["set"] == identity and _PIXELS.fullmatch(told["pixels"])
    except (ValueError, KeyError, TypeError):
        return None
    return Index(told["pixels"], end=first[1]) if known else None


def _parse(payload: memoryview) -> tuple[dict[bytes, int], dict[bytes, str]]:
    (count,) = _COUNT.unpack_from(payload)
    table = np.frombuffer(payload, dtype=_RECORD, count=count, offset=_COUNT.size)
    slots = dict(zip(table["key"].tolist(), table["slot"].tolist(), strict=True))
    why = json.loads(bytes(payload[_COUNT.size + table.nbytes :]))
    bad = [key for key, slot in slots.items() if slot == BAD]
    return slots, dict(zip(bad, why, strict=True))
