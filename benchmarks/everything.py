"""Every benchmark of speed on this machine, one after the other: all ratios, all targets, one JSON.

Each script is a process of its own and may be run alone, with more options.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import startup
import torch
from limit import processor
from turns import ratio

from processes import TARGET as MOST_PROCESSES

HERE = Path(__file__).parent
Target = dict[str, Any]


def given(found: Any) -> list[Target]:
    """The targets of a script that writes them down itself."""
    return list(found["targets"])


def of_round(found: Any) -> list[Target]:
    """Those of ``round.py``."""
    return [
        {
            "text": f"a round, fedlora / bare loop, {each['size']}",
            "ratio": {
                "median": each["ratio_median"],
                "least": each["ratio_least"],
                "most": each["ratio_most"],
                "fastest": each["ratio_of_minima"],
            },
            "most": each["target"],
            "passed": each["ratio_median"] <= each["target"],
        }
        for each in found
    ]


def of_processes(found: Any) -> list[Target]:
    """That of ``processes.py``."""
    two, one = ([median(run["rounds"]) for run in found[f"{n} clients"]] for n in (2, 1))
    each = ratio(two, one)
    passed = each["median"] <= MOST_PROCESSES
    text = "a round, 2 processes / 1"
    return [{"text": text, "ratio": each, "most": MOST_PROCESSES, "passed": passed}]


def of_startup(found: Any) -> list[Target]:
    """Those of ``startup.py``."""
    rows, targets = found["commands"], []
    for name, most in startup.MOST_RATIO.items():
        each = {key: rows[name][key] for key in ("least", "most", "fastest")}
        each["median"] = rows[name]["ratio"]
        text = f"{name} / {startup.REFERENCE}"
        passed = each["median"] <= most
        targets.append({"text": text, "ratio": each, "most": most, "passed": passed})
    for name, most in startup.MOST_SECONDS.items():
        value = rows[name]["seconds"]
        text = f"{name}, seconds"
        targets.append({"text": text, "value": value, "most": most, "passed": value <= most})
    return targets


def none(_: Any) -> list[Target]:
    """What a script without targets has."""
    return []


@dataclass(frozen=True)
class Script:
    """One benchmark.

    Attributes:
        command: file and options.
        quick: options in place of those, to try it.
        targets: reads them from its JSON.
        scratch: whether it takes ``--scratch``.
        gpu: whether it needs a GPU.
    """

    command: str
    quick: str
    targets: Callable[[Any], list[Target]] = given
    scratch: bool = True
    gpu: bool = False


SCRIPTS: dict[str, Script] = {
    "round": Script("round.py", "round.py --sizes tiny --repeats 2", of_round),
    "lanes": Script("lanes.py", "lanes.py --quick"),
    "lanes-vit": Script(
        "lanes.py --size vit-b32", "lanes.py --size vit-b32 --quick --clients 2 --batches 2"
    ),
    "scaling": Script("scaling.py", "scaling.py --quick"),
    "limit": Script("limit.py", "limit.py --quick --threads 1 --sizes tiny", none),
    "compiled": Script("compiled.py", "compiled.py --turns 1 --sizes tiny", none, scratch=False),
    "processes": Script(
        "processes.py --repeats 5",
        "processes.py --repeats 1 --rounds 3 --ways clients",
        of_processes,
        scratch=False,
    ),
    "startup": Script("startup.py", "startup.py --repeats 1", of_startup, scratch=False),
    "peers": Script(
        "peers.py",
        "peers.py --only tiny --tools bare,fedlora --turns 1 "
        "--leave-out 'bare: 2 threads;fedlora: 1 process, 2 threads'",
    ),
    "gpu-b32": Script("lanes.py --gpu --size vit-b32", "lanes.py --gpu --quick", gpu=True),
    "gpu-l14": Script(
        "lanes.py --gpu --size vit-l14 --trainer.averaging.gradient_checkpointing=true",
        "lanes.py --gpu --size vit-b32 --quick",
        gpu=True,
    ),
}


def run(name: str, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run a script; what it prints is seen meanwhile."""
    script = SCRIPTS[name]
    file, *arguments = shlex.split(script.quick if options.quick else script.command)
    arguments += ["--scratch", str(scratch)] if script.scratch else []
    arguments += options.more if name == "peers" else []
    with tempfile.TemporaryDirectory() as temporary:
        written = Path(temporary) / "found.json"
        command = [sys.executable, str(HERE / file), *arguments, "--json", str(written)]
        print(f"\n=== {name}: {' '.join([file, *arguments])}", flush=True)
        began = time.perf_counter()
        done = subprocess.run(command, check=False, cwd=HERE)
        seconds = time.perf_counter() - began
        found = json.loads(written.read_text(encoding="utf-8")) if written.exists() else None
    print(f"=== {name}: exit code {done.returncode}, {seconds / 60:.1f} min", flush=True)
    about = {"command": [file, *arguments], "exit": done.returncode, "seconds": seconds}
    targets = [] if found is None else script.targets(found)
    return {**about, "targets": targets, "found": found}


def show(results: dict[str, Any]) -> list[str]:
    """Print all targets; returns the names of scripts that failed or missed one."""
    print("\ntargets: ratio within a turn, median (least to most)")
    for name, result in results.items():
        for each in result["targets"]:
            verdict = "PASS" if each["passed"] else "MISS"
            print(f"  {verdict}  {name:<10} {each['text']}: {_figures(each)}; {_allowed(each)}")
    failed = [name for name, result in results.items() if result["found"] is None]
    missed = [n for n, r in results.items() if not all(each["passed"] for each in r["targets"])]
    wrong = [n for n, r in results.items() if r["exit"] and n not in (*failed, *missed)]
    for text, names in (("failed", failed), ("missed a target", missed), ("found fault", wrong)):
        if names:
            print(f"{text}: {', '.join(names)}")
    return [*failed, *missed, *wrong]


def _figures(target: Target) -> str:
    if "ratio" not in target:
        return f"{target['value']:.3g}"
    found = target["ratio"]
    return f"{found['median']:.3f} ({found['least']:.3f} to {found['most']:.3f})"


def _allowed(target: Target) -> str:
    return f"at least {target['least']:g}" if "least" in target else f"at most {target['most']:g}"


def machine() -> dict[str, Any]:
    """What all of it ran on."""
    return {
        "processor": processor(),
        "cores": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="What else is given goes to peers.py: --turns 3 …"
    )
    parser.add_argument("--only", help=f"of: {','.join(SCRIPTS)}; all but the GPU's by default")
    parser.add_argument("--gpu", action="store_true", help="those of the GPU too")
    parser.add_argument("--quick", action="store_true", help="each as small as it can be, to try")
    parser.add_argument("--json", type=Path, help="write the results, every timing included")
    parser.add_argument("--add", action="store_true", help="to those in the file")
    parser.add_argument("--scratch", type=Path, help="kept folder: models, environments, runs")
    options, options.more = parser.parse_known_args()
    if options.add and not options.json:
        parser.error("--add needs --json")
    usual = [name for name, script in SCRIPTS.items() if options.gpu or not script.gpu]
    options.only = options.only.split(",") if options.only else usual
    unknown = sorted(set(options.only) - set(SCRIPTS))
    if unknown:
        parser.error(f"--only should be of {', '.join(SCRIPTS)} but got {', '.join(unknown)}")
    return options


def earlier(options: argparse.Namespace) -> dict[str, Any]:
    """What is in the file, where it is to be added to."""
    if not options.add or not options.json.exists():
        return {}
    found: dict[str, Any] = json.loads(options.json.read_text(encoding="utf-8"))["scripts"]
    return found


def write(path: Path | None, results: dict[str, Any]) -> None:
    """All that was found so far."""
    if path is not None:
        found = {"machine": machine(), "scripts": results}
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Measure what the command line asks for."""
    options = parsed()
    results = earlier(options)
    about: Iterable[tuple[str, Any]] = machine().items()
    print(", ".join(f"{key} {value}" for key, value in about if value is not None))
    with tempfile.TemporaryDirectory() as temporary:
        scratch = (options.scratch or Path(temporary)).resolve()
        for name in options.only:
            results[name] = run(name, options, scratch)
            write(options.json, results)
    return int(bool(show(results)))


if __name__ == "__main__":
    raise SystemExit(main())
