"""What a round costs the server under each rule, and what thin singular values save.

The adapter is that of a ViT-B/32: fc1 and fc2 of the 12 blocks of its vision tower, and a head of
10 classes. Clients do not train: a generator makes what they would send, fresh for each, and its
own time is taken off.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from memory import CLEAR, resident
from torch import Tensor

from fedlora.aggregation import RULES, Aggregator
from fedlora.low_rank import svd
from fedlora.state import AdapterState, Client, ClientUpdate, Part, Residual, Round

WIDTH, WIDE, BLOCKS, FEATURES, CLASSES = 768, 3072, 12, 512, 10
SHAPES = {  # path -> (out_features, in_features)
    f"vision_model.encoder.layers.{block}.mlp.{name}": shape
    for block in range(BLOCKS)
    for name, shape in (("fc1", (WIDE, WIDTH)), ("fc2", (WIDTH, WIDE)))
}
GROWTH = "FedAvg"  # whose memory is looked at with more clients
TARGETS = {4: 30, 10: 8}  # clients -> how many times faster thin singular values should be
MB = 1e6


def noise(*shape: int, seed: int, size: float = 1.0) -> Tensor:
    """Normal values of this standard deviation, a function of the seed."""
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fresh(rank: int) -> AdapterState:
    """An adapter before the first round: B is zero."""
    numbered = list(enumerate(SHAPES.items()))
    return AdapterState(
        A={name: noise(rank, n, seed=i, size=n**-0.5) for i, (name, (_, n)) in numbered},
        B={name: torch.zeros(m, rank) for name, (m, _) in SHAPES.items()},
        other={
            "classifier.weight": noise(CLASSES, FEATURES, seed=100),
            "classifier.bias": torch.zeros(CLASSES),
        },
        scaling=dict.fromkeys(SHAPES, 2.0),
    )


def drift(adapter: AdapterState, seed: int) -> AdapterState:
    """What training may add to an adapter: noise of a hundredth."""
    generator = torch.Generator().manual_seed(seed)

    def like(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: torch.randn(tensor.shape, generator=generator).mul_(0.01)
            for name, tensor in tensors.items()
        }

    return AdapterState(like(adapter.A), like(adapter.B), like(adapter.other))


def moved(sent: AdapterState, common: AdapterState, own: AdapterState) -> AdapterState:
    """An adapter as training leaves it: what all clients learn, and as much of its own."""

    def add(part: Part) -> dict[str, Tensor]:
        steps, shared = own.part(part), common.part(part)
        return {n: steps[n].add_(shared[n]).add_(t) for n, t in sent.part(part).items()}

    return replace(sent, A=add("A"), B=add("B"), other=add("other"))


def play(rule: Aggregator, server: AdapterState, rank: int, rnd: Round) -> Iterator[ClientUpdate]:
    """What the clients of a round send; all of them played in the round before, too."""
    common = drift(server, seed=rnd.idx)
    for number in range(rnd.cohort):
        client = Client(number, 100 + number, rank, last_round=rnd.idx - 1 if rnd.idx else None)
        down = rule.distribute(server, client, rnd)
        sent = down.over(server.cut(client.rank, client.scale))
        own = drift(sent, seed=1000 + number + rnd.idx * rnd.cohort)
        trained = moved(sent, common, own).only(rule.trainable(rnd)).cut(client.rank)
        payload = rule.upload(sent, trained, client, rnd)
        weight = float(client.num_samples)
        yield ClientUpdate(client, sent, payload, weight, down_nbytes=down.nbytes)


class Tally:
    """Passes updates on; adds up the seconds that making them takes, and their bytes."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.up = self.down = self.count = 0

    def watch(self, updates: Iterable[ClientUpdate]) -> Iterator[ClientUpdate]:
        """Pass the updates on."""
        stream = iter(updates)
        while True:
            began = time.perf_counter()
            update = next(stream, None)
            self.seconds += time.perf_counter() - began
            if update is None:
                return
            self.up += update.nbytes
            self.down += update.down_nbytes
            self.count += 1
            yield update


def settle() -> int:
    """Give freed memory back, and count the peak from here; returns what is held, in bytes."""
    gc.collect()
    # Else glibc keeps what the round before took, and it is no more seen in this one.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    held = resident("VmRSS")
    CLEAR.write_text("5")
    return held


def measure(name: str, clients: int, rank: int, threads: int) -> dict[str, Any]:
    """The second of two rounds under a rule."""
    torch.set_num_threads(threads)
    rule = RULES[name]()
    first = Round(0, num_clients=clients, cohort=clients)
    base = {
        layer: noise(*shape, seed=i, size=0.02) for i, (layer, shape) in enumerate(SHAPES.items())
    }
    began = time.perf_counter()
    server = rule.start(fresh(rank), base, first)
    started = time.perf_counter() - began
    del base  # a run has it in the model, which is not here
    server = rule.aggregate(server, play(rule, server, rank, first), first)

    second = replace(first, idx=1)
    held = settle()
    for _ in play(rule, server, rank, second):
        pass
    alone = resident("VmHWM") - held

    tally = Tally()
    held = settle()
    began = time.perf_counter()
    seen = tally.watch(play(rule, server, rank, second))
    after = rule.aggregate(server, seen, second)
    seconds = time.perf_counter() - began - tally.seconds
    peak = resident("VmHWM") - held
    for _ in seen:  # a rule that reads none still has clients who play
        pass
    return {
        "rule": name,
        "clients": clients,
        "rank": rank,
        "threads": threads,
        "seconds": seconds,
        "generator_seconds": tally.seconds,
        "start_seconds": started,
        "peak_bytes": peak,
        "generator_peak_bytes": alone,
        "up_bytes": tally.up / tally.count,
        "down_bytes": tally.down / tally.count,
        "residual_bytes": sum(change.nbytes for change in after.residual.values()),
    }


def stacked(clients: int, rank: int, shape: tuple[int, int], seed: int) -> Residual:
    """``sum_k p_k B_k A_k`` of one layer as thin factors, float64."""
    columns = clients * rank
    U = noise(shape[0], columns, seed=seed, size=1 / clients)
    return Residual(U, noise(columns, shape[1], seed=seed + 1)).to(torch.float64)


def compare(clients: int, rank: int, threads: int, repeats: int) -> dict[str, Any]:
    """Singular values of every layer, thin and dense by turns."""
    torch.set_num_threads(threads)
    seconds: dict[str, list[float]] = {"thin": [], "dense": []}
    gap = 0.0

    def timed(form: str, change: Residual) -> Tensor:
        began = time.perf_counter()
        if form == "thin":
            _, values, _ = svd(change)
        else:  # forming the matrix is part of it
            _, values, _ = torch.linalg.svd(change.dense(), full_matrices=False)
        seconds[form].append(time.perf_counter() - began)
        return values

    timed("thin", stacked(clients, rank, (WIDE, WIDTH), 0))  # warms up
    timed("dense", stacked(clients, rank, (WIDE, WIDTH), 0))
    seconds = {"thin": [], "dense": []}
    for turn in range(repeats):
        for index, shape in enumerate(SHAPES.values()):
            change = stacked(clients, rank, shape, 1000 * turn + 2 * index)
            forms = ("thin", "dense") if index % 2 else ("dense", "thin")
            found = {form: timed(form, change) for form in forms}
            thin, dense = found["thin"], found["dense"]
            gap = max(gap, float((thin - dense[: len(thin)]).abs().max() / dense[0]))
    ratios = [dense / thin for thin, dense in zip(seconds["thin"], seconds["dense"], strict=True)]
    return {
        "clients": clients,
        "rank": rank,
        "threads": threads,
        "pairs": len(ratios),
        **{f"{form}_seconds": sum(found) / repeats for form, found in seconds.items()},
        "ratio_median": median(ratios),
        "ratio_least": min(ratios),
        "ratio_most": max(ratios),
        "target": TARGETS.get(clients),
        "largest_difference": gap,
    }


def alone(limit: int, *arguments: object) -> dict[str, Any]:
    """Measure in a process of its own, whose memory and threads nothing else has touched."""
    command = [sys.executable, __file__, *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {limit} s (--limit)"}
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"failed": said[-1]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def show_rules(names: Sequence[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure each rule and print its row."""
    numbers = sum(options.rank * sum(shape) for shape in SHAPES.values())
    print(
        f"{options.clients} clients, rank {options.rank}, {len(SHAPES)} layers, {numbers:,} "
        f"parameters and a head, float32, {options.threads} thread(s)"
    )
    print(f"{'rule':<12} {'seconds':>9} {'peak MB':>9} {'up MB':>9} {'down MB':>9} {'start s':>9}")
    rows = []
    for name in names:
        row = alone(
            options.limit,
            *("--one", name, "--clients", options.clients),
            *("--rank", options.rank, "--threads", options.threads),
        )
        rows.append({"rule": name, **row})
        if "failed" in row:
            print(f"{name:<12} {row['failed']}")
            continue
        sizes = [row[key] / MB for key in ("peak_bytes", "up_bytes", "down_bytes")]
        cells = [f"{row['seconds']:9.2f}", f"{sizes[0]:9,.0f}", *(f"{s:9.3f}" for s in sizes[1:])]
        print(f"{name:<12} {' '.join(cells)} {row['start_seconds']:9.2f}", flush=True)
    makers = [row["generator_peak_bytes"] for row in rows if "failed" not in row]
    if makers:
        print(f"of each peak the updates themselves: {median(makers) / MB:,.0f} MB (median)")
    return rows


def show_growth(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the peak of a mean with more and more clients."""
    counts = [int(count) for count in options.growth.split(",")]
    same = ("--rank", options.rank, "--threads", options.threads)
    rows = [alone(options.limit, "--one", GROWTH, "--clients", c, *same) for c in counts]
    said = ", ".join(
        f"{count} clients {row.get('peak_bytes', math.nan) / MB:,.0f} MB"
        for count, row in zip(counts, rows, strict=True)
    )
    print(f"{GROWTH}, peak above the start: {said}")
    return rows


def show_svd(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print thin against dense singular values on one and on two threads."""
    print(f"singular values of all {len(SHAPES)} layers, rank {options.rank} a client, float64")
    rows = []
    for threads in (1, 2):
        for clients, target in TARGETS.items():
            row = alone(
                options.limit,
                *("--svd", clients, "--rank", options.rank),
                *("--threads", threads, "--repeats", options.repeats),
            )
            rows.append(row)
            if "failed" in row:
                print(f"  {clients} clients: {row['failed']}")
                continue
            print(
                f"  {clients:>2} clients, {threads} thread(s): thin {row['thin_seconds']:.2f} s, "
                f"dense {row['dense_seconds']:.2f} s, dense / thin {row['ratio_median']:.1f} "
                f"(median of {row['pairs']}; {row['ratio_least']:.1f} to {row['ratio_most']:.1f}; "
                f"wanted {target}); values differ by {row['largest_difference']:.0e} at most",
                flush=True,
            )
    return rows


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rules", help="a list such as FedAvg,FLoRA; default all; empty for none")
    parser.add_argument("--threads", type=int, default=1, help="of the rules")
    parser.add_argument("--growth", default="10,100,400", help="clients; empty leaves it out")
    parser.add_argument("--repeats", type=int, default=1, help="of the singular values; 0: none")
    parser.add_argument("--limit", type=int, default=600, help="seconds for one measurement")
    parser.add_argument("--json", type=Path, help="write the results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--svd", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.clients, options.rank, options.threads)))
        return
    if options.svd:
        print(json.dumps(compare(options.svd, options.rank, options.threads, options.repeats)))
        return
    names = list(RULES) if options.rules is None else options.rules.split(",")
    names = sorted(name for name in names if name)
    unknown = sorted(set(names) - set(RULES))
    if unknown:
        parser.error(f"--rules should be of {', '.join(sorted(RULES))} but got {unknown[0]}")
    results: dict[str, Any] = {}
    if names:
        results["rules"] = show_rules(names, options)
    if options.growth:
        results["growth"] = show_growth(options)
    if options.repeats:
        results["svd"] = show_svd(options)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
