"""What more clients, classes, ranks and processes cost, each as ratios within one run.

On made-up pictures. Runs are open in one process and take turns round by round; those of several
processes are commands of their own, turn by turn.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from made_up import over_rows, settings, sized
from turns import numbers, ratio, said, take_turns, target, with_runs

import processes

PARTS = ("clients", "classes", "ranks", "processes")
MOST_CLIENTS, MOST_TEXT, MOST_PROCESSES = 1.15, 1.05, processes.TARGET
TEXT = ("--model.head=text",)
HEADS: Mapping[str, Sequence[str]] = {
    "linear": (),
    "text, frozen tower": TEXT,
    "text, trained tower": (*TEXT, "--model.towers=both"),
}
Seconds = dict[str, list[float]]
Targets = list[dict[str, Any]]


class Scale:
    """The runs of all parts.

    Args:
        options: of the command line.
        rest: what of it goes to fedlora.
    """

    def __init__(self, options: argparse.Namespace, rest: Sequence[str]) -> None:
        self.options = options
        self.rest = rest
        tiny = options.size == "tiny"
        self.batch, self.steps = (32, 8) if tiny else (8, 2)
        self.rows = 1440 if tiny else 48
        self.counts = numbers(options.clients or ("10,50,200" if tiny else "2,6"))
        if options.quick:
            self.batch, self.steps, self.rows = 8, 2, 80
            self.counts = numbers(options.clients or "2,10")

    def way(self, base: Sequence[str], *own: str) -> list[str]:
        """A run: the settings that are common to all, and its own."""
        common = (f"--trainer.threads={self.options.threads}", "--trainer.accelerator=cpu")
        return [*base, *sized(self.options.size, self.options.scratch), *common, *own]

    def play(self, ways: Mapping[str, Sequence[str]]) -> Seconds:
        """Seconds of each turn's round."""
        given = {name: [*way, *self.rest] for name, way in ways.items()}
        return with_runs(
            given,
            lambda runs: take_turns(
                {name: run.play for name, run in runs.items()}, self.options.turns
            ),
        )

    def clients(self) -> tuple[Seconds, Targets]:
        """More and more of them over the same rows."""
        ways = {}
        for lanes in self.options.lanes.split(","):
            own = [] if lanes == "1" else [f"--trainer.lanes={lanes}"]
            for count in self.counts:
                base = over_rows(self.rows, count, self.batch)
                ways[f"{count} clients, lanes {lanes}"] = self.way(base, *own)
        found = self.play(ways)
        say("clients over the same rows: round, of that of the fewest with the same lanes")
        for lanes in self.options.lanes.split(","):
            show(found, [f"{count} clients, lanes {lanes}" for count in self.counts])
        few, many = (self._best(found, count) for count in (self.counts[0], self.counts[-1]))
        text = f"{many} / {few}"
        return found, [target(text, ratio(found[many], found[few]), MOST_CLIENTS)]

    def _best(self, found: Seconds, count: int) -> str:
        own = [name for name in found if name.startswith(f"{count} clients")]
        return min(own, key=lambda name: median(found[name]))

    def classes(self) -> tuple[Seconds, Targets]:
        """Heads and numbers of classes; two clients, so that a round is its steps."""
        counts = numbers("10,100" if self.options.quick else self.options.classes)
        ways = {
            f"{count} classes, {head}": self.way(settings(2, self.batch, self.steps, count), *own)
            for count in counts
            for head, own in HEADS.items()
        }
        found, targets = self.play(ways), []
        for count in counts:
            say("classes: round, of that of the linear head with as many")
            show(found, [f"{count} classes, {head}" for head in HEADS])
        say("classes: round, of that of the fewest with the same head")
        for head in HEADS:
            show(found, [f"{count} classes, {head}" for count in counts])
        if 100 in counts:
            text, linear = (f"100 classes, {head}" for head in list(HEADS)[1::-1])
            each = ratio(found[text], found[linear])
            targets.append(target(f"{text} / linear", each, MOST_TEXT))
        return found, targets

    def ranks(self) -> tuple[Seconds, Targets]:
        """Ranks of the adapter."""
        base = settings(2, self.batch, self.steps)
        ranks = numbers("4,64" if self.options.quick else self.options.ranks)
        ways = {
            f"rank {r}": self.way(base, f"--model.lora.r={r}", f"--model.lora.lora_alpha={2 * r}")
            for r in ranks
        }
        found = self.play(ways)
        say("ranks: round, of that of the lowest")
        show(found, list(ways))
        return found, []

    def processes(self) -> tuple[Seconds, Targets]:
        """One process and two, one thread in each, without lanes and with."""
        options, found = self.options, {}
        rounds = argparse.Namespace(rounds=3 if options.quick else 6)
        # Commands of their own import the pictures' source, too: they are fedlora's digits here.
        quick = ["--trainer.local_steps=1"] if options.quick else []
        own = [*sized(options.size, options.scratch), *quick, *self._few(), *self.rest]
        ways = {
            f"{count} process(es), lanes {lanes}": (count, lanes)
            for lanes in options.lanes.split(",")
            for count in (1, 2)
        }

        def play(count: int, lanes: str) -> float:
            more = [] if lanes == "1" else [f"--trainer.lanes={lanes}"]
            result = processes.run(rounds, [*own, *more], count, "clients")
            return float(median(result["rounds"]))

        players = {name: lambda way=way: play(*way) for name, way in ways.items()}
        found = take_turns(players, 1 if options.quick else options.command_turns)
        say("processes: round, evaluation included, of that of one process without lanes")
        show(found, list(ways))
        one, two = list(found)[:2]
        text = f"{two} / {one}"
        return found, [target(text, ratio(found[two], found[one]), MOST_PROCESSES)]

    def _few(self) -> list[str]:
        """At ViT-B/32's size fewer pictures."""
        if self.options.size == "tiny":
            return []
        return [
            *("--data.num_clients=2", "--data.batch_size=8", "--trainer.local_steps=2"),
            *("--data.val_fraction=0.02", "--data.client_val_fraction=0.01"),
            "--data.source.test_fraction=0.02",
        ]


def say(text: str) -> None:
    """A heading."""
    print(f"\n{text}", flush=True)


def show(found: Seconds, names: Sequence[str]) -> None:
    """Print some, in ratios to the first of them."""
    for name in names:
        against = ratio(found[name], found[names[0]])
        print(f"  {name:<34} {median(found[name]) * 1000:9.1f} ms  {said(against)}", flush=True)


def parsed() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what of it goes to fedlora."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="What else is given goes to fedlora: --model.lora.r=4 …"
    )
    parser.add_argument("--only", default=",".join(PARTS), help=f"of: {','.join(PARTS)}")
    parser.add_argument("--size", choices=("tiny", "vit-b32"), default="tiny")
    parser.add_argument("--clients", help="numbers over the same rows; 10,50,200 with tiny")
    parser.add_argument("--classes", default="10,100,1000")
    parser.add_argument("--ranks", default="4,8,16,32,64")
    parser.add_argument("--lanes", default="1,auto", help="for clients and processes")
    parser.add_argument("--turns", type=int, help="counted rounds of each (7; with --quick 2)")
    parser.add_argument("--command-turns", type=int, default=3, help="of the processes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small, to try it")
    parser.add_argument("--json", type=Path, help="write the results, every timing included")
    parser.add_argument("--scratch", type=Path, help="kept folder for models")
    options, rest = parser.parse_known_args()
    options.only = options.only.split(",")
    unknown = sorted(set(options.only) - set(PARTS))
    if unknown:
        parser.error(f"--only should be of {', '.join(PARTS)} but got {', '.join(unknown)}")
    options.turns = options.turns or (2 if options.quick else 7)
    return options, rest


def main() -> int:
    """Measure what the command line asks for."""
    options, rest = parsed()
    found: dict[str, Any] = {"size": options.size, "seconds": {}, "targets": []}
    with tempfile.TemporaryDirectory() as temporary:
        options.scratch = (options.scratch or Path(temporary)).resolve()
        scale = Scale(options, rest)
        for part in options.only:
            seconds, targets = getattr(scale, part)()
            found["seconds"][part] = seconds
            found["targets"] += [{"part": part, **each} for each in targets]
            if options.json:
                options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.stdout.flush()
    return int(not all(each["passed"] for each in found["targets"]))


if __name__ == "__main__":
    raise SystemExit(main())
