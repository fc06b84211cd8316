"""How far a training step is from what the machine can do, and what oneDNN's products gain.

The limit: the operations that a step cannot do without (``flops.py``) at the rate of one large
product of matrices, measured in the same turn. Reached is that time over the time of a warm round,
all of it: batches, adapters loaded and averaged, optimizer.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from flops import Tower, kernels, matrix_rates, seconds
from made_up import settings, sized
from turns import Bare, Run, numbers, ratio, said, take_turns, with_runs

CPUINFO = Path("/proc/cpuinfo")
# clients, steps of each, rows of a batch, lanes
SIZES = {"tiny": (8, 8, 32, 8), "vit-b32": (2, 2, 16, 2)}
QUICK = {"tiny": (2, 2, 16, 2), "vit-b32": (2, 1, 4, 2)}
REPEATS, QUICK_REPEATS = 20, 3  # of each small product
BACKWARD = "backward"


def processor() -> str:
    """What this CPU calls itself, and what torch takes it for."""
    lines = CPUINFO.read_text(encoding="utf-8").splitlines() if CPUINFO.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, 'CPU')}, {torch.backends.cpu.get_cpu_capability()}"


def measure(options: argparse.Namespace, size: str, threads: int) -> dict[str, Any]:
    """Rates and rounds in turns."""
    clients, steps, batch, lanes = (QUICK if options.quick else SIZES)[size]
    common = [
        *settings(clients, batch, steps),
        *sized(size, options.scratch),
        f"--trainer.threads={threads}",
        "--trainer.accelerator=cpu",
    ]
    ways = {"fedlora": common}
    if lanes > 1 and not options.no_lanes:
        ways[f"fedlora, {lanes} lanes"] = [*common, f"--trainer.lanes={lanes}"]

    def play(runs: dict[str, Run]) -> dict[str, Any]:
        run = runs["fedlora"]
        clip = run.trainer.lightning_module.model.clip
        rank = run.trainer.lightning_module.lora_config.r
        tower, adapted = Tower.of(clip), set(run.first.A)
        players: dict[str, Callable[[], float]] = {
            name: partial(_rate, name, options.quick) for name in kernels()
        }
        players |= {"bare loop": Bare(run).play, **{n: each.play for n, each in runs.items()}}
        count = tower.count(adapted, rank, run.trainer.datamodule.num_classes)
        return {
            "operations": {**vars(count), "all": count.all},
            "found": take_turns(players, options.turns),
            "products": list(_products(tower, adapted, rank, batch, options.quick)),
        }

    about = {"size": size, "threads": threads, "batch": batch, "steps": clients * steps}
    return {**about, **with_runs(ways, play)}


def _rate(name: str, quick: bool) -> float:
    return matrix_rates(least=0.1 if quick else 1.0)[name]


def _products(
    tower: Tower, adapted: set[str], rank: int, batch: int, quick: bool
) -> Iterator[dict[str, Any]]:
    """Each shape of a step's products in torch's way and in fedlora's, in turns."""
    shapes: dict[tuple[int, int, int], str] = {}
    for each in tower.linears():
        name, rows = each.name.rpartition(".")[2], batch * each.tokens
        shapes.setdefault((rows, each.inputs, each.outputs), name)
        shapes.setdefault((rows, each.outputs, each.inputs), f"{name}, {BACKWARD}")
        if each.name in adapted:
            shapes.setdefault((rows, each.inputs, rank), f"{name}'s A")
            shapes.setdefault((rows, rank, each.outputs), f"{name}'s B")
    for shape, name in shapes.items():
        players = {way: partial(seconds, call, 0.01) for way, call in _two(name, shape).items()}
        found = take_turns(players, QUICK_REPEATS if quick else REPEATS)
        about = {"name": name, **dict(zip(("rows", "inputs", "outputs"), shape, strict=True))}
        yield {**about, "seconds": found, "ratio": ratio(found["fedlora"], found["torch"])}


def _two(name: str, shape: tuple[int, int, int]) -> dict[str, Callable[[], object]]:
    """A product in torch's way and in fedlora's, which adds that with B to the layer's output."""
    from fedlora.modules import products

    rows, inputs, outputs = shape
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    if name.endswith(BACKWARD):
        weight = torch.randn(inputs, outputs).t()
    if name.endswith("A"):
        ours = partial(products.times, x, weight[None], [rows])
    elif name.endswith("B"):
        total, factor = torch.randn(rows, outputs), weight.t()
        ours = partial(products.add_times, total, x, factor[None], [rows])
        return {"torch": partial(total.addmm_, x, factor), "fedlora": ours}
    else:
        ours = partial(products.matmul, x, weight)
    return {"torch": partial(torch.nn.functional.linear, x, weight), "fedlora": ours}


def judged(result: dict[str, Any]) -> dict[str, Any]:
    """With the part of the limit that each way reaches."""
    found, names = result["found"], list(kernels())
    best = [max(rates) for rates in zip(*(found[name] for name in names), strict=True)]
    pictures = result["steps"] * result["batch"]
    limits = [result["operations"]["all"] * pictures / rate for rate in best]
    ways = [name for name in found if name not in names]
    reached = {name: ratio(limits, found[name]) for name in ways}
    return {**result, "rates": {n: median(found[n]) for n in names}, "reached": reached}


def show(result: Mapping[str, Any]) -> None:
    """Print a result."""
    count, found = result["operations"], result["found"]
    print(
        f"\n{result['size']}, {result['threads']} thread(s): {result['steps']} steps of "
        f"{result['batch']} pictures a round"
    )
    print(
        f"  operations of a picture: {count['all'] / 1e6:,.1f} million; frozen forward "
        f"{count['forward'] / 1e6:,.1f}, backward {count['backward'] / 1e6:,.1f}, adapter "
        f"{count['adapter'] / 1e6:,.1f}"
    )
    rates = (f"{name} {rate / 1e9:,.0f}" for name, rate in result["rates"].items())
    print(f"  large float32 products, 10^9 operations a second: {', '.join(rates)}")
    for name, part in result["reached"].items():
        step = median(found[name]) / result["steps"]
        print(f"  {name:<18} {step * 1000:8.1f} ms a step; of the limit {said(part)}")
    print("  products of a step, fedlora's time over torch's:")
    for each in result["products"]:
        shape = f"({each['rows']}, {each['inputs']}) x ({each['inputs']}, {each['outputs']})"
        spent = f"{median(each['seconds']['fedlora']) * 1e6:9,.1f} us"
        print(f"    {each['name']:<18} {shape:<28} {spent}  {said(each['ratio'])}")


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default=",".join(SIZES), help=f"of: {','.join(SIZES)}")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--turns", type=int, help="counted rounds of each (5; with --quick 2)")
    parser.add_argument("--no-lanes", action="store_true")
    parser.add_argument("--quick", action="store_true", help="small, to try it")
    parser.add_argument("--json", type=Path, help="write the results, every timing included")
    parser.add_argument("--scratch", type=Path, help="kept folder for models")
    options = parser.parse_args()
    unknown = sorted(set(options.sizes.split(",")) - set(SIZES))
    if unknown:
        parser.error(f"--sizes should be of {', '.join(SIZES)} but got {', '.join(unknown)}")
    options.turns = options.turns or (2 if options.quick else 5)
    return options


def main() -> int:
    """Measure what the command line asks for."""
    options, results = parsed(), []
    print(processor())
    with tempfile.TemporaryDirectory() as temporary:
        options.scratch = (options.scratch or Path(temporary)).resolve()
        for size in options.sizes.split(","):
            for threads in numbers(options.threads):
                results.append(judged(measure(options, size, threads)))
                show(results[-1])
    if options.json:
        found = {"processor": processor(), "results": results}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
