"""The checkpoints of a run on disk, and the client states that they need."""

from __future__ import annotations

from collections.abc import Mapping

from fedlora import checkpoint
from fedlora.errors import CheckpointError
from fedlora.personal import ClientStore
from fedlora.run_folder import CHECKPOINTS, RunFolder


class Saves:
    """Writes checkpoints, and deletes a client's state once none of them names it.

    Args:
        run: the run folder.
        store: what stays with the clients.
    """

    def __init__(self, run: RunFolder, store: ClientStore) -> None:
        self.run = run
        self.store = store
        self._versions: dict[str, Mapping[int, int]] = {}
        self._named: set[tuple[int, int]] = set()

    def reopen(self) -> None:
        """Find what there is, and delete the client states that a kill left behind."""
        if self.store.folder.exists():
            self._versions = {name: self._read(name) for name in CHECKPOINTS}
            self.store.prune(self._versions.values())
            self._named = self._in_checkpoints()

    def write(self, content: checkpoint.Checkpoint) -> None:
        """Write ``last.ckpt``; the one before becomes ``previous.ckpt``."""
        checkpoint.save(self.run.checkpoint("last"), content)
        self._versions["previous"] = self._versions.get("last", {})
        self._versions["last"] = content.server.versions

    def keep_as_best(self) -> None:
        """Give ``last.ckpt`` a second name, ``best.ckpt``."""
        checkpoint.keep_as(self.run.checkpoint("last"), self.run.checkpoint("best"))
        self._versions["best"] = self._versions.get("last", {})

    def prune(self) -> None:
        """Delete the client states that no checkpoint needs any more."""
        named = self._in_checkpoints()
        self.store.remove(self._named - named)
        self._named = named

    def _in_checkpoints(self) -> set[tuple[int, int]]:
        """Client id and version of each state that a checkpoint names."""
        return {pair for versions in self._versions.values() for pair in versions.items()}

    def _read(self, name: str) -> Mapping[int, int]:
        try:
            return checkpoint.load(self.run.checkpoint(name)).server.versions
        except CheckpointError:  # missing or damaged: it needs none
            return {}
