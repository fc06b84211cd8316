"""Room for pictures: under the limit of the cache folder, and on its disk."""

from __future__ import annotations

import fcntl
import math
import os
import shutil
from contextlib import suppress

from fedlora.data.cache.folder import SetFolder, clear_cache_errors, lock, open_lock
from fedlora.data.cache.index import pixels_files
from fedlora.errors import FedloraError
from fedlora.files import sweep


def reserve(own: SetFolder, kept: int, wanted: int, limit: float, least: int) -> int:
    """Make room under the limit for further pixels of a set; only by who is working on it.

    Sets that no process has open are removed where need be, those not used for longest first.

    Args:
        own: the set.
        kept: bytes of pixels that it has.
        wanted: bytes that are to be added.
        limit: bytes of pixels that all sets together may have.
        least: fewer bytes than these are of no use.

    Returns:
        How many bytes may be added, at most ``wanted``; negative where there are more than the
        limit. Other processes count them as taken until :func:`release`.

    Raises:
        FedloraError: if the cache folder cannot be written.
    """
    with clear_cache_errors(own.root):
        descriptor = os.open(own.root / "room.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            lock(descriptor, fcntl.LOCK_EX, own.root)
            others = {other: other.num_bytes() for other in own.others()}
            room = limit - kept - sum(others.values())
            # Where nothing more fits in any case, nothing is removed.
            fits = limit - kept >= least
            for other in sorted(others, key=SetFolder.last_used) if fits else []:
                if room >= wanted:
                    break
                room += others[other] if _remove(other) else 0
            granted = math.floor(min(wanted, room))
            own.plan.write_text(str(kept + max(0, granted)))
        finally:
            os.close(descriptor)
    return granted


def release(own: SetFolder) -> None:
    """From now on what the set has counts, not what it was about to have."""
    with suppress(OSError):
        own.plan.unlink()


def is_free(own: SetFolder, wanted: int) -> bool:
    """Whether the disk has room for so many bytes."""
    with clear_cache_errors(own.path):
        return wanted <= shutil.disk_usage(own.path).free


def check_free(own: SetFolder, wanted: int, num_pictures: int) -> None:
    """See whether the disk has room.

    Args:
        own: the set.
        wanted: bytes that are to be written.
        num_pictures: in how many pictures.

    Raises:
        FedloraError: if not.
    """
    if is_free(own, wanted):
        return
    free = shutil.disk_usage(own.path).free
    used = sum(folder.kept_bytes() for folder in [own, *own.others()])
    # In tenths of a GB; leaves a twentieth of the disk's room alone.
    fits = math.floor((used + free) * 0.95 / 1e8) / 10
    raise FedloraError(
        f"data.cache_dir: keeping {num_pictures:,} pictures in {own.path} takes {_gb(wanted)}, "
        f"{_gb(free)} are free. Free space, choose another folder with data.cache_dir=FOLDER, or "
        f"keep fewer with data.cache_gb={fits:g} (the others are decoded when needed)."
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def _remove(folder: SetFolder) -> bool:
    """Clear a set away; False if it is in use or not ours to remove."""
    try:
        descriptor = open_lock(folder.in_use)
    except OSError:
        return False
    try:
        if not lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, folder.root):
            return False
        # Our files only. A kill in between leaves a set with fewer pictures, or none.
        sweep(folder.path)
        ours = [folder.index, *pixels_files(folder.path).values(), folder.plan, folder.in_work]
        for file in [*ours, folder.about]:
            file.unlink(missing_ok=True)
        with suppress(OSError):  # somebody's own file is in it
            folder.path.rmdir()
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
