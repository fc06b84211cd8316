"""What one waits for: `--version`, `--help`, `--print_config`, and a run's first optimizer step.

Each command is a process of its own. They take turns, so that ratios hold on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

REFERENCE = "import lightning.pytorch.cli"
CONFIG = "--config=clip_lora.yaml"
# The name of a part of the way to the first step: what ends it.
PARTS = {
    "imports": "all is imported, and nothing parsed",
    "parsing": "the command line is understood, and nothing built",
    "data and model": "on_train_start",
    "untrained model": "on_round_start: it is evaluated and saved as round 0",
    "first step": "an optimizer has stepped",
}
MOST_SECONDS = {"--version": 0.5}
MOST_RATIO = {"fit --help": 1.3, "fit --print_config": 1.3}


def commands() -> dict[str, list[str]]:
    """What is timed from its start to its end."""
    python, fedlora = [sys.executable, "-c"], [sys.executable, "-m", "fedlora"]
    return {
        REFERENCE: [*python, REFERENCE],
        "import fedlora": [*python, "import fedlora"],
        "--version": [*fedlora, "--version"],
        "fit --help": [*fedlora, "fit", "--help"],
        "fit --print_config": [*fedlora, "fit", CONFIG, "--print_config"],
    }


def whole(command: list[str]) -> float:
    """How long a command takes, in seconds."""
    began = time.monotonic()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - began


def first_step() -> dict[str, float]:
    """How long each part of the way to the first step takes, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        args = ["fit", CONFIG, f"--trainer.default_root_dir={folder}"]
        command = [sys.executable, __file__, "--child", str(time.monotonic()), *args]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    ends = [0.0, *(json.loads(done.stdout.splitlines()[-1])[part] for part in PARTS)]
    return {part: ends[i + 1] - ends[i] for i, part in enumerate(PARTS)}


def child(began: float, args: list[str]) -> int:
    """A command up to its first step; prints as JSON when each part was over, from ``began``."""
    from fedlora import main as script

    ends: dict[str, float] = {}

    def end(part: str) -> None:
        ends.setdefault(part, time.monotonic() - began)

    find = script._command

    def imported(args: Any) -> Callable[[], None]:
        run = find(args)
        end("imports")
        _watch(end, ends)
        return run

    script._command = imported
    script.main(args)
    return 1  # where the first step was made, it ended here


def _watch(end: Callable[[str], None], ends: dict[str, float]) -> None:
    from lightning.pytorch import Callback
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from fedlora import cli

    class Clock(Callback):
        def on_train_start(self, *_: object) -> None:
            end("data and model")

        def on_round_start(self, *_: object) -> None:
            end("untrained model")

    class Clocked(cli.FederatedCLI):
        def before_instantiate_classes(self) -> None:
            end("parsing")

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            trainer = super().instantiate_trainer(**kwargs)
            trainer.hooks.callbacks.append(Clock())
            return trainer

    def stepped(*_: object) -> None:
        end("first step")
        print(json.dumps(ends), flush=True)
        os._exit(0)

    cli.FederatedCLI = Clocked
    register_optimizer_step_post_hook(stepped)


def measure(repeats: int) -> dict[str, list[Any]]:
    """The times of each repeat; the first ones, which fill the caches of the disk, do not count."""
    timed = {name: lambda c=command: whole(c) for name, command in commands().items()}
    timed["first step"] = first_step
    times: dict[str, list[Any]] = {name: [] for name in timed}
    for turn in range(repeats + 1):
        names = list(timed) if turn % 2 else list(reversed(timed))
        for name in names:
            seconds = timed[name]()
            if turn:
                times[name].append(seconds)
        print(f"repeat {turn} of {repeats}" if turn else "warmed up", file=sys.stderr, flush=True)
    return times


def summary(times: dict[str, list[Any]]) -> dict[str, Any]:
    """Medians, ratios to the reference of the same repeat, and the targets that were missed."""
    steps = times["first step"]
    found: dict[str, Any] = {
        "first step": {part: median(step[part] for step in steps) for part in PARTS},
        "missed": [],
    }
    reference = times[REFERENCE]
    for name, seconds in {**times, "first step": [sum(s.values()) for s in steps]}.items():
        ratios = [each / base for each, base in zip(seconds, reference, strict=True)]
        row = {
            "seconds": median(seconds),
            "ratio": median(ratios),
            "least": min(ratios),
            "most": max(ratios),
            "fastest": min(seconds) / min(reference),
        }
        slow = row["seconds"] > MOST_SECONDS.get(name, row["seconds"])
        if slow or row["ratio"] > MOST_RATIO.get(name, row["ratio"]):
            found["missed"].append(name)
        found.setdefault("commands", {})[name] = row
    return found


def show(found: dict[str, Any]) -> None:
    """Print what :func:`summary` gave."""
    for name, row in found["commands"].items():
        target = ""
        if name in MOST_SECONDS:
            target = f"; at most {MOST_SECONDS[name]} s"
        if name in MOST_RATIO:
            target = f"; at most {MOST_RATIO[name]}"
        print(
            f"{name}: {row['seconds']:.2f} s, ratio {row['ratio']:.3f} ({row['least']:.3f} to "
            f"{row['most']:.3f}), of the fastest {row['fastest']:.3f}{target}"
        )
    parts = (f"{part} {seconds:.2f}" for part, seconds in found["first step"].items())
    print(f"to the first step, in s: {', '.join(parts)}")
    for name in found["missed"]:
        print(f"MISSED: {name}")


def main() -> int:
    """Measure and print; 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    times = measure(options.repeats)
    found = summary(times)
    show(found)
    if options.json:
        options.json.write_text(json.dumps({**found, "times": times}, indent=1))
    return 1 if found["missed"] else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        raise SystemExit(child(float(sys.argv[2]), sys.argv[3:]))
    raise SystemExit(main())
