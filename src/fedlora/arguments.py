"""The command line before it is parsed, and after it could not be."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from fedlora.errors import FedloraError
from fedlora.run_folder import RunFolder


def shipped_configs() -> Path:
    """The folder of the shipped configs: in the wheel, or beside ``src`` in an editable install."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parents[1] / "configs"


def find_config(name: str) -> str:
    """A config path as given, or among the shipped ones where there is none in the working folder.

    Raises:
        FedloraError: when it is in neither; lists what is shipped.
    """
    path = Path(name).expanduser()
    if path.exists() or path.is_absolute():
        if not path.is_file():
            raise FedloraError(f"--config {name}: there is no such file. Check the path.")
        return str(path)
    folder = shipped_configs()
    for candidate in (folder / path, folder / path.relative_to("configs") if path.parts[0] == "configs" else None):
        if candidate is not None and candidate.is_file():
            return str(candidate)
    known = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.yaml"))
    raise FedloraError(
        f"--config {name}: there is no such file, and no shipped config of that name. Shipped: "
        f"{', '.join(known)}."
    )


def complete(args: Sequence[str]) -> list[str]:
    """Find the configs that are named, and take a run's own where only its checkpoint is given."""
    done: list[str] = []
    configs = 0
    values = {"--ckpt_path": "", "--trainer.default_root_dir": "runs"}
    rest = iter(args)
    for arg in rest:
        option, equals, value = arg.partition("=")
        if option in ("--config", "-c", *values):
            if not equals:
                value = next(rest, "")
            if option in values:
                values[option] = value
            elif value:
                configs += 1
                value = find_config(value)
            done += [option, value] if value else [option]
        else:
            done.append(arg)
    if values["--ckpt_path"] and not configs:
        run, _ = RunFolder.of(values["--ckpt_path"], Path(values["--trainer.default_root_dir"]))
        if run.config.is_file():
            done[1:1] = ["--config", str(run.config)]
    return done


def nearest(error: Exception) -> str:
    """One line from a parser's error, with the nearest name that exists."""
    return " ".join(str(error).split())
