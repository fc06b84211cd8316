"""The C library's memory while clients train."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Of glibc's malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
# What glibc comes to by itself, at most, once a program has freed large blocks.
LARGEST_BLOCK, USUALLY_KEPT = 2**25, 2**26
KEPT = 2**28  # bytes of freed memory that a process may keep
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Let a process keep memory that it has freed, as it will need it again in the next pass.

    glibc gives all but 64 MiB of it back to the system after each pass of a small model, and gets
    it again page by page, which took a tenth of a round (2 CPU cores). Blocks of more than 32 MiB
    go back at once all the same. With another C library, or where somebody has chosen how much is
    kept (:data:`SETTINGS`), nothing changes.
    """
    libc: Any = None
    if platform.libc_ver()[0] == "glibc" and not any(name in os.environ for name in SETTINGS):
        libc = ctypes.CDLL(None)
    if libc is None:
        yield
        return
    libc.mallopt(MMAP_THRESHOLD, LARGEST_BLOCK)
    libc.mallopt(TRIM_THRESHOLD, KEPT)
    try:
        yield
    finally:
        libc.mallopt(TRIM_THRESHOLD, USUALLY_KEPT)
        libc.malloc_trim(0)
