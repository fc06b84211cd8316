"""All rules of ``fedlora.aggregation`` on the same small task, each at its own best learning rate.

Every overlay of configs/rules, and the same model trained on the pooled rows and not at all, over
handwritten digits that are divided by label (Dirichlet): equal ranks, and ranks 2, 4 and 8 under
the rules that can average those. Learning rates are chosen on validation pictures, with seeds of
their own. What is reported is on test pictures, over other seeds, which differ in who holds what,
in the adapter's first values and in the order of batches. Every run is kept as it ends and is not
played again: the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import yaml
from rules_run import Figures, Run, Runs
from rules_table import checks, tables

from fedlora import aggregation
from fedlora.aggregation import RULES, Aggregator
from fedlora.arguments import shipped_configs
from fedlora.state import Round

SETTING = (
    "--config=clip_lora.yaml",
    "--data.source=Digits",
    # Prompts that say little, so that there is much to learn, and a head that learns slowly, so
    # that the adapters have to do it.
    '--data.source.templates=["a drawing of {} things"]',
    "--model.head_lr=5e-4",
    "--data.num_clients=10",
    "--data.partitioner=DirichletPartitioner",
    "--data.partitioner.partition_by=label",
    "--data.partitioner.min_partition_size=30",
    "--data.val_fraction=0.2",
    "--data.client_val_fraction=0.15",
    "--data.client_test_fraction=0.25",
    "--trainer.max_rounds=8",
    "--trainer.val_clients=all",
    "--trainer.averaging.export_personal=false",
    "--trainer.threads=1",
    "--trainer.logger=false",
    "--quiet",
)
QUICK = ("--trainer.max_rounds=2", "--trainer.limit_train_batches=1")
SKEWS = (0.1, 0.5)
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
MOST_RATES = 10  # of a rule, those beside the grid included
TUNING = 1000  # the first of the seeds for choosing; those of the table begin at 0
# A run that is to choose needs no figures on its way.
UNWATCHED = "--trainer.val_every_n_rounds=1000000"
MIXED = "--trainer.client_ranks={2: 0.4, 4: 0.3, 8: 0.3}"
SMALLEST = ("--model.lora.r=2", "--model.lora.lora_alpha=4")  # what all could train


@dataclass(frozen=True)
class Method:
    """A row of the tables.

    Attributes:
        name: of the overlay, or of what is trained without one.
        kind: how it is played.
        args: what is added to the command.
        rule: what averages; None where nothing does.
    """

    name: str
    kind: str = "federated"
    args: tuple[str, ...] = ()
    rule: Aggregator | None = None

    @property
    def personal(self) -> bool:
        """Whether each client has a model of its own."""
        return self.rule is not None and bool(self.rule.private(Round(0)))

    @property
    def figure(self) -> str:
        """What says on validation pictures how good it is."""
        return "own_val" if self.personal else "val"


CENTRAL, UNTRAINED = Method("central", "central"), Method("zero-shot", "untrained")


def overlays(names: Sequence[str] = ()) -> list[Method]:
    """The overlays of configs/rules, FedAvg first; those named, or all.

    Raises:
        SystemExit: for a name that there is not, and where a rule has no overlay.
    """
    paths = {path.stem: path for path in sorted((shipped_configs() / "rules").glob("*.yaml"))}
    # By the names that they are shipped under, so that kept runs are found from any folder.
    found = {
        name: Method(name, args=(f"--config=rules/{path.name}",), rule=rule(path))
        for name, path in paths.items()
    }
    if missing := set(RULES) - {method.rule.name for method in found.values() if method.rule}:
        raise SystemExit(f"no overlay in configs/rules has {', '.join(sorted(missing))}")
    if unknown := set(names) - set(found):
        raise SystemExit(f"--rules should be of {', '.join(found)}, got {', '.join(unknown)}")
    return sorted(
        (found[name] for name in names or found), key=lambda m: (m.personal, m.name != "fedavg")
    )


def rule(overlay: Path) -> Aggregator:
    """The rule that an overlay names."""
    config = yaml.safe_load(overlay.read_text(encoding="utf-8"))["trainer"]["averaging"]
    name = config["aggregator"]["class_path"].rsplit(".", 1)[-1]
    made: Aggregator = getattr(aggregation, name)(**config["aggregator"].get("init_args", {}))
    return made


class Study:
    """The runs of every method.

    Args:
        runs: plays and keeps them.
        extra: further arguments of each.
        quick: runs of a second each, to see that all works.
        tuning: how many seeds choose a learning rate, under each skew.
        seeds: how many the tables have.
    """

    def __init__(
        self, runs: Runs, extra: Sequence[str], quick: bool, tuning: int, seeds: int
    ) -> None:
        self.runs = runs
        self.extra = (*(QUICK if quick else ()), *extra)
        self.grid = RATES[1:2] if quick else RATES
        self.skews = SKEWS[:1] if quick else SKEWS
        self.tuning = range(TUNING, TUNING + tuning)
        self.seeds = range(seeds)
        self.rates: dict[str, float] = {}

    def run(
        self, method: Method, skew: float, seed: int, rate: float, args: Sequence[str] = ()
    ) -> Run:
        """One run of a method."""
        kind = "mixed-" * (MIXED in args) + "rank2-" * (SMALLEST[0] in args)
        chosen = (f"--model.optimizer.lr={rate:g}",) if method is not UNTRAINED else ()
        name = f"{method.name}-{kind}skew{skew:g}-seed{seed}" + f"-lr{rate:g}" * bool(chosen)
        where = (f"--data.partitioner.alpha={skew:g}", f"--seed_everything={seed}")
        if seed in self.tuning:
            chosen += (UNWATCHED,)
        all_ = (*SETTING[:1], *method.args, *SETTING[1:], *args, *where, *chosen, *self.extra)
        return Run(name, method.kind, all_)

    def tune(self, methods: Sequence[Method]) -> None:
        """Choose each method's learning rate, with rates added until the best is at no edge."""
        offered = {method: list(self.grid) for method in methods}
        while True:
            self.runs.all(
                [
                    run
                    for m, rates in offered.items()
                    for rate in rates
                    for run in self.trial(m, rate)
                ],
                "tuning",
            )
            beyond = {method: self.beyond(method, rates) for method, rates in offered.items()}
            if not any(beyond.values()):
                break
            for method, rates in offered.items():
                rates += beyond[method]
        self.rates = {m.name: self.best(m, rates) for m, rates in offered.items()}

    def trial(self, method: Method, rate: float) -> list[Run]:
        """The runs that say how good a learning rate is: under all skews."""
        return [self.run(method, skew, seed, rate) for skew in self.skews for seed in self.tuning]

    def value(self, method: Method, rate: float) -> float:
        """Validation accuracy after the last round, over skews and tuning seeds."""
        return mean(self.runs[run][method.figure] for run in self.trial(method, rate))

    def best(self, method: Method, rates: Sequence[float]) -> float:
        """The best rate, the lowest of equals."""
        return max(sorted(rates), key=lambda rate: self.value(method, rate))

    def beyond(self, method: Method, rates: Sequence[float]) -> list[float]:
        """The next rate where the best one is at an edge."""
        if not 1 < len(rates) < MOST_RATES:
            return []
        best = self.best(method, rates)
        return [2 * best] * (best == max(rates)) + [best / 2] * (best == min(rates))

    def of(self, method: Method, skew: float, args: Sequence[str] = ()) -> list[Run]:
        """The runs of a row, one for each seed."""
        rate = self.rates.get(method.name, 0.0)
        return [self.run(method, skew, seed, rate, args) for seed in self.seeds]

    def found(self, method: Method, skew: float, args: Sequence[str] = ()) -> list[Figures]:
        """What came out of the runs of a row."""
        return [self.runs[run] for run in self.of(method, skew, args)]


@dataclass(frozen=True)
class Row:
    """A method under one division of the pictures.

    Attributes:
        skew: Dirichlet's alpha.
        ranks: ``equal`` or ``mixed``.
        title: what it is called.
        method: what was trained.
        rate: the learning rate.
        found: figures, one for each seed.
    """

    skew: float
    ranks: str
    title: str
    method: Method
    rate: float | None
    found: list[Figures]


def rows(study: Study, methods: Sequence[Method]) -> Iterator[Row]:
    """Play what is missing, and give every row."""
    able = [m for m in methods if m.rule is not None and m.rule.mixed_ranks]
    average = [m for m in methods if m.name == "fedavg"] if able else []
    plan: list[tuple[float, str, str, Method, tuple[str, ...]]] = []
    for skew in study.skews:
        plan += [(skew, "equal", m.name, m, ()) for m in (UNTRAINED, CENTRAL, *methods)]
        plan += [(skew, "mixed", f"{m.name}, rank 2", m, SMALLEST) for m in average]
        plan += [(skew, "mixed", m.name, m, (MIXED,)) for m in able]
    study.runs.all([run for s, _, _, m, args in plan for run in study.of(m, s, args)], "the table")
    for skew, ranks, title, method, args in plan:
        found = study.found(method, skew, args)
        yield Row(skew, ranks, title, method, study.rates.get(method.name), found)


def main() -> int:
    """Choose, play, check, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="What else is given goes to fedlora: --trainer.max_rounds=8 …"
    )
    parser.add_argument("--out", type=Path, default=Path("rules_runs"), help="folder of kept runs")
    parser.add_argument("--rules", help="names of overlays, e.g. fedex,flora; default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tuning-seeds", type=int, default=1, help="under each skew")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, a thread each")
    parser.add_argument("--plot", type=Path, help="draw the figures here, e.g. docs/rules.svg")
    parser.add_argument("--quick", action="store_true", help="to see that all works, in a minute")
    options, rest = parser.parse_known_args()
    methods = overlays(options.rules.split(",") if options.rules else ())
    seeds, tuning = (1, 1) if options.quick else (options.seeds, options.tuning_seeds)
    began = time.perf_counter()
    study = Study(Runs(options.out, options.workers), rest, options.quick, tuning, seeds)
    study.tune([CENTRAL, *methods])
    found = list(rows(study, methods))
    print(tables(found))
    if options.plot:
        from rules_plot import draw

        draw(found, options.plot)
    spent = sum(each["seconds"] for each in study.runs.done.values())
    minutes = (time.perf_counter() - began) / 60
    print(f"\n{len(study.runs.done)} runs of {spent / 60:.0f} min in all; {minutes:.0f} min now")
    return int(checks(found))


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
