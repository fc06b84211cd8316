"""What a second process is worth: rounds of one process and of several, in turns."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file

TARGET = 0.60  # of two processes that share clients, against one


def command(options: argparse.Namespace, rest: list[str], processes: int, how: str) -> list[str]:
    """A run as a user starts it."""
    return [
        *(sys.executable, "-m", "fedlora", "fit", "--config=clip_lora.yaml"),
        f"--trainer.max_rounds={options.rounds}",
        "--trainer.threads=1",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        f"--trainer.devices={processes}",
        f"--trainer.strategy={how}",
        *rest,
    ]


def run(options: argparse.Namespace, rest: list[str], processes: int, how: str) -> dict[str, Any]:
    """Play it, and read its tables."""
    with tempfile.TemporaryDirectory() as root:
        asked = [*command(options, rest, processes, how), f"--trainer.default_root_dir={root}"]
        began = time.perf_counter()
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        whole = time.perf_counter() - began
        if done.returncode:
            raise SystemExit(done.stderr)
        folder = Path(root) / "version_0"
        with (folder / "metrics.csv").open(newline="") as file:
            rounds = [float(row["time/round_s"]) for row in list(csv.DictReader(file))[1:]]
        weights = sorted((folder / "adapter").glob("*.safetensors"))
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()
        tensors = {k: t for path in weights for k, t in load_file(path).items()}
    # The first one warms up.
    return {"rounds": rounds[1:], "whole": whole, "sha256": digest, "tensors": tensors}


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of an entry of two adapters."""
    return max(float((tensor - other[name]).abs().max()) for name, tensor in one.items())


def compare(options: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """All in turns, the first one last every other time."""
    ways = [(1, "clients"), *((options.processes, how) for how in options.ways.split(","))]
    found: dict[str, Any] = {f"{n} {how}": [] for n, how in ways}
    first: dict[str, Any] = {}
    for repeat in range(options.repeats):
        for processes, how in ways if repeat % 2 == 0 else ways[::-1]:
            result = run(options, rest, processes, how)
            tensors = result.pop("tensors")
            first = first or {"sha256": result["sha256"], "tensors": tensors}
            result["same bits"] = result["sha256"] == first["sha256"]
            result["apart"] = apart(first["tensors"], tensors)
            found[f"{processes} {how}"].append(result)
    return found


def show(found: dict[str, Any]) -> int:
    """Print the ratios; 1 where the target is missed or bits differ that must not."""
    alone = found["1 clients"]
    faults = 0
    print("round: seconds of the warm rounds; ratios to one process of the same repeat")
    for name, results in found.items():
        seconds = [median(result["rounds"]) for result in results]
        ratios = [s / median(one["rounds"]) for s, one in zip(seconds, alone, strict=True)]
        whole = [r["whole"] / one["whole"] for r, one in zip(results, alone, strict=True)]
        same = all(result["same bits"] for result in results)
        print(
            f"{name:>12}: round {median(seconds):.2f} s, ratio {median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f}), of the fastest "
            f"{min(seconds) / min(median(one['rounds']) for one in alone):.3f}; whole command "
            f"{median(r['whole'] for r in results):.1f} s, ratio {median(whole):.3f}; "
            + ("same bits" if same else f"apart {max(r['apart'] for r in results):.1e}")
        )
        if name.endswith("clients") and not same:
            print(f"{name}: other bits than one process")
            faults = 1
        if name == "2 clients" and median(ratios) > TARGET:
            print(f"2 clients: {median(ratios):.3f} of the time, wanted at most {TARGET}")
            faults = 1
    return faults


def main() -> int:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="What else is given goes to fedlora: --model.lora.r=4 …"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--ways", default="clients,ddp", help="what they share")
    parser.add_argument("--rounds", type=int, default=6, help="of each run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures here")
    options, rest = parser.parse_known_args()
    found = compare(options, rest)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return show(found)


if __name__ == "__main__":
    raise SystemExit(main())
