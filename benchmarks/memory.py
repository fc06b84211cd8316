"""Peak memory and time of a training step, by precision, gradient checkpointing and base_dtype."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from vit_folder import make_vit_b32_folder

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
L14_PARAMETERS = 427_616_513


@dataclass(frozen=True)
class Case:
    """What a row measures, in the words of ``AdapterAveraging``."""

    precision: str
    checkpointing: bool
    base: str = "float32"

    @property
    def name(self) -> str:
        """As it is asked for and printed."""
        return f"{self.precision},{'on' if self.checkpointing else 'off'},{self.base}"

    @classmethod
    def of(cls, name: str) -> Case:
        """The inverse of ``name``."""
        precision, checkpointing, base = name.split(",")
        return cls(precision, checkpointing == "on", base)


SETTINGS = (("32-true", "float32"), ("bf16-mixed", "float32"), ("bf16-mixed", "bfloat16"))
ON_GPU = (*SETTINGS, ("16-mixed", "float32"))


def resident(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (the most since it was cleared) of this process, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


class Meter:
    """Memory of this process, or of the GPU, in bytes."""

    def __init__(self, gpu: bool) -> None:
        self.gpu = gpu

    def held(self) -> int:
        """What is held now; the peak counts from here."""
        import torch

        if self.gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        now = resident("VmRSS")
        CLEAR.write_text("5")
        return now

    def peak(self) -> int:
        """The most that was held since."""
        import torch

        return torch.cuda.max_memory_allocated() if self.gpu else resident("VmHWM")


def measure(folder: str, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """The model's bytes, then memory and time of steps after a first one like them."""
    import torch

    from fedlora import quick_clip_lora

    device = "cuda" if args.gpu else "cpu"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = quick_clip_lora(folder, num_classes=10, lora_r=16).to(device).train()
    lora = model.lora_wrapper
    if case.checkpointing:
        lora.enable_gradient_checkpointing()
    lora.set_base_dtype(getattr(torch, case.base))
    pixels = torch.randn(args.batch, 3, 224, 224).to(device)
    labels = torch.arange(args.batch, device=device) % 10
    with torch.no_grad():  # B and the head start at zero, where the other gradients are zero too
        for part in lora.parameters.values():
            for parameter in part.values():
                parameter.add_(0.01 * torch.randn(parameter.shape).to(device))
    kind = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(case.precision)
    scale = 2.0**16 if kind == torch.float16 else 1.0  # as the GradScaler starts

    def step() -> float:
        began = time.perf_counter()
        model.zero_grad()
        lora.set_dropout_key(1)
        with nullcontext() if kind is None else torch.autocast(device, kind):
            loss = torch.nn.functional.cross_entropy(model(pixels), labels)
        torch.autograd.backward(loss * scale)
        if args.gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    step()
    model.zero_grad()
    meter = Meter(args.gpu)
    before = meter.held()
    seconds = median(step() for _ in range(args.steps))
    peak = meter.peak()
    found = {n: p.grad.cpu() / scale for n, p in lora.trainable().items() if p.grad is not None}
    torch.save(found, args.gradients)
    tensors = (*model.parameters(), *model.buffers())
    return {
        "model": sum(tensor.nbytes for tensor in tensors),
        "held": before,
        "peak": peak,
        "seconds": seconds,
        "device": torch.cuda.get_device_name() if args.gpu else "CPU, 1 thread",
    }


def run(folder: str, case: Case, gradients: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure in a process of its own, whose memory nothing else has touched."""
    command = [sys.executable, __file__, "--folder", folder, "--one", case.name]
    command += ["--batch", str(args.batch), "--steps", str(args.steps)]
    command += ["--gradients", str(gradients), *(["--gpu"] if args.gpu else [])]
    # Else glibc keeps freed memory, and what the first step took is no more seen in the second.
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    result["step"] = result["peak"] - result["held"]
    return result


def compare(folder: str, args: argparse.Namespace) -> None:
    """Print a row for each case, in ratios to the first, and what checkpointing changes."""
    import torch

    settings = ON_GPU if args.gpu else SETTINGS
    cases = [Case(kind, on, base) for kind, base in settings for on in (False, True)]
    first: dict[str, Any] = {}
    differences = []
    with tempfile.TemporaryDirectory() as scratch:
        files = {case: Path(scratch) / f"{case.name}.pt" for case in cases}
        for case in cases:
            figures = run(folder, case, files[case], args)
            if not first:
                first = figures
                print(
                    f"{args.size} size, batch {args.batch}, rank 16 in both towers, linear head; "
                    f"{figures['device']}\n{'':<11}check-  {'':<9}{'MB':>9}{'MB':>9}{'MB':>9}"
                    f"{'MB':>9}{'s':>9}    of the first row\n{'precision':<11}points  {'base':<9}"
                    f"{'model':>9}{'before':>9}{'the step':>9}{'peak':>9}{'a step':>9}    "
                    "step   peak   time"
                )
            print(
                f"{case.precision:<11}{'on' if case.checkpointing else 'off':<8}{case.base:<9}"
                + "".join(f"{figures[n] / 1e6:>9,.0f}" for n in ("model", "held", "step", "peak"))
                + f"{figures['seconds']:>9.3f}  "
                + "".join(f"{figures[n] / first[n]:>7.2f}" for n in ("step", "peak", "seconds")),
                flush=True,
            )
        for kind, base in settings:
            plain, saved = (
                torch.load(files[Case(kind, on, base)], weights_only=True) for on in (False, True)
            )
            most = max(float((plain[n] - saved[n]).abs().max()) for n in plain)
            largest = max(float(g.abs().max()) for g in plain.values())
            differences.append(
                f"{kind}, {base}: with checkpointing the gradients of {len(plain)} tensors differ "
                f"by at most {most:.1e} (largest {largest:.1e})"
            )
    print("\n".join(differences))


def make_folder(path: Path, size: str) -> Path:
    """A folder with a random CLIP of a size that OpenAI published."""
    make_vit_b32_folder(path)
    if size == "vit-l14":  # another model under the same tokenizer and pictures
        from transformers import CLIPConfig, CLIPModel

        config = CLIPConfig.from_pretrained(path)
        wide = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
        vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
        vision |= {"num_hidden_layers": 24, "patch_size": 14}
        for part, changes in ((config.text_config, wide), (config.vision_config, vision)):
            for name, value in {**changes, "projection_dim": 768}.items():
                setattr(part, name, value)
        config.projection_dim = 768
        model = CLIPModel(config)
        count = sum(parameter.numel() for parameter in model.parameters())
        if count != L14_PARAMETERS:
            raise ValueError(f"this CLIP has {count:,} parameters, not {L14_PARAMETERS:,}.")
        model.save_pretrained(path)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", help="a folder as vit_folder.py makes it; None makes one")
    parser.add_argument("--size", choices=("vit-b32", "vit-l14"), default="vit-b32")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3, help="after a first one; the median counts")
    parser.add_argument("--gpu", action="store_true", help="on the first GPU, 16-mixed too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--gradients", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.folder, Case.of(args.one), args)))
    elif args.folder:
        compare(args.folder, args)
    else:
        with tempfile.TemporaryDirectory() as made:
            compare(str(make_folder(Path(made) / "clip", args.size)), args)
