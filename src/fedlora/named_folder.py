"""A folder of named things that several processes may use at once."""

from __future__ import annotations

import difflib
import fcntl
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_data_path

from fedlora.errors import FedloraError
from fedlora.files import clear_os_errors, expand, present, recover, sweep

# No separator and no dot in front: a name cannot lead out of the folder or hide in it.
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
LOCK = ".lock"


class NamedFolder:
    """Things with names in a folder, which several processes may use at once.

    Args:
        folder: where; None means the user's own data folder.
    """

    kind = ""  # how messages name a thing
    subfolder = ""
    suffix = ""

    def __init__(self, folder: str | Path | None = None) -> None:
        root = user_data_path("fedlora") if folder is None else expand(folder, "folder")
        self.folder = root / self.subfolder

    def exists(self, name: str) -> bool:
        """Whether there is one of this name."""
        return present(self.path(name)).exists()

    def path(self, name: str) -> Path:
        """Where something of this name is or will be.

        Raises:
            FedloraError: for a name that cannot be one.
        """
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise FedloraError(
                f"name must be 1 to 100 of A-Z, a-z, 0-9, '-', '_' and '.', not starting with a "
                f"dot, got {name!r}."
            )
        return self.folder / f"{name}{self.suffix}"

    def names(self) -> list[str]:
        """The names that there are, sorted."""
        found = set()
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            # After a kill between two renames the hidden old version is the one that counts.
            hidden = path.name.startswith(".") and path.name.endswith(".old")
            name = path.name[1 : -len(".old")] if hidden else path.name
            name = name.removesuffix(self.suffix)
            if NAME.fullmatch(name) and self.is_one(present(self.path(name))):
                found.add(name)
        return sorted(found)

    def is_one(self, path: Path) -> bool:
        """Whether a path holds what is kept here."""
        return path.is_file()

    def find(self, name: str) -> Path:
        """Where something of this name is now.

        Raises:
            FedloraError: where there is none, with the nearest name and all that there are.
        """
        path = present(self.path(name))
        if not path.exists():
            names = self.names()
            close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            there = f"There are: {', '.join(names)}" if names else "There are none yet"
            raise FedloraError(f"there is no {self.kind} {name!r}{hint} {there} ({self.folder}).")
        return path

    def make_room(self, name: str, overwrite: bool) -> Path:
        """Where to write; only inside :meth:`writing`.

        Raises:
            FedloraError: where the name is taken and may not be overwritten.
        """
        path = self.path(name)
        recover(path)
        if path.exists() and not overwrite:
            raise FedloraError(
                f"there is a {self.kind} {name!r} already ({path}). Set overwrite=True to replace "
                "it, or choose another name."
            )
        return path

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Alone: nobody else writes or reads."""
        with clear_os_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / LOCK).open("a")
        with file:
            with clear_os_errors(self.folder):
                fcntl.flock(file, fcntl.LOCK_EX)
                sweep(self.folder)
            yield

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While nobody writes. Needs no right to write."""
        try:
            file = (self.folder / LOCK).open()
        except OSError:  # nobody ever wrote here, or it was copied without the lock
            yield
            return
        with file:
            fcntl.flock(file, fcntl.LOCK_SH)
            yield

    def delete(self, name: str) -> None:
        """Delete in one step.

        Raises:
            FedloraError: where there is none of this name.
        """
        self.find(name)  # so that a wrong name makes no folder
        with self.writing():
            path = self.find(name)
            with clear_os_errors(path):
                # Out of sight in one step; the next sweep goes on where a kill ends this one.
                path.rename(path.with_name(f".{path.name}.tmp"))
            sweep(self.folder)
