"""What stays with a client between rounds, versioned so that a replayed round reads the old one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from fedlora.errors import CheckpointError
from fedlora.files import clear_os_errors, write_atomically
from fedlora.state import AdapterState

OWN, MEMORY = "own/", "memory/"  # what the names of the tensors in a file begin with


@dataclass(frozen=True)
class Kept:
    """What a client keeps until it plays again; none of it is ever seen by a rule.

    Attributes:
        adapter: what of the adapter is its own: loaded in the place of the server's.
        own: a second adapter, where the client trains a model of its own beside the common one.
        memory: what an objective remembers of it.
    """

    adapter: AdapterState = field(default_factory=AdapterState)
    own: AdapterState = field(default_factory=AdapterState)
    memory: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, under the name that it has in a file."""
        yield from self.adapter.tensors()
        for name, tensor in self.own.tensors():
            yield f"{OWN}{name}", tensor
        for name, tensor in self.memory.items():
            yield f"{MEMORY}{name}", tensor

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return next(self.tensors(), None) is not None

    def nbytes(self) -> int:
        """Bytes of the file that holds it."""
        from safetensors.torch import save

        return len(save(self.copies()))

    def copies(self) -> dict[str, Tensor]:
        """Every tensor by name, apart: no file can hold tensors that share memory."""
        return {name: tensor.contiguous().clone() for name, tensor in self.tensors()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Kept:
        """The inverse of :meth:`tensors`.

        Raises:
            ValueError: for a name that is of nothing.
        """
        own = {n.removeprefix(OWN): t for n, t in tensors.items() if n.startswith(OWN)}
        memory = {n.removeprefix(MEMORY): t for n, t in tensors.items() if n.startswith(MEMORY)}
        rest = {n: t for n, t in tensors.items() if not n.startswith((OWN, MEMORY))}
        return cls(AdapterState.from_tensors(rest), AdapterState.from_tensors(own), memory)


@dataclass(frozen=True)
class Storage:
    """What the clients' states of a run take on disk, before there is any.

    Attributes:
        each: bytes of a client's file; 0 where nothing stays with the clients.
        clients: clients that can have one by the end.
        cohort: clients that get a new one in a round.
        free: bytes free where they go.
    """

    each: int
    clients: int
    cohort: int
    free: int

    @property
    def all(self) -> int:
        """Bytes once every client that can has its state."""
        return self.each * self.clients

    @property
    def most(self) -> int:
        """Bytes that are never exceeded.

        The best checkpoint may need an older state of every client, the one before last those of
        its last round, and a round that is being played writes its own.
        """
        return 2 * self.each * (self.clients + self.cohort)

    @property
    def lacking(self) -> bool:
        """Whether there may be too little room."""
        return self.most > self.free


class ClientStore:
    """One folder per client, one file per version: ``<folder>/<id>/<round>.safetensors``.

    A version is always a new file, named after the number of rounds completed once it counts. Which
    one is in force is said by ``ServerState.versions``, which is saved with the checkpoint: a round
    that is played again after a kill reads what the first try read.

    Args:
        folder: where the versions are kept.
        writes: False where another process writes the same.
    """

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder = folder
        self.writes = writes
        self._noted: dict[int, int] = {}

    def path(self, client_id: int, version: int) -> Path:
        """The file of one version."""
        return self.folder / str(client_id) / f"{version}.safetensors"

    def write(self, client_id: int, version: int, kept: Kept) -> None:
        """Keep what is a client's; it is in force once :meth:`take_noted` was committed."""
        from safetensors.torch import save_file

        if not self.writes:
            return
        path = self.path(client_id, version)
        with clear_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        tensors = kept.copies()
        write_atomically(path, lambda file: save_file(tensors, file))
        self.note(client_id, version)

    def note(self, client_id: int, version: int) -> None:
        """Take note of a version that was written, by this process or another."""
        self._noted[client_id] = version

    def read(self, client_id: int, versions: Mapping[int, int]) -> Kept:
        """What the client keeps, as is in force; nothing where it has none.

        Raises:
            CheckpointError: when the file that is in force is gone or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        if client_id not in versions:
            return Kept()
        path = self.path(client_id, versions[client_id])
        try:
            return Kept.from_tensors(load(path.read_bytes()))
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(
                f"the state of client {client_id} cannot be read from {path} ({error}). Restore "
                "that file, or start a new run."
            ) from error

    def take_noted(self) -> dict[int, int]:
        """Client id -> version of what was noted since the last call."""
        noted, self._noted = self._noted, {}
        return noted

    def remove(self, versions: Iterable[tuple[int, int]]) -> None:
        """Delete versions, each client id and version."""
        for client_id, version in versions:
            self.path(client_id, version).unlink(missing_ok=True)

    def prune(self, keep: Iterable[Mapping[int, int]]) -> None:
        """Delete every version that no checkpoint names, whatever wrote it.

        Args:
            keep: the versions of each checkpoint on disk.
        """
        if not self.folder.is_dir():
            return
        named = {self.path(*version) for versions in keep for version in versions.items()}
        for path in self.folder.glob("*/*"):
            if path not in named:
                path.unlink(missing_ok=True)
