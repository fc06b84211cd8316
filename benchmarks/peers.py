"""fedlora measured against what people use: a bare PyTorch loop, pfl-research, Flower.

All do the same: same model, pictures, batches, start and optimizer, whose losses and norms are
compared; otherwise the script exits with 1. They take turns, in an order that is reversed every
other turn, and what counts are ratios within a turn.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from peers.dump import make_work
from peers.figures import judge, show_part, show_spread
from peers.sizes import SIZES, SPREAD, TINY, VIT_B32, Size
from peers.tools import TOLERANCE, Bench, Variant, variants

TOOLS = ("bare", "fedlora", "pfl", "flower")
PARTS: dict[str, tuple[Size, ...]] = {
    "tiny": (TINY,),
    "vit": (VIT_B32,),
    "whole": (TINY,),
    "spread": SPREAD,
    "memory": (VIT_B32,),
}
WHOLE_ROUNDS, MEMORY_ROUNDS = 3, 2


def rounds(part: str, variant: Variant, size: Size) -> int:
    """How many a command plays; fedlora one more where single rounds count."""
    fixed = {"whole": WHOLE_ROUNDS, "memory": MEMORY_ROUNDS}
    return fixed.get(part, size.rounds if variant.tool == "fedlora" else size.rounds - 1)


def plan(part: str, options: argparse.Namespace, turn: int) -> Iterator[tuple[Variant, Size]]:
    """What a turn of a part runs, in its order."""
    given = (options.tools, options.leave_out, options.fedlora_best)
    pairs = [(variant, size) for size in PARTS[part] for variant in variants(part, size, *given)]
    yield from pairs if turn % 2 == 0 else pairs[::-1]


def play(options: argparse.Namespace, bench: Bench, records: list[dict[str, Any]]) -> None:
    """Play all turns; records grow, and are written after each run."""
    for part in options.only:
        before = [r["turn"] for r in records if r["part"] == part]
        first = max(before, default=-1) + 1
        # Memory is the same in each turn.
        for turn in range(first, first + (1 if part == "memory" else options.turns)):
            for variant, size in plan(part, options, turn):
                found = bench.play(variant, size, rounds(part, variant, size), part == "memory")
                about = {"part": part, "size": size.name, "turn": turn}
                about |= {"tool": variant.tool, "variant": variant.name}
                records.append({**about, **found})
                tell(records[-1])
                write(options.json, records, [])


def tell(record: dict[str, Any]) -> None:
    """One line of a run, while one waits."""
    print(
        f"{record['part']}, {record['size']}, turn {record['turn'] + 1}: {record['tool']}: "
        f"{record['variant']}: round {median(record['seconds'][1:]):.2f} s, whole "
        f"{record['whole']:.1f} s, peak {record['peak'] / 1e6:.0f} MB, losses apart "
        f"{record['loss_gap']:.1e}, norms {record['norm_gap']:.1e}",
        file=sys.stderr,
        flush=True,
    )


def write(path: Path | None, records: list[dict[str, Any]], targets: list[dict[str, Any]]) -> None:
    """All that was found."""
    if path is not None:
        about = {"machine": platform.machine(), "python": platform.python_version()}
        found = {**about, "records": records, "targets": targets}
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def faults(records: Sequence[dict[str, Any]]) -> list[str]:
    """Tools that did not compute the same, or not on the same torch."""
    found = dict.fromkeys(
        f"{r['tool']}: {r['variant']} on {r['size']} computes something else: losses are "
        f"{r['loss_gap']:.1e} apart, norms {r['norm_gap']:.1e}, at most {TOLERANCE:.0e} each"
        for r in records
        # Written so that NaN counts.
        if not (r["loss_gap"] <= TOLERANCE and r["norm_gap"] <= TOLERANCE)
    )
    torches = {r["torch"] for r in records}
    return [*found, *([f"torch differs: {', '.join(sorted(torches))}"] if len(torches) > 1 else [])]


def names(allowed: Sequence[str], text: str) -> list[str]:
    """A comma-separated option."""
    chosen = text.split(",")
    unknown = sorted(set(chosen) - set(allowed))
    if unknown:
        raise argparse.ArgumentTypeError(f"of {', '.join(allowed)}, not {', '.join(unknown)}")
    return chosen


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", default=[*PARTS], type=lambda t: names([*PARTS], t), help=f"of: {','.join(PARTS)}"
    )
    parser.add_argument(
        "--tools", default=TOOLS, type=lambda t: names(TOOLS, t), help=f"of: {','.join(TOOLS)}"
    )
    parser.add_argument(
        "--leave-out",
        default=[],
        type=lambda t: t.split(";"),
        help="settings, as 'pfl: 2 processes;…'",
    )
    parser.add_argument(
        "--fedlora-best", default="", help="settings to take as fedlora's, in place of the table's"
    )
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the results, every timing included")
    parser.add_argument("--add", action="store_true", help="to those in the file")
    parser.add_argument("--scratch", type=Path, help="kept folder: environments, work, runs")
    parser.add_argument("--pip", default="", help="options of pip install, for the environments")
    options = parser.parse_args()
    if options.turns < 1:
        parser.error(f"--turns must be at least 1, got {options.turns}")
    if options.add and not options.json:
        parser.error("--add needs --json")
    return options


def main() -> int:
    """Measure what the command line asks for."""
    options = parsed()
    records: list[dict[str, Any]] = []
    if options.add and options.json.exists():
        records = json.loads(options.json.read_text(encoding="utf-8"))["records"]
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench((options.scratch or Path(temporary)).resolve(), shlex.split(options.pip))
        for tool in options.tools:
            bench.python(tool)
        for size in dict.fromkeys(size for part in options.only for size in PARTS[part]):
            make_work(bench.work(size), size.arguments(bench.scratch), size.rounds)
        play(options, bench, records)
    print("torch", ", ".join(sorted({r["torch"] for r in records})))
    for tool, version in sorted({(r["tool"], r["version"]) for r in records if r["version"]}):
        print(tool, version)
    for part in PARTS:
        for name in SIZES:
            show_part(records, part, name)
    show_spread(records)
    write(options.json, records, judge(records))
    found = faults(records)
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
