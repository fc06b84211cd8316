"""``last.ckpt``, the truth about a run: what is in it, and whether it fits."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedlora.errors import CheckpointError
from fedlora.files import clear_os_errors, sha256, write_atomically
from fedlora.state import AdapterState, ServerState

FORMAT = 2
DIGEST = 64  # characters of a SHA-256
# What may differ when a run goes on: none of it changes what the rounds compute, strategy=ddp,
# lanes and threads up to rounding.
FREE = (
    "trainer.max_rounds",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.lanes",
    "trainer.threads",
    "trainer.timeout",
    "trainer.logger",
    "trainer.progress",
    "trainer.default_root_dir",
    "trainer.round_lr.rounds",  # what it comes to is compared apart
    "trainer.averaging.init_args.export_rank",  # of files that are derived
    "trainer.averaging.init_args.export_personal",
    "data.cache_dir",
    "data.cache_gb",
    "model.adapter",  # where a run started from: its checkpoint has all that came of it
    "ckpt_path",
    "config",
    "quiet",
)
# What is said of values that tell a reader nothing.
_SAID = {"pictures_sha256": "pictures were added, taken out or renamed, or are other clients'"}
PACKAGES = ("lightning", "torch", "peft", "transformers", "torchmetrics", "jsonargparse")


def versions() -> dict[str, str]:
    """The versions of Python, fedlora and the packages whose numbers matter."""
    return {"python": platform.python_version(), **_installed()}


@cache  # each is read from a file
def _installed() -> dict[str, str]:
    return {name: version(name) for name in ("fedlora", *PACKAGES)}


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file.

    Attributes:
        server: the server's state.
        rule: ``class_path`` and ``state`` of the aggregation rule.
        callbacks: state of each callback, by class name.
        identity: what the run was started with besides its config (model hash, classes, seed).
        config: the resolved configuration, or None where the run was made from Python.
    """

    server: ServerState
    rule: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; when ``path`` exists it stays in place until the new one is whole.

    ``last.ckpt`` that is replaced becomes ``previous.ckpt``.
    """
    import torch

    content = {"format": FORMAT, "versions": versions(), **to_dict(checkpoint)}

    def write(file: Path) -> None:
        torch.save(content, file)
        _seal(file)
        if path.stem == "last" and path.exists():
            keep_as(path, path.with_name("previous.ckpt"))

    write_atomically(path, write)


def to_dict(checkpoint: Checkpoint) -> dict[str, Any]:
    """Tensors, dicts, lists and numbers only."""
    server = checkpoint.server
    return {
        "round_idx": server.round_idx,
        "adapter": server.adapter.to_dict(),
        "client_versions": dict(server.versions),
        "client_received": dict(server.received),
        "history": [dict(row) for row in server.history],
        "finished": server.finished,
        "rule": dict(checkpoint.rule),
        "callbacks": dict(checkpoint.callbacks),
        "identity": dict(checkpoint.identity),
        "config": checkpoint.config,
    }


def from_dict(content: Mapping[str, Any]) -> Checkpoint:
    """The inverse of :func:`to_dict`."""
    server = ServerState(
        AdapterState.from_dict(content["adapter"]),
        content["round_idx"],
        content["client_versions"],
        content["client_received"],
        tuple(content["history"]),
        content["finished"],
    )
    return Checkpoint(
        server, content["rule"], content["callbacks"], content["identity"], content["config"]
    )


def keep_as(path: Path, copy: Path) -> None:
    """Give a file a second name, so that there is no moment without a whole checkpoint."""
    temporary = copy.with_name(f".{copy.name}.{os.getpid()}.tmp")
    with clear_os_errors(copy):
        temporary.unlink(missing_ok=True)
        try:
            try:
                os.link(path, temporary)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, temporary)
            temporary.replace(copy)
        finally:  # renaming onto another name of the same file does nothing
            temporary.unlink(missing_ok=True)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint; nothing in it is ever executed.

    Raises:
        CheckpointError: when it is missing, damaged or of another format.
    """
    import torch

    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}.")
    try:
        if not _is_whole(path):
            raise CheckpointError(f"{path} is damaged or no checkpoint (its SHA-256 is another).")
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = content["format"]
        if found != FORMAT:
            raise CheckpointError(
                f"{path} has format {found}, this version reads {FORMAT}. Use the version of "
                f"fedlora that wrote it ({content['versions']['fedlora']})."
            )
        return from_dict(content)
    except CheckpointError:
        raise
    except Exception as error:  # torch.load fails with many types on damaged bytes
        raise CheckpointError(
            f"{path} is damaged or no checkpoint ({type(error).__name__})."
        ) from error


def _seal(file: Path) -> None:
    # torch.load does not notice a changed number. A zip file may end with a comment, which
    # torch.load passes over: there goes the checksum of all that is before it.
    with file.open("r+b") as stream:
        stream.seek(-2, os.SEEK_END)
        stream.write(DIGEST.to_bytes(2, "little"))  # the length of the comment
    digest = sha256(file)
    with file.open("ab") as stream:
        stream.write(digest.encode())


def _is_whole(file: Path) -> bool:
    content = file.read_bytes()
    return content[-DIGEST:] == hashlib.sha256(content[:-DIGEST]).hexdigest().encode()


def differences(saved: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> list[str]:
    """Every setting that differs and may not, as ``key: saved -> now``."""
    if saved is None or now is None:
        return []
    old, new = dict(_flat(saved)), dict(_flat(now))
    keys = sorted(key for key in old.keys() | new.keys() if not _is_free(key))
    return [
        _SAID.get(key)
        or f"{key}: {_short(old.get(key, 'absent'))} -> {_short(new.get(key, 'absent'))}"
        for key in keys
        if old.get(key, "absent") != new.get(key, "absent")
    ]


def check_classes(saved: Checkpoint, names: Sequence[str]) -> None:
    """Refuse other classes than the model was trained on: its answers would be called wrong.

    Raises:
        CheckpointError: if they, or their order, differ.
    """
    trained = list(saved.identity.get("class_names", names))
    if trained != list(names):
        raise CheckpointError(
            f"the checkpoint was trained on the classes {_listed(trained)}; the data has "
            f"{_listed(names)}. Set data.source.class_names to the former, in that order."
        )


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:10])}{' …' * (len(names) > 10)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]} … ({len(text)} characters)"


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name, value
