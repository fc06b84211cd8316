"""Lanes on a GPU beside a bare loop: clients a second, model-FLOPs utilisation, memory, a profile.

Part of ``lanes.py --gpu``. One way after the other, in an order that is reversed every other time:
memory is measured with nothing else on the GPU.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from flops import Tower, matrix_rates
from made_up import settings, sized
from round import BareLoop
from torch import Tensor, nn
from turns import Run, Work, numbers, said, with_runs
from turns import ratio as within_turns

DEFAULTS: dict[str, Any] = {
    "clients": 64,
    "steps": 4,
    "lanes": "4,16,64",
    "batches": "32",
    "threads": "1",
    "turns": 3,
}
BARE, AT_LEAST = "bare loop", 5.0  # clients a second, of those of the bare loop
PRECISION = ("--trainer.averaging.precision=bf16-mixed", "--trainer.averaging.base_dtype=bfloat16")
# Dense products in bfloat16, of data sheets, beside what is measured.
SHEETS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


class BareOnDevice(BareLoop):
    """The bare loop as one writes it for a GPU: base in bfloat16, autocast, a fused optimizer.

    All pictures are on the device beforehand.
    """

    def move(self, device: torch.device) -> BareOnDevice:
        """Take everything there."""
        self.device = device
        self.vision.to(device)
        self.head.to(device)
        for module in self.vision.modules():
            frozen = isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.requires_grad
            if frozen:  # as base_dtype does
                module.to(torch.bfloat16)
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        self.scale, self.shift = self.scale.to(device), self.shift.to(device)
        self.shared = {name: tensor.to(device) for name, tensor in self.shared.items()}
        return self

    def _train(self, batches: Sequence[Tensor]) -> float:
        adapter = [p for n, p in self.trained.items() if not n.startswith("head.")]
        lr = self.optimizer([nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"]
        groups = [
            {"params": adapter},
            {"params": list(self.head.parameters()), "lr": self.head_lr or lr},
        ]
        optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0, fused=True)
        self.vision.train()
        summed, seen = torch.zeros((), device=self.device), 0
        for rows in batches:
            there = rows.to(self.device, non_blocking=True)
            pixels = self.images[there].float().mul_(self.scale).add_(self.shift)
            with torch.autocast(self.device.type, torch.bfloat16):
                features = nn.functional.normalize(self.vision(pixels).image_embeds, dim=-1)
                loss = nn.functional.cross_entropy(self.head(features).float(), self.labels[there])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            summed += loss.detach() * len(rows)
            seen += len(rows)
        return summed.item() / seen


class Meter:
    """Memory and profile of a device; without a GPU there is no memory to measure."""

    def __init__(self, device: str) -> None:
        self.device = device

    def clear(self) -> None:
        """Let go of what is not used, and count from here."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def wait(self) -> None:
        """Until the device has nothing to do."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    @property
    def peak(self) -> int:
        """The most bytes since."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else 0

    def profile(self, play: Callable[[], object], rows: int) -> str:
        """Where a call's time goes, by operation."""
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        activities += [ProfilerActivity.CUDA] if self.device == "cuda" else []
        with profile(activities=activities) as seen:
            play()
            self.wait()
        by = "self_cuda_time_total" if self.device == "cuda" else "self_cpu_time_total"
        table: str = seen.key_averages().table(sort_by=by, row_limit=rows, max_name_column_width=60)
        return table


def run(options: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Measure all batch sizes."""
    device = "cuda" if options.accelerator == "gpu" else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "no GPU: to try the script only"
    meter = Meter(device)
    meter.clear()
    rate = max(matrix_rates(device, torch.bfloat16, 8192 if device == "cuda" else 256).values())
    print(
        f"{name}, torch {torch.__version__}; bfloat16 products {rate / 1e12:,.1f} * 10^12 a second"
    )
    meter.clear()
    found: dict[str, Any] = {"device": name, "size": options.size, "rate": rate, "cells": []}
    targets = []
    for batch in numbers(options.batches):
        cell = measure(options, rest, batch, meter)
        found["cells"].append(cell)
        targets.append(show(cell, rate, _sheet(name)))
    return {**found, "targets": targets}


def _sheet(name: str) -> float | None:
    return next((rate for known, rate in SHEETS.items() if known in name), None)


def measure(
    options: argparse.Namespace, rest: list[str], batch: int, meter: Meter
) -> dict[str, Any]:
    """All ways at one batch size."""
    common = [
        *settings(options.clients, batch, options.steps),
        *sized(options.size, options.scratch),
        f"--trainer.accelerator={options.accelerator}",
        f"--trainer.threads={options.threads}",
        *PRECISION,
        *rest,
    ]
    lanes = [k for k in options.lanes.split(",") if k != "1"]
    ways = {BARE: common, "1": common}
    ways |= {k: [*common, f"--trainer.lanes={k}"] for k in lanes}
    cell: dict[str, Any] = {"batch": batch, "clients": options.clients, "ways": {}, "profiles": {}}
    for turn in range(options.turns):
        for name in list(ways) if turn % 2 == 0 else list(reversed(ways)):
            meter.clear()
            rows = options.profile if turn == options.turns - 1 else 0
            seen = attempt(partial(one, name, ways[name], meter, rows))
            cell["profiles"] |= {name: seen.pop("profile")} if "profile" in seen else {}
            cell |= seen.pop("about", {})
            cell["ways"].setdefault(name, []).append(seen)
    return cell


def attempt(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a call returns, or why it could not: too little memory is an answer."""
    try:
        return call()
    except Exception as error:
        if "out of memory" not in str(error):
            raise
    return {"failed": "out of memory"}


def one(name: str, way: Sequence[str], meter: Meter, rows: int) -> dict[str, Any]:
    """Play a warm round of a way, and one more for its profile."""
    if name == BARE:
        return bare(way, meter, rows)

    def body(runs: dict[str, Run]) -> dict[str, Any]:
        own = runs[name]
        seen = timed(own.play, meter, rows)
        return {**seen, "about": about(own)}

    return with_runs({name: way}, body)


def timed(play: Callable[[], object], meter: Meter, rows: int) -> dict[str, Any]:
    """Seconds and peak memory of a call, and the profile of another."""
    meter.clear()
    began = time.perf_counter()
    play()
    meter.wait()
    seen: dict[str, Any] = {"seconds": time.perf_counter() - began, "peak": meter.peak}
    if rows:
        seen["profile"] = meter.profile(play, rows)
    return seen


def about(run: Run) -> dict[str, Any]:
    """Operations and pictures of a round, which are the same in all ways."""
    model = run.trainer.lightning_module
    rank, classes = model.lora_config.r, run.trainer.datamodule.num_classes
    count = Tower.of(model.model.clip).count(set(run.first.A), rank, classes)
    pictures = sum(len(batch) for _, batches in run.work() for batch in batches)
    return {"operations": count.all, "pictures": pictures}


def bare(way: Sequence[str], meter: Meter, rows: int) -> dict[str, Any]:
    """The same round in the bare loop, when the run that it is taken from is over."""

    def body(runs: dict[str, Run]) -> tuple[BareOnDevice, Work]:
        trainer = runs[BARE].trainer
        model, data = trainer.lightning_module, trainer.datamodule
        return BareOnDevice(model, data, trainer.server.adapter), runs[BARE].work()

    loop, work = with_runs({BARE: way}, body)
    loop.move(torch.device(meter.device))
    loop.play(work[:1])  # warms up
    return timed(lambda: loop.play(work), meter, rows)


def show(cell: dict[str, Any], rate: float, sheet: float | None) -> dict[str, Any]:
    """Print a cell; returns the target."""
    done = {n: [s for s in seen if "seconds" in s] for n, seen in cell["ways"].items()}
    seconds = {name: [s["seconds"] for s in seen] for name, seen in done.items() if seen}
    print(f"\n{cell['clients']} clients a round, batches of {cell['batch']}")
    for name in cell["ways"]:
        if name not in seconds:
            print(f"  {name:<10} out of memory")
            continue
        spent = median(seconds[name])
        used = cell["operations"] * cell["pictures"] / spent
        of_sheet = "" if sheet is None else f", of the data sheet's {used / sheet:.3f}"
        print(
            f"  {name:<10} {cell['clients'] / spent:8.2f} clients/s; utilisation of the measured "
            f"rate {used / rate:.3f}{of_sheet}; peak {max(s['peak'] for s in done[name]) / 1e9:.2f}"
            " GB"
        )
    best = min((n for n in seconds if n != BARE), key=lambda name: median(seconds[name]))
    faster = within_turns(seconds[BARE], seconds[best])
    for name, table in cell["profiles"].items():
        print(f"\nprofile of a round, {name}\n{table}")
    passed = faster["median"] >= AT_LEAST
    text = f"clients a second, {best} lanes / bare loop, batches of {cell['batch']}"
    print(f"  {'PASS' if passed else 'MISS'}  {text}: {said(faster)}; at least {AT_LEAST:g}")
    return {"text": text, "ratio": faster, "least": AT_LEAST, "passed": passed}
