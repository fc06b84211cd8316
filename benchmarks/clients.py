"""Many clients that keep something: memory over the rounds, bytes on disk, time beside training.

A run with many clients of whom few play in a round, each keeping what the overlay lets stay with
it; then the same with only as many clients as play in a round. Each has a process of its own. Exit
code 1 where the resident set grows from early rounds to the last ones by more than ``--flat``
percent, where there are more tensors at the end, or where ``clients/`` takes more than was
announced before the first round.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, wraps
from pathlib import Path
from statistics import median
from threading import get_ident
from typing import Any

import numpy as np
import torch
from from_config import FromConfig
from memory import resident
from torch import Tensor

from fedlora import artefacts, checkpoint, rounds
from fedlora.callbacks.averaging import AdapterAveraging
from fedlora.callbacks.base import FederatedCallback, Row
from fedlora.callbacks.records import Records
from fedlora.data.sources.base import ImageSource, ImageTable
from fedlora.engines.local import LocalLoop
from fedlora.engines.sequential import SequentialEngine
from fedlora.modules.lora import LoRAWrapper
from fedlora.personal import ClientStore
from fedlora.run_folder import RunFolder
from fedlora.saves import Saves
from fedlora.trainer import FederatedTrainer

MB = 1e6
CLASSES, SIZE = 10, 8
WATCH = "this watch"
SPAN = 5  # rounds whose median counts: malloc gives memory back when it likes
HELD = 100  # rows that the server validates on, and as many that it tests on
# What is timed, each without what of the others it calls: (whose, which, what it is called).
PARTS: tuple[tuple[Any, str, str], ...] = (
    (LocalLoop, "step", "training"),
    (rounds, "plan", "plan"),
    (LoRAWrapper, "load", "loading an adapter"),
    (SequentialEngine, "_start", "rule.distribute, what is sent"),
    (ClientStore, "read", "reading what stays"),
    (ClientStore, "write", "writing what stays"),
    (Saves, "prune", "prune"),
    (AdapterAveraging, "average", "the rest of engine and averaging"),
    (rounds.Rounds, "_evaluate", "evaluation"),
    (checkpoint, "save", "last.ckpt"),
    (checkpoint, "keep_as", "best.ckpt, previous.ckpt"),
    (artefacts, "export", "export of adapter/"),
    (Records, "on_client_end", "clients.csv"),
    (Records, "on_round_end", "metrics.csv and TensorBoard"),
    (rounds.Rounds, "play", "the rest of the round"),
)
ENDS: tuple[tuple[Any, str, str], ...] = (
    (rounds.Rounds, "test", "the server's test"),
    (artefacts, "write_client_scores", "the clients' own tests"),
    (artefacts, "export_personal", "adapters/"),
)


class Patterns(ImageSource):
    """Pictures that are cheap to make: one pattern per class under noise, grey, 8 x 8 pixels.

    Args:
        count: training rows; validation and test rows come on top.
    """

    def __init__(self, count: int = 40_000) -> None:
        self.count = count
        super().__init__(["a picture of pattern {}."])

    @property
    def class_names(self) -> list[str]:
        """The numbers of the patterns."""
        return [str(number) for number in range(CLASSES)]

    def load(self) -> ImageTable:
        """Rows whose classes take turns."""
        total = self.count + 2 * HELD
        split = np.repeat(["train", "val", "test"], [self.count, HELD, HELD])
        return ImageTable(np.arange(total) % CLASSES, split, np.arange(total))

    def read(self, rows: Sequence[int]) -> Tensor:
        """Pictures (n, 1, 8, 8), uint8."""
        which = np.asarray(rows) % CLASSES
        noise = np.random.default_rng([1, *rows[:1]]).integers(0, 128, (len(rows), 1, SIZE, SIZE))
        return torch.from_numpy((self._patterns[which] + noise).astype(np.uint8))

    @cached_property
    def _patterns(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.random.default_rng(0).integers(0, 128, (CLASSES, 1, SIZE, SIZE))


class Clock:
    """Adds up the time in some functions, each without that of the others that it calls.

    What other threads do counts where this one waits for them.

    Attributes:
        seconds: by what they are called.
        calls: likewise.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._inner = [0.0]
        self._whole = False
        self._thread = get_ident()

    def watch(self, owner: Any, name: str, label: str, whole: bool = False) -> None:
        """Put a stopwatch around a function of a module or a class.

        Args:
            owner: the module or class.
            name: the function.
            label: what it is called.
            whole: with that of the others that it calls, whose own watches stand still.
        """
        function: Callable[..., Any] = getattr(owner, name)

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._whole or get_ident() != self._thread:
                return function(*args, **kwargs)
            began = time.perf_counter()
            self._inner.append(0.0)
            self._whole = whole
            try:
                return function(*args, **kwargs)
            finally:
                self._whole = False
                spent = time.perf_counter() - began
                self.seconds[label] += spent - self._inner.pop()
                self.calls[label] += 1
                self._inner[-1] += spent

        setattr(owner, name, timed)


class Watch(FederatedCallback):
    """Looks at memory and disk after each round.

    Attributes:
        rows: what was found after each round.
        found: what was found once.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.rows: list[dict[str, float]] = []
        self.found: dict[str, Any] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Ask for what is announced, before any client has anything."""
        self.found["announced"] = announced(trainer)
        self.found["began"] = time.perf_counter()

    def on_round_end(self, trainer: FederatedTrainer, pl_module: Any, row: Row) -> None:
        """Count, before older client states are pruned: there are never more of them."""
        run, server = trainer.rounds.run, trainer.server
        if not server.round_idx:
            self.clock.seconds.clear()
            self.clock.calls.clear()
        gc.collect()
        self.rows.append(
            {
                "round": server.round_idx,
                "resident": resident("VmRSS"),
                "tensors": count_tensors(),
                "played": len(server.versions),
                "turns": server.round_idx * trainer.rounds.round(0).cohort,
                "clients/": sum(client_files(run)),
                "last.ckpt": run.checkpoint("last").stat().st_size,
                "clients.csv": run.clients_csv.stat().st_size,
                "metrics.csv": run.metrics.stat().st_size,
            }
        )

    def on_train_end(self, trainer: FederatedTrainer, pl_module: Any) -> None:
        """What the rounds took, without the evaluation before the first."""
        self.found |= {
            "seconds": dict(self.clock.seconds),
            "calls": dict(self.clock.calls),
            "peak of the rounds": resident("VmHWM"),
        }
        self.clock.seconds.clear()
        self.clock.calls.clear()


def announced(trainer: FederatedTrainer) -> dict[str, int]:
    """``Rounds.storage``, and what it makes of it."""
    storage = trainer.rounds.storage()
    return {**asdict(storage), "all": storage.all, "most": storage.most}


def client_files(run: RunFolder) -> list[int]:
    """Bytes of each file in ``clients/``."""
    return [file.stat().st_size for file in run.clients.glob("*/*")]


def count_tensors() -> int:
    """Tensors that Python holds."""
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


def measure(options: argparse.Namespace, rest: Sequence[str], root: Path) -> dict[str, Any]:
    """Play a run and look at it."""
    clock = Clock()
    for owner, name, label in (*PARTS, *ENDS, (Watch, "on_round_end", WATCH)):
        clock.watch(owner, name, label)
    watch = Watch(clock)
    imported, began = resident("VmRSS"), time.perf_counter()
    built = FromConfig(*command(options, root), *rest)
    # Behind all others, so that it sees what they leave.
    built.trainer.callbacks.append(watch)
    built.fit()
    run, pictures = built.trainer.rounds.run, vars(built.datamodule.holdings.images)
    exported = [path for path in (run.path / "adapters").rglob("*") if path.is_file()]
    return {
        **watch.found,
        "rows": watch.rows,
        "end": {"seconds": dict(clock.seconds), "calls": dict(clock.calls)},
        "setup": watch.found["began"] - began,
        "imported": imported,
        "pictures": sum(getattr(each, "nbytes", 0) for each in pictures.values()),
        "peak": resident("VmHWM"),
        "largest file": max(client_files(run), default=0),
        "adapters/": sum(path.stat().st_size for path in exported),
        "adapters": len({path.parent for path in exported}),
    }


def command(options: argparse.Namespace, root: Path) -> list[str]:
    """The settings of a run."""
    return [
        "--config=clip_lora.yaml",
        f"--config={options.overlay}",
        "--data.source=clients.Patterns",
        f"--data.source.count={options.rows * options.clients}",
        f"--data.num_clients={options.clients}",
        "--data.partitioner=flwr_datasets.partitioner.IidPartitioner",
        f"--trainer.clients_per_round={options.cohort}",
        f"--trainer.max_rounds={options.rounds}",
        "--trainer.local_steps=1",
        "--trainer.accelerator=cpu",
        "--trainer.progress=off",
        f"--trainer.default_root_dir={root}",
    ]


def run(options: argparse.Namespace, clients: int, rest: Sequence[str]) -> dict[str, Any]:
    """Measure in a process of its own, whose memory nothing else has touched."""
    names = ("cohort", "rounds", "rows", "early", "overlay")
    asked = [f"--{name}={getattr(options, name)}" for name in names]
    arguments = ["--one", f"--clients={clients}", *asked, *rest]
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        subprocess.run([sys.executable, __file__, *arguments, f"--json={result}"], check=True)
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return {"clients": clients, **found}


def grown(result: Mapping[str, Any], early: int) -> float:
    """Bytes by which the resident set is larger in the last rounds than in early ones."""
    sizes = [row["resident"] for row in result["rows"]]
    return median(sizes[-SPAN:]) - median(sizes[early : early + SPAN])


def growth(result: Mapping[str, Any], early: int) -> float:
    """The same in percent."""
    sizes = [row["resident"] for row in result["rows"]]
    return float(100 * grown(result, early) / median(sizes[early : early + SPAN]))


def kept_tensors(result: Mapping[str, Any], early: int) -> tuple[int, int]:
    """The most tensors in early rounds and in the last ones."""
    counts = [int(row["tensors"]) for row in result["rows"]]
    return max(counts[early : early + SPAN]), max(counts[-SPAN:])


def excess(result: Mapping[str, Any]) -> list[str]:
    """Where ``clients/`` took more than was announced."""
    told, most = result["announced"], max(row["clients/"] for row in result["rows"])
    found = []
    if result["largest file"] > told["each"]:
        found.append(f"a client keeps {result['largest file']:,} bytes, not {told['each']:,}")
    if most > told["most"]:
        found.append(f"clients/ took {most:,} bytes, not at most {told['most']:,}")
    return found


def show(result: Mapping[str, Any], early: int) -> None:
    """Print a result."""
    rows, told = result["rows"], result["announced"]
    first, last = rows[early], rows[-1]
    turns, count = last["turns"] - first["turns"], last["round"] - first["round"]
    each = grown(result, early) / (turns - told["cohort"] * (SPAN - 1))
    print(f"\n{result['clients']:,} clients, {told['cohort']} a round, {last['round']} rounds")
    print("  resident set after the round, MB (tensors that Python holds):")
    for row in [rows[0], *rows[early : -1 : max(1, count // 6)], last]:
        print(f"    {row['round']:>5.0f}  {row['resident'] / MB:8.1f}  ({row['tensors']:,.0f})")
    print(
        f"  growth from rounds {early} to {early + SPAN - 1} to the last {SPAN}, medians: "
        f"{growth(result, early):+.1f} %, {each:+,.0f} bytes a client turn"
    )
    print(
        f"  peak: {result['peak of the rounds'] / MB:,.1f} MB in the rounds, "
        f"{result['peak'] / MB:,.1f} in the run; imports {result['imported'] / MB:,.1f}, pictures "
        f"{result['pictures'] / MB:,.1f}"
    )
    most = max(row["clients/"] for row in rows)
    print(
        f"  clients/: {last['clients/'] / MB:,.2f} MB of {last['played']:,} clients, at most "
        f"{most / MB:,.2f}; announced: {told['each']:,} bytes each (largest file "
        f"{result['largest file']:,}), {told['all'] / MB:,.2f} MB for {told['clients']:,}, at most "
        f"{told['most'] / MB:,.2f}"
    )
    for name, per, times in (
        ("clients.csv", "client turn", turns),
        ("metrics.csv", "round", count),
        ("last.ckpt", "round", count),
    ):
        grew = (last[name] - first[name]) / times
        print(f"  {name}: {last[name]:,} bytes, grows by {grew:,.0f} a {per}")
    _show_times(result, last["round"], told["cohort"])


def _show_times(result: Mapping[str, Any], count: int, cohort: int) -> None:
    seconds = {name: s for name, s in result["seconds"].items() if name != WATCH}
    beside = sum(s for name, s in seconds.items() if name not in ("training", "evaluation"))
    print(
        f"  a round: {1000 * sum(seconds.values()) / count:,.1f} ms, of it training "
        f"{1000 * seconds['training'] / count:,.1f}, evaluation without loading "
        f"{1000 * seconds['evaluation'] / count:,.1f}; all else {1000 * beside / count:,.1f}, "
        f"{1000 * beside / count / cohort:,.2f} ms per client:"
    )
    for name, spent in sorted(seconds.items(), key=lambda pair: -pair[1]):
        if name not in ("training", "evaluation"):
            calls = result["calls"][name] / count
            print(f"    {name:<34} {1000 * spent / count:8.2f} ms, {calls:.1f} calls")
    print(f"  until the first round: {result['setup']:.1f} s; after the last:")
    for name, spent in sorted(result["end"]["seconds"].items(), key=lambda pair: -pair[1]):
        print(f"    {name:<34} {spent:8.2f} s, {result['end']['calls'][name]:,} calls")
    print(f"  adapters/: {result['adapters']:,} folders, {result['adapters/'] / MB:,.2f} MB")


def compare(many: Mapping[str, Any], few: Mapping[str, Any]) -> None:
    """Print what many clients cost in memory beside few."""
    bare = [each["peak of the rounds"] - each["pictures"] for each in (many, few)]
    print(
        f"\n{many['clients']:,} clients beside {few['clients']:,}: peak of the rounds "
        f"{many['peak of the rounds'] / few['peak of the rounds']:.3f} times as much, without the "
        f"pictures {bare[0] / bare[1]:.3f} ({(bare[0] - bare[1]) / MB:+,.1f} MB, "
        f"{(bare[0] - bare[1]) / (many['clients'] - few['clients']):,.0f} bytes a client)"
    )


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what of it goes to fedlora."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="What else is given goes to fedlora: --model.lora.r=4 …"
    )
    parser.add_argument("--clients", type=int, default=2000)
    parser.add_argument("--cohort", type=int, default=20, help="clients that play in a round")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--overlay", default="personal/fedsa.yaml", help="over clip_lora.yaml")
    parser.add_argument("--rows", type=int, default=20, help="of each client")
    parser.add_argument("--early", type=int, default=5, help="round from which memory counts")
    parser.add_argument("--flat", type=float, default=5.0, help="percent that it may grow by")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args()
    if not options.one and not 0 < options.cohort < options.clients:
        parser.error(f"--cohort must be between 1 and {options.clients - 1}, got {options.cohort}")
    if options.early < 1 or options.rounds < options.early + 2 * SPAN:
        least = options.early + 2 * SPAN
        parser.error(f"--rounds must be at least {least} (--early, from 1, and {2 * SPAN} more)")
    return options, [argument for argument in rest if argument != "--"]


def main() -> int:
    """Measure what the command line asks for."""
    options, rest = parse()
    if options.one:
        with tempfile.TemporaryDirectory() as scratch:
            result = measure(options, rest, Path(scratch))
        options.json.write_text(json.dumps(result), encoding="utf-8")
        return 0
    results = []
    for clients in (options.clients, options.cohort):
        results.append(run(options, clients, rest))
        show(results[-1], options.early)
    compare(*results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    faults = excess(results[0])
    percent = growth(results[0], options.early)
    first, last = kept_tensors(results[0], options.early)
    if percent > options.flat:
        faults.append(f"memory grows by {percent:.1f} %, allowed are {options.flat:g}")
    if last > first:
        faults.append(f"there are {last:,} tensors at the end, {first:,} in the first rounds")
    for fault in faults:
        print(fault)
    return int(bool(faults))


if __name__ == "__main__":
    raise SystemExit(main())
