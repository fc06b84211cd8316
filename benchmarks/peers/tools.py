"""The tools, the settings that each is tried at, and how each is run."""

from __future__ import annotations

import csv
import inspect
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fedlora.trainer import FederatedTrainer

from . import process
from .environments import python_of
from .sizes import Size
from .work import Task, norm

HERE = Path(__file__).parent
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "FLWR_TELEMETRY_ENABLED": "0"}
TOLERANCE = 1e-4  # of losses, and of norms relative to them


@dataclass(frozen=True)
class Variant:
    """A tool at some setting.

    Attributes:
        tool: ``bare``, ``fedlora``, ``pfl`` or ``flower``.
        name: of the setting.
        threads: of each process.
        processes: that train.
        options: further ones of its command.
        parts: in which it is tried, or sizes of ``spread``; none means all.
        plain: fedlora as it comes, without processes or lanes beside the first.
    """

    tool: str
    name: str
    threads: int = 1
    processes: int = 1
    options: tuple[str, ...] = ()
    parts: frozenset[str] = frozenset()
    plain: bool = False

    def __str__(self) -> str:
        """As it is called in tables."""
        return f"{self.tool}: {self.name}"


def _lanes(lanes: int | str, processes: int, *parts: str) -> Variant:
    name = f"lanes {lanes}, {processes} process{'es' if processes > 1 else ''}"
    return Variant("fedlora", name, 1, processes, (f"--trainer.lanes={lanes}",), frozenset(parts))


ROUNDS = frozenset({"tiny", "vit"})
# Each at what may be best on two cores. What is never best (pfl on one thread where the model is
# large, Flower's model built anew in a short command) is left out where it would cost minutes.
VARIANTS = (
    Variant("bare", "1 thread"),
    Variant("bare", "2 threads", 2, parts=ROUNDS | {"whole"}),
    Variant("fedlora", "1 process, 1 thread", plain=True, parts=ROUNDS | {"whole", "memory"}),
    Variant("fedlora", "1 process, 2 threads", 2, plain=True, parts=ROUNDS | {"whole", "memory"}),
    Variant("fedlora", "2 processes", 1, 2),
    _lanes("auto", 2),
    _lanes(5, 2, "tiny", "whole"),
    # A process has no more lanes than clients: of these only those that differ from ``auto``.
    _lanes(10, 2, "tiny", "tiny-50"),
    _lanes(25, 2, "tiny-200"),
    _lanes(50, 2, "tiny-200"),
    _lanes(20, 1, "tiny", "whole"),
    Variant("pfl", "1 process, 1 thread", parts=frozenset({"tiny", "whole", "memory"})),
    Variant("pfl", "1 process, 2 threads", 2, parts=frozenset({"vit"})),
    Variant("pfl", "2 processes", 1, 2),
    Variant("flower", "model kept", 1, 2, parts=ROUNDS | {"whole", "memory"}),
    Variant("flower", "as the templates", 1, 2, ("--template",), ROUNDS | {"memory"}),
)


def variants(
    part: str, size: Size, tools: Sequence[str], left_out: Sequence[str], best: str
) -> list[Variant]:
    """Those of a part.

    Args:
        part: of the benchmark.
        size: one of its sizes.
        tools: which.
        left_out: of these, as they are called in tables.
        best: settings of fedlora to take in place of all but the plain ones; empty for none.
    """
    name = size.name if part == "spread" else part
    chosen = [
        each for each in VARIANTS if each.tool in tools and (not each.parts or name in each.parts)
    ]
    if best and "fedlora" in tools:
        given = Variant("fedlora", best, options=tuple(shlex.split(best)))
        chosen = [each for each in chosen if each.tool != "fedlora" or each.plain]
        chosen.append(given)
    if "lanes" not in inspect.signature(FederatedTrainer).parameters:
        chosen = [each for each in chosen if "lanes" not in each.name]
    return [each for each in chosen if str(each) not in left_out]


@dataclass(frozen=True)
class Bench:
    """Where things are kept.

    Attributes:
        scratch: the folder.
        pip_options: for making environments.
    """

    scratch: Path
    pip_options: list[str]

    def python(self, tool: str) -> str:
        """The interpreter of a tool."""
        return python_of(tool, self.scratch / "envs", self.pip_options)

    def work(self, size: Size) -> Path:
        """The work of a size."""
        return self.scratch / "work" / size.name

    def play(
        self, variant: Variant, size: Size, rounds: int, memory: bool = False
    ) -> dict[str, Any]:
        """Run a tool from the start of its process to the end, and compare what it computed.

        Returns:
            ``seconds`` of each round, ``whole`` in seconds, ``peak`` in bytes, ``loss_gap`` and
            ``norm_gap``, ``torch`` and ``version``.
        """
        ours = variant.tool == "fedlora"
        out = self.scratch / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        command = (_fedlora if ours else _other)(self, variant, size, rounds, out)
        environment = {
            **QUIET,
            "OMP_NUM_THREADS": str(variant.threads),
            "FLWR_HOME": str(self.scratch / "flower_home"),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        done = process.run(command, environment, self.scratch / "log.txt", memory)
        found = (_read_fedlora if ours else _read_other)(out)
        task = Task.read(self.work(size))
        gaps = compare(found.pop("losses"), found.pop("norms"), task)
        return {**found, **gaps, "whole": done.seconds, "peak": done.peak}


def _other(bench: Bench, variant: Variant, size: Size, rounds: int, out: Path) -> list[str]:
    scripts = {"bare": "bare.py", "pfl": "pfl_simulation.py", "flower": "flower_simulation.py"}
    launcher: list[str] = []
    options = [f"--rounds={rounds}", f"--threads={variant.threads}", *variant.options]
    if variant.tool == "pfl" and variant.processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        launcher.append(f"--nproc-per-node={variant.processes}")
    if variant.tool == "flower":
        options.append(f"--actors={variant.processes}")
    script = str(HERE / scripts[variant.tool])
    places = [str(bench.work(size)), str(out / "result.json")]
    return [bench.python(variant.tool), *launcher, script, *places, *options]


def _fedlora(bench: Bench, variant: Variant, size: Size, rounds: int, out: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "fedlora", "fit"),
        *size.arguments(bench.scratch),
        f"--trainer.max_rounds={rounds}",
        f"--trainer.default_root_dir={out}",
        f"--trainer.threads={variant.threads}",
        f"--trainer.devices={variant.processes}",
        *variant.options,
    ]


def _read_other(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "result.json").read_text(encoding="utf-8")))


def _read_fedlora(out: Path) -> dict[str, Any]:
    """From the tables of the run, and the adapter that it has exported in the end."""
    folder = out / "version_0"
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        seconds = [float(row["time/round_s"]) for row in list(csv.DictReader(file))[1:]]
    losses: list[dict[int, float]] = [{} for _ in seconds]
    with (folder / "clients.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            losses[int(row["round"]) - 1][int(row["id"])] = float(row["loss"])
    weights = (folder / "adapter").glob("*.safetensors")
    last = norm([tensor for path in weights for tensor in load_file(path).values()])
    versions = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["versions"]
    return {
        "seconds": seconds,
        "losses": [[of_round[client] for client in sorted(of_round)] for of_round in losses],
        "norms": [None] * (len(seconds) - 1) + [last],
        "torch": versions["torch"],
        "version": versions["fedlora"],
    }


def compare(
    losses: Sequence[Sequence[float]], norms: Sequence[float | None], task: Task
) -> dict[str, float]:
    """How far losses and (relative) norms are from those of the task."""
    pairs = [
        (mine, theirs)
        for mine_all, theirs_all in zip(losses, task.losses, strict=False)
        for mine, theirs in zip(mine_all, theirs_all, strict=True)
    ]
    known = [(a, b) for a, b in zip(norms, task.norms, strict=False) if a is not None]
    return {
        "loss_gap": max(abs(a - b) for a, b in pairs),
        "norm_gap": max(abs(a / b - 1) for a, b in known),
    }
