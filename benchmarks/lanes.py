"""What lanes are worth: warm rounds with K clients in one pass beside one at a time.

All settings, and a bare PyTorch loop, are open in one process and take turns round by round, in an
order that is reversed every other time. ``--gpu`` does it on a GPU, with a profile.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from made_up import SIZES, settings, sized
from turns import Bare, Run, apart, numbers, ratio, said, take_turns, with_runs

ALLOWED = 1e-4  # between the adapters of one lane and of several, after a round
# clients, steps of each, lanes, rows of a batch, threads, turns
DEFAULTS: dict[str, dict[str, Any]] = {
    "tiny": {
        "clients": 16,
        "steps": 4,
        "lanes": "2,4,8,16,auto",
        "batches": "4,8,16,32",
        "threads": "1,2",
        "turns": 5,
    },
    "vit-b32": {
        "clients": 4,
        "steps": 1,
        "lanes": "2,4,auto",
        "batches": "4,16",
        "threads": "1",
        "turns": 3,
    },
}
QUICK = {"clients": 4, "steps": 2, "lanes": "2,4", "batches": "4,8", "threads": "1", "turns": 2}


def measure(options: argparse.Namespace, rest: list[str], batch: int, threads: int) -> Any:
    """One cell: all numbers of lanes at one batch size."""
    common = [
        *settings(options.clients, batch, options.steps),
        *sized(options.size, options.scratch),
        f"--trainer.threads={threads}",
        "--trainer.accelerator=cpu",
        *rest,
    ]
    ways = {"1": common}
    ways |= {k: [*common, f"--trainer.lanes={k}"] for k in options.lanes.split(",") if k != "1"}

    def play(runs: dict[str, Run]) -> dict[str, Any]:
        gaps = {name: apart(runs["1"].first, run.first) for name, run in runs.items()}
        players = {name: run.play for name, run in runs.items()}
        players["bare"] = Bare(runs["1"]).play
        return {"seconds": take_turns(players, options.turns), "apart": gaps}

    return {"batch": batch, "threads": threads, **with_runs(ways, play)}


def show(cell: dict[str, Any]) -> None:
    """Print a cell."""
    seconds = cell["seconds"]
    print(f"\nbatches of {cell['batch']}, {cell['threads']} thread(s): round, of that of one lane")
    for name, values in seconds.items():
        gap = cell["apart"].get(name)
        print(
            f"  {name:>5}  {median(values) * 1000:8.1f} ms  {said(ratio(values, seconds['1']))}"
            + (f"; adapter {gap:.1e} apart" if gap is not None and name != "1" else "")
        )


def finish(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the ratios; print and return the targets."""
    for cell in cells:
        one = cell["seconds"]["1"]
        cell["ratio"] = {name: ratio(values, one) for name, values in cell["seconds"].items()}
    most = max(max(cell["apart"].values()) for cell in cells)
    passed = most <= ALLOWED
    text = "adapters of one lane and of several, after a round"
    print(f"\n  {'PASS' if passed else 'MISS'}  {text}: {most:.1e} apart; at most {ALLOWED:g}")
    return [{"text": text, "value": most, "most": ALLOWED, "passed": passed}]


def parsed() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what of it goes to fedlora."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="What else is given goes to fedlora: --model.lora.r=4 …"
    )
    parser.add_argument("--size", choices=SIZES, default="tiny", help="vit-l14 with --gpu only")
    parser.add_argument("--clients", type=int, help="all play in every round")
    parser.add_argument("--steps", type=int, help="of a client in a round")
    parser.add_argument("--lanes", help="besides one: numbers and auto")
    parser.add_argument("--batches", help="rows of a batch")
    parser.add_argument("--threads")
    parser.add_argument("--turns", type=int, help="counted rounds of each")
    parser.add_argument("--quick", action="store_true", help="small, to try it")
    parser.add_argument("--gpu", action="store_true", help="on the first GPU, see gpu.md")
    parser.add_argument("--profile", type=int, default=15, help="rows of its tables, with --gpu")
    parser.add_argument("--accelerator", default="gpu", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the results, every timing included")
    parser.add_argument("--scratch", type=Path, help="kept folder for models")
    options, rest = parser.parse_known_args()
    if options.gpu:
        import lanes_gpu

        defaults = lanes_gpu.DEFAULTS
    elif options.size == "vit-l14":
        parser.error("--size vit-l14 takes hours on a CPU; give --gpu, or another size")
    else:
        defaults = DEFAULTS[options.size]
    for name, value in {**defaults, **(QUICK if options.quick else {})}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.turns < 1:
        parser.error(f"--turns must be at least 1, got {options.turns}")
    return options, rest


def run(options: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Measure all cells on the CPU."""
    cells = []
    for threads in numbers(options.threads):
        for batch in numbers(options.batches):
            cells.append(measure(options, rest, batch, threads))
            show(cells[-1])
            sys.stdout.flush()
    return {"size": options.size, "cells": cells, "targets": finish(cells)}


def main() -> int:
    """Measure what the command line asks for."""
    options, rest = parsed()
    with tempfile.TemporaryDirectory() as temporary:
        options.scratch = (options.scratch or Path(temporary)).resolve()
        if options.gpu:
            import lanes_gpu

            found = lanes_gpu.run(options, rest)
        else:
            found = run(options, rest)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(not all(each["passed"] for each in found["targets"]))


if __name__ == "__main__":
    raise SystemExit(main())
