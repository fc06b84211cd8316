"""One model for all, or one for each: the methods compared on each client's own test pictures.

The embedded run with strong label skew (Dirichlet, alpha 0.1; ten clients), with three seeds, which
differ in who holds what, in the adapter's first values and in the order of batches. For each method
the learning rate, and mu or lambda where there is one, is chosen by the accuracy on the clients'
own validation pictures after the last round: mean over clients and seeds. What is printed is on the
clients' own test pictures: mean over clients, and the worst client. Every run that ends is kept in
a file, and not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from fedlora.files import write_text

ADAMW = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
SGD = (0.03, 0.1, 0.3, 1.0, 3.0)
HEAD = 5  # the head's learning rate in units of the adapter's, as in clip_lora.yaml
SETTING = (
    "--config=clip_lora.yaml",
    "--data.num_clients=10",
    "--data.partitioner=DirichletPartitioner",
    "--data.partitioner.partition_by=label",
    "--data.partitioner.alpha=0.1",
    "--data.partitioner.min_partition_size=30",
    "--data.client_val_fraction=0.2",
    "--data.client_test_fraction=0.25",
    "--trainer.val_clients=all",
    "--trainer.val_every_n_rounds=5",
    "--trainer.averaging.export_personal=false",
    "--trainer.threads=1",
    "--trainer.logger=false",
    "--quiet",
)
PLAIN = "--model.optimizer=torch.optim.SGD"


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        title: what it is called.
        args: what is added to the command.
        rates: learning rates to choose from.
        option: a further option to choose a value of, and the values.
    """

    title: str
    args: tuple[str, ...] = ()
    rates: tuple[float, ...] = ADAMW
    option: str = ""
    values: tuple[float, ...] = field(default=(0.0,))

    def choices(self) -> Iterator[tuple[str, ...]]:
        """Every combination to choose from, as arguments."""
        for rate, value in itertools.product(self.rates, self.values):
            chosen = (f"--model.optimizer.lr={rate:g}", f"--model.head_lr={HEAD * rate:g}")
            yield chosen + ((f"{self.option}={value:g}",) if self.option else ())


METHODS = (
    Method("FedAvg"),
    Method("FedAvg, SGD", (PLAIN,), SGD),
    Method(
        "FedProx",
        ("--trainer.callbacks+=FedProx",),
        option="--trainer.callbacks.mu",
        values=(0.01, 0.1, 1.0),
    ),
    Method("SCAFFOLD, SGD", (PLAIN, "--trainer.callbacks+=SCAFFOLD"), SGD),
    Method("FedSA-LoRA", ("--trainer.averaging.aggregator=FedSALoRA",)),
    Method("local head", ("--trainer.averaging.aggregator=LocalHead",)),
    Method(
        "Ditto",
        ("--trainer.callbacks+=Ditto",),
        option="--trainer.callbacks.lam",
        values=(0.01, 0.1, 1.0),
    ),
    Method("local only", ("--trainer.averaging.aggregator=LocalOnly",)),
)


def play(args: Sequence[str]) -> dict[str, float]:
    """Run a command in this process; its figures after the last round."""
    import torch
    from from_config import FromConfig

    torch.set_num_threads(1)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as root:
        built = FromConfig(*args, f"--trainer.default_root_dir={root}")
        built.fit()
        summary = json.loads(built.trainer.run.summary.read_text(encoding="utf-8"))
    last = summary["final"]
    return {
        "val": last["clients/acc_mean"],
        "test_mean": summary["test/clients_acc_mean"],
        "test_min": summary["test/clients_acc_min"],
        "global": summary["test/acc"],
        "up": summary["comm/up_bytes"],
        "down": summary["comm/down_bytes"],
        "seconds": time.perf_counter() - began,
    }


class Runs:
    """Runs commands in some processes at a time and keeps what came out.

    Args:
        path: where it is kept; what is there already is not run again.
        extra: arguments of every run.
        processes: how many at a time.
    """

    def __init__(self, path: Path, extra: Sequence[str], processes: int) -> None:
        self.path = path
        self.extra = tuple(extra)
        self.processes = processes
        self.done: dict[str, dict[str, float]] = {}
        if path.exists():
            self.done = json.loads(path.read_text(encoding="utf-8"))

    def command(self, method: Method, choice: Sequence[str], seed: int) -> list[str]:
        """The arguments of one run."""
        return [*SETTING, *method.args, *choice, f"--seed_everything={seed}", *self.extra]

    def all(self, commands: Sequence[Sequence[str]]) -> None:
        """Run those that were not run yet."""
        open_ = [list(command) for command in commands if " ".join(command) not in self.done]
        print(f"{len(commands)} runs, {len(open_)} of them new", flush=True)
        with ProcessPoolExecutor(self.processes, get_context("spawn")) as pool:
            futures = {pool.submit(play, command): command for command in open_}
            for number, future in enumerate(as_completed(futures), 1):
                found = self.done[" ".join(futures[future])] = future.result()
                write_text(self.path, json.dumps(self.done, indent=1) + "\n")
                print(f"  {number}/{len(open_)}  {found['seconds']:.1f} s", flush=True)

    def of(self, command: Sequence[str]) -> dict[str, float]:
        """What came out of a command."""
        return self.done[" ".join(command)]


def choose(runs: Runs, method: Method, seeds: Sequence[int]) -> tuple[str, ...]:
    """The choice with the best validation accuracy of the clients; the first of equals."""

    def value(choice: Sequence[str]) -> float:
        return sum(runs.of(runs.command(method, choice, seed))["val"] for seed in seeds)

    return max(method.choices(), key=value)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds, in percent."""
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def row(method: Method, choice: Sequence[str], found: Sequence[Mapping[str, float]]) -> str:
    """A row of the table."""

    def of(name: str) -> list[float]:
        return [each[name] for each in found]

    options = (part.split("=") for part in choice if "head_lr" not in part)
    chosen = ", ".join(f"{name.rsplit('.', 1)[1]} {value}" for name, value in options)
    traffic = statistics.mean(of("up")), statistics.mean(of("down"))
    return (
        f"| {method.title} | {chosen} | {spread(of('test_mean'))} | {spread(of('test_min'))} | "
        f"{spread(of('global'))} | {traffic[0] / 1e6:.1f} / {traffic[1] / 1e6:.1f} |"
    )


def main() -> None:
    """Choose, run, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="What else is given goes to fedlora: --trainer.max_rounds=5 …"
    )
    parser.add_argument("--out", type=Path, default=Path("personal.json"), help="kept figures")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, a thread each")
    options, rest = parser.parse_known_args()
    began = time.perf_counter()
    runs = Runs(options.out, rest, options.processes)
    seeds = range(options.seeds)
    runs.all([runs.command(m, c, seed) for seed in seeds for m in METHODS for c in m.choices()])
    print("| method | chosen | mean client | worst client | test/acc, one model | MB up / down |")
    print("|---|---|---|---|---|---|")
    for method in METHODS:
        choice = choose(runs, method, seeds)
        found = [runs.of(runs.command(method, choice, seed)) for seed in seeds]
        print(row(method, choice, found))
    total = sum(each["seconds"] for each in runs.done.values())
    print(f"{time.perf_counter() - began:.0f} s now; {total:.0f} s of runs in all")


if __name__ == "__main__":
    main()
