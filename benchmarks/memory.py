"""What gradient checkpointing saves: peak memory of a training step at ViT-B/32's size."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (the most since it was cleared) of this process, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(folder: str, batch: int, checkpointing: bool, gradients: Path) -> dict[str, Any]:
    """Peak memory above the model's own, and time, of the second of two equal steps."""
    import torch

    from fedlora import quick_clip_lora

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = quick_clip_lora(folder, num_classes=10, lora_r=16).train()
    lora = model.lora_wrapper
    if checkpointing:
        lora.enable_gradient_checkpointing()
    pixels = torch.randn(batch, 3, 224, 224)
    labels = torch.arange(batch) % 10
    with torch.no_grad():  # B and the head start at zero, where the other gradients are zero too
        for part in lora.parameters.values():
            for parameter in part.values():
                parameter.add_(0.01 * torch.randn_like(parameter))

    def step() -> None:
        model.zero_grad()
        lora.set_dropout_key(1)
        torch.nn.functional.cross_entropy(model(pixels), labels).backward()

    step()
    model.zero_grad()
    before = resident("VmRSS")
    CLEAR.write_text("5")  # the peak counts from here
    began = time.perf_counter()
    step()
    seconds = time.perf_counter() - began
    peak = resident("VmHWM")
    found = {n: p.grad for n, p in lora.trainable().items() if p.grad is not None}
    torch.save(found, gradients)
    return {"resident": before, "peak": peak, "seconds": seconds}


def run(folder: str, batch: int, checkpointing: bool, gradients: Path) -> dict[str, Any]:
    """Measure in a process of its own, whose memory nothing else has touched."""
    command = [sys.executable, __file__, "--one", folder, "--batch", str(batch)]
    command += ["--gradients", str(gradients), *(["--checkpointing"] if checkpointing else [])]
    # Else glibc keeps freed memory, and what the first step took is no more seen in the second.
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(folder: str, batch: int) -> None:
    """Print both, their ratio, and how far the gradients are apart."""
    import torch

    with tempfile.TemporaryDirectory() as scratch:
        files = {on: Path(scratch) / f"{on}.pt" for on in (False, True)}
        results = {on: run(folder, batch, on, files[on]) for on in (False, True)}
        plain, saved = (torch.load(files[on], weights_only=True) for on in (False, True))
    print(f"ViT-B/32 size, batch {batch}, rank 16 in both towers, linear head, float32, 1 thread")
    for on, figures in results.items():
        extra = figures["peak"] - figures["resident"]
        print(
            f"checkpointing {'on ' if on else 'off'}: peak {figures['peak'] / 1e6:,.0f} MB, of it "
            f"{extra / 1e6:,.0f} MB for the step; {figures['seconds']:.2f} s"
        )
    extras = [results[on]["peak"] - results[on]["resident"] for on in (True, False)]
    times = [results[on]["seconds"] for on in (True, False)]
    difference = max(float((plain[n] - saved[n]).abs().max()) for n in plain)
    largest = max(float(g.abs().max()) for g in plain.values())
    print(
        f"ratio: memory of the step {extras[0] / extras[1]:.2f}, time {times[0] / times[1]:.2f}; "
        f"gradients of {len(plain)} tensors differ by at most {difference:.1e} (largest "
        f"{largest:.1e})"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", help="a folder as vit_folder.py makes it; None makes one")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--gradients", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.batch, args.checkpointing, args.gradients)))
    elif args.folder:
        compare(args.folder, args.batch)
    else:
        from vit_folder import make_vit_b32_folder

        with tempfile.TemporaryDirectory() as made:
            compare(str(make_vit_b32_folder(Path(made) / "b32")), args.batch)
