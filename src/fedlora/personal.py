"""What stays with a client between rounds, versioned so that a replayed round reads the old one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from fedlora.errors import CheckpointError
from fedlora.files import clear_os_errors, write_atomically
from fedlora.state import AdapterState


class ClientStore:
    """One folder per client, one file per version: ``<folder>/<id>/<round>.safetensors``.

    A version is always a new file, named after the number of rounds completed once it counts. Which
    one is in force is said by ``ServerState.versions``, which is saved with the checkpoint: a round
    that is played again after a kill reads what the first try read.

    Args:
        folder: where the versions are kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._written: dict[int, int] = {}

    def path(self, client_id: int, version: int) -> Path:
        """The file of one version."""
        return self.folder / str(client_id) / f"{version}.safetensors"

    def write(self, client_id: int, version: int, state: AdapterState) -> None:
        """Keep a client's state; it is in force once :meth:`take_versions` was committed."""
        from safetensors.torch import save_file

        path = self.path(client_id, version)
        with clear_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in state.tensors()}
        write_atomically(path, lambda file: save_file(tensors, file))
        self._written[client_id] = version

    def read(self, client_id: int, versions: Mapping[int, int]) -> AdapterState:
        """The client's state in force; an empty one where it has none.

        Raises:
            CheckpointError: when the file that is in force is gone or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if client_id not in versions:
            return AdapterState()
        path = self.path(client_id, versions[client_id])
        parts: dict[str, dict[str, object]] = {"A": {}, "B": {}, "other": {}}
        try:
            for name, tensor in load_file(path).items():
                part, key = name.split("/", 1)
                parts[part][key] = tensor
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"the state of client {client_id} cannot be read from {path} ({error}). Restore "
                "that file, or start a new run."
            ) from error
        return AdapterState(**parts)  # type: ignore[arg-type]

    def take_versions(self, versions: Mapping[int, int]) -> dict[int, int]:
        """``versions`` with what was written since the last call."""
        merged = {**versions, **self._written}
        self._written = {}
        return merged

    def prune(
        self, keep: Iterable[Mapping[int, int]], clients: Iterable[int] | None = None
    ) -> None:
        """Delete versions that no checkpoint names; called once the checkpoint is in place.

        Args:
            keep: the versions of each checkpoint on disk.
            clients: whose folders to look at; None means all.
        """
        if not self.folder.is_dir():
            return
        named = {self.path(*version) for versions in keep for version in versions.items()}
        folders = (
            self.folder.iterdir() if clients is None else (self.folder / str(c) for c in clients)
        )
        for path in [file for folder in folders for file in folder.glob("*")]:
            if path not in named:
                path.unlink(missing_ok=True)
