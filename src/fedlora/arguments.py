"""The command line before it is parsed, and after it could not be."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from fedlora.errors import FedloraError, UsageError
from fedlora.files import expand
from fedlora.modules.plain_config import from_plain, is_plain
from fedlora.run_folder import RunFolder

if TYPE_CHECKING:
    pass

# Commands beside LightningCLI's: name -> (the module whose run(args) it is, what it does).
TOOLS = {
    "info": ("fedlora.tools.info", "Show how much of a model is trained and how much travels."),
    "partition": ("fedlora.tools.partition", "Show who holds which pictures, before training."),
}


# What is typed for these would not count.
LINKED = {
    "--data.partitioner.num_partitions": "data.num_clients",
    "--data.partitioner.seed": "seed_everything",
    "--data.seed": "seed_everything",
    "--trainer.seed": "seed_everything",
}


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
    path = expand(name, "--config")
    if path.exists() or path.is_absolute():
        if not path.is_file():
            raise FedloraError(f"--config {name}: there is no such file. Check the path.")
        return str(path)
    folder = shipped_configs()
    for candidate in (
        folder / path,
        folder / path.relative_to("configs") if path.parts[0] == "configs" else None,
    ):
        if candidate is not None and candidate.is_file():
            return str(candidate)
    known = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.yaml"))
    raise FedloraError(
        f"--config {name}: there is no such file, and no shipped config of that name. Shipped: "
        f"{', '.join(known)}."
    )


def _ours(path: str) -> str:
    """A config as it is, or the content of one in the plain form mapped onto our sections."""
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return path  # the parser says what is wrong with it
    if not is_plain(config):
        return path
    mapped = from_plain(config, path)
    print(
        f"{path}: model and lora are read as model.* and model.lora.*; all else keeps its default.",
        file=sys.stderr,
    )
    try:
        return json.dumps(mapped)
    except (TypeError, ValueError) as error:  # a date, or an anchor with an alias of itself in it
        raise FedloraError(
            f"{path}: model and lora must hold plain values ({error}). Write them out."
        ) from error


def _check_linked(option: str) -> None:
    linked = LINKED.get(option.replace(".init_args.", "."))
    if linked:
        raise UsageError(f"{option} is filled in from {linked}. Set --{linked} instead.")


def complete(args: Sequence[str]) -> list[str]:
    """Find the configs that are named, and take a run's own where only its checkpoint is given."""
    done: list[str] = []
    configs = 0
    values = {"--ckpt_path": "", "--trainer.default_root_dir": "runs"}
    rest = iter(args)
    for arg in rest:
        option, equals, value = arg.partition("=")
        _check_linked(option)
        if option in ("--config", "-c", *values):
            if not equals:
                value = next(rest, "")
            if option in values:
                values[option] = value
            elif value:
                configs += 1
                value = _ours(find_config(value))
            done += [option, value] if value else [option]
        else:
            done.append(arg)
    if values["--ckpt_path"] and not configs:
        run, _ = RunFolder.of(values["--ckpt_path"], Path(values["--trainer.default_root_dir"]))
        if run.config.is_file():
            done[1:1] = ["--config", str(run.config)]
    return done
