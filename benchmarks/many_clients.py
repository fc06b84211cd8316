"""Ten thousand clients: set-up, memory, and what a client's turn costs beside its training.

Each run has a process of its own. Exit code 1 where a figure misses its target.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from clients import (
    MB,
    PARTS,
    WATCH,
    Clock,
    command,
    count_tensors,
    growth,
    kept_tensors,
)
from from_config import FromConfig
from memory import resident
from vit_folder import make_vit_b32_folder

from fedlora import files
from fedlora.aggregation.meter import AggregationMeter
from fedlora.callbacks.base import FederatedCallback, Row
from fedlora.engines.local import LocalLoop
from fedlora.modules.lora import LoRAWrapper
from fedlora.personal import ClientStore
from fedlora.trainer import FederatedTrainer

FEW, MANY, COHORT = 10, 10_000, 100
ROWS = 10  # of each of the many
EARLY, ROUNDS = 2, 12  # the round from which memory counts, and the last
FEDAVG, FEDSA = "rules/fedavg.yaml", "personal/fedsa.yaml"
SETUP, SHARE, FLAT = 20.0, 1.05, 5.0  # seconds; times as much; percent
TINY, VIT = 5.0, 20.0  # ms a client
NO_VALIDATION = ("--data.client_val_fraction=0",)  # of a client: it would be larger with few
MORE = (  # of what ``clients.py`` takes together
    (AggregationMeter, "_add", "the meter"),
    (LocalLoop, "open", "a fresh optimizer"),
    (LoRAWrapper, "state", "reading the adapter"),
    (ClientStore, "take_noted", "flushing what stays"),
    (files, "flush", "flushing to the disk"),
)
BESIDE = ("training", "evaluation", WATCH)


@dataclass(frozen=True)
class Run:
    """What a process plays.

    Attributes:
        clients: in all.
        cohort: of these in a round.
        rounds: how many.
        rows: of each client.
        overlay: over clip_lora.yaml.
        settings: what else differs from it.
    """

    clients: int
    cohort: int
    rounds: int
    rows: int = ROWS
    overlay: str = FEDAVG
    settings: tuple[str, ...] = ()


class Look(FederatedCallback):
    """Looks at memory and clock after each round.

    Attributes:
        began: when training began, by the clock on the wall.
        rows: what was found after each round; seconds and calls by part.
        peak: the most memory until the rounds were over, in bytes.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.began = 0.0
        self.rows: list[dict[str, Any]] = []
        self.peak = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """All is set up; next the untrained model is evaluated."""
        self.began = time.time()

    def on_round_end(self, trainer: FederatedTrainer, pl_module: Any, row: Row) -> None:
        """Count, and set the clock back."""
        gc.collect()
        self.rows.append(
            {
                "round": trainer.server.round_idx,
                "resident": resident("VmRSS"),
                "tensors": count_tensors(),
                "seconds": dict(self.clock.seconds),
                "calls": dict(self.clock.calls),
            }
        )
        self.clock.seconds.clear()
        self.clock.calls.clear()

    def on_train_end(self, trainer: FederatedTrainer, pl_module: Any) -> None:
        """Look at the peak before what comes after the rounds."""
        self.peak = resident("VmHWM")


def play(run: Run, started: float, root: Path) -> dict[str, Any]:
    """Play a run in this process, which was started at that time of the wall's clock."""
    clock, imported = Clock(), time.time()
    for owner, name, label in (*PARTS, *MORE, (Look, "on_round_end", WATCH)):
        clock.watch(owner, name, label, whole=label in BESIDE)
    look = Look(clock)
    options = argparse.Namespace(**asdict(run))
    built = FromConfig(
        *command(options, root),
        "--data.batch_size=8",
        "--trainer.averaging.export_personal=false",
        *run.settings,
    )
    built.trainer.callbacks.append(look)
    built.fit()
    pictures = vars(built.datamodule.holdings.images).values()
    return {
        "from start": look.began - started,
        "from imports": look.began - imported,
        "peak": look.peak,
        "pictures": sum(getattr(each, "nbytes", 0) for each in pictures),
        "rows": look.rows,
    }


@cache
def result(run: Run) -> dict[str, Any]:
    """What a run gives in a process whose memory nothing else has touched."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "result.json"
        told = json.dumps({**asdict(run), "started": time.time()})
        subprocess.run([sys.executable, __file__, f"--one={told}", f"--json={file}"], check=True)
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def divided(clients: int) -> dict[str, Any]:
    """The same pictures among so many clients, of whom as many as the few play in a round."""
    return result(Run(clients, FEW, ROUNDS, MANY * ROWS // clients, settings=NO_VALIDATION))


class Targets:
    """Prints figures beside their targets.

    Attributes:
        missed: how many are above theirs.
    """

    def __init__(self) -> None:
        self.missed = 0

    def check(self, what: str, value: float, most: float, unit: str) -> None:
        """One figure."""
        missed = not value <= most
        self.missed += missed
        told = f"target at most {most:g}{': missed' * missed}"
        print(f"  {what:<58} {value:9.3f} {unit:<8} {told}")


def setup(targets: Targets) -> None:
    """Until the first round could begin; the untrained model is evaluated after that."""
    print(f"\nset-up, {MANY * ROWS:,} pictures")
    many, few = divided(MANY), divided(FEW)
    for what in ("from start", "from imports"):
        name = f"{MANY:,} clients, {what} of the process"
        targets.check(name.replace("imports", "the end of imports"), many[what], SETUP, "s")
    print(f"  the same with {FEW} clients: {few['from start']:.3f}, {few['from imports']:.3f} s")


def memory(targets: Targets) -> None:
    """The same pictures divided among many and among few, of whom as many play in a round."""
    print(f"\nmemory, {FEW} clients a round, {MANY * ROWS:,} pictures divided among them")
    many, few = divided(MANY), divided(FEW)
    last = [median(row["resident"] for row in each["rows"][-EARLY:]) for each in (many, few)]
    for what, sizes in (("peak", [many["peak"], few["peak"]]), ("at the end", last)):
        for also, less in (("", 0), (" without the pictures", many["pictures"])):
            name = f"{what}{also}, MB with {MANY:,} and with {FEW}"
            pair = [size - less for size in sizes]
            shown = f"{name}: {pair[0] / MB:,.1f}, {pair[1] / MB:,.1f}"
            targets.check(shown, pair[0] / pair[1], SHARE, "times")
    print(f"\nmemory over {ROUNDS} rounds, {MANY:,} clients, {COHORT} a round")
    for overlay in (FEDAVG, FEDSA):
        found = result(Run(MANY, COHORT, ROUNDS, overlay=overlay))
        first, end = kept_tensors(found, EARLY)
        targets.check(f"growth of the resident set, {overlay}", growth(found, EARLY), FLAT, "%")
        targets.check(f"tensors more at the end, {overlay}", end - first, 0, "")


def overhead(targets: Targets) -> None:
    """Beside training and evaluation, on the embedded model."""
    for overlay in (FEDAVG, FEDSA):
        print(f"\noverhead, tiny-clip, {MANY:,} clients, {COHORT} a round, {overlay}")
        show(targets, result(Run(MANY, COHORT, ROUNDS, overlay=overlay)), TINY)


def vit(targets: Targets) -> None:
    """The same at ViT-B/32's size, where a step is long: fewer clients and rounds."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_vit_b32_folder(Path(scratch) / "model")
        settings = (
            f"--model.model_name={folder}",
            "--model.lora.r=16",
            "--model.lora.lora_alpha=32",
            "--data.batch_size=2",
            "--trainer.val_every_n_rounds=1000",
            *NO_VALIDATION,
        )
        print(f"\noverhead, ViT-B/32 size, r 16, {COHORT} clients a round")
        show(targets, result(Run(2 * COHORT, COHORT, 3, 2, settings=settings)), VIT)


def show(targets: Targets, found: Mapping[str, Any], most: float) -> None:
    """What a client costs beside its training, and where that goes, over the rounds."""
    rows = [row for row in found["rows"] if row["round"]]
    each = [1000 * beside(row["seconds"]) / COHORT for row in rows]
    targets.check(
        f"median of {len(each)} rounds ({min(each):.2f} to {max(each):.2f})",
        median(each),
        most,
        "ms each",
    )
    parts = {label: cost(rows, label) for _, _, label in (*PARTS, *MORE)}
    for label, milliseconds in sorted(parts.items(), key=lambda pair: -pair[1]):
        calls = median(row["calls"].get(label, 0) for row in rows)
        apart = "  (apart)" if label in BESIDE else ""
        print(f"    {label:<40} {milliseconds:8.3f} ms each, {calls:g} calls a round{apart}")


def beside(seconds: Mapping[str, float]) -> float:
    """The seconds of a round that are neither training nor evaluation."""
    return sum(spent for label, spent in seconds.items() if label not in BESIDE)


def cost(rows: Sequence[Mapping[str, Any]], label: str) -> float:
    """Milliseconds of a part per client, median over rounds."""
    return median(1000 * row["seconds"].get(label, 0.0) / COHORT for row in rows)


MEASURE: dict[str, Callable[[Targets], None]] = {
    "setup": setup,
    "memory": memory,
    "overhead": overhead,
    "vit": vit,
}


def main() -> int:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", action="append", choices=MEASURE, help="all by default")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        started = options.one.pop("started")
        run = Run(**{**options.one, "settings": tuple(options.one["settings"])})
        with tempfile.TemporaryDirectory() as scratch:
            found = play(run, started, Path(scratch))
        options.json.write_text(json.dumps(found), encoding="utf-8")
        return 0
    targets = Targets()
    for part in options.part or MEASURE:
        MEASURE[part](targets)
    return int(targets.missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
