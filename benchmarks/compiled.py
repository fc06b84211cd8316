"""What torch.compile is worth to a training step, beside what fedlora does in its place."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from vit_folder import make_vit_b32_folder

from fedlora import CLIPLoRAWrapper, FederatedCLIPModel, LoRAConfig
from fedlora.modules.quick import make_quick

STEPS = {"tiny": 20, "vit-b32": 2}
BATCH = {"tiny": 32, "vit-b32": 16}


def make_step(folder: str, batch: int, how: str) -> Callable[[], object]:
    """A forward and backward pass: ``eager`` PEFT, ``compiled`` PEFT, or ``fedlora``."""
    torch.manual_seed(0)
    model = FederatedCLIPModel(folder, 10, keep_text_tower=False)
    config = LoRAConfig(r=8, lora_alpha=16, lora_dropout=0.0)  # masks would break the graph
    CLIPLoRAWrapper(model, config, towers="vision").apply()
    if how == "fedlora":
        make_quick(model)
    if how == "compiled":
        for layer in model.clip.vision_model.encoder.layers:
            layer.compile()
    model.train()
    size = model.preprocess.size
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    labels = torch.randint(0, 10, (batch,))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(images), labels).backward()

    return step


def timed(step: Callable[[], object], count: int) -> float:
    """Seconds of some steps."""
    began = time.perf_counter()
    for _ in range(count):
        step()
    return time.perf_counter() - began


def measure(size: str, turns: int, threads: int, scratch: Path) -> dict[str, Any]:
    """All three in turns, after one that does not count."""
    torch.set_num_threads(threads)
    folder = "tiny-clip" if size == "tiny" else str(make_vit_b32_folder(scratch / "vit_b32"))
    ways = {how: make_step(folder, BATCH[size], how) for how in ("eager", "compiled", "fedlora")}
    first = {how: timed(step, 1) for how, step in ways.items()}
    seconds: dict[str, list[float]] = {how: [] for how in ways}
    for turn in range(turns + 1):
        for how in list(ways)[:: 1 if turn % 2 else -1]:
            took = timed(ways[how], STEPS[size])
            if turn:
                seconds[how].append(took)
    ratios = {
        how: sorted(a / b for a, b in zip(values, seconds["eager"], strict=True))
        for how, values in seconds.items()
    }
    print(f"{size}, {threads} thread(s), {turns} turns; compiling took {first['compiled']:.0f} s")
    for how in ("compiled", "fedlora"):
        low, *_, high = ratios[how]
        print(f"  {how} / eager PEFT: {median(ratios[how]):.3f} ({low:.3f} to {high:.3f})")
    return {"size": size, "threads": threads, "seconds": seconds, "ratios": ratios, "first": first}


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="tiny,vit-b32")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = [
            measure(size, options.turns, options.threads, Path(scratch))
            for size in options.sizes.split(",")
        ]
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
