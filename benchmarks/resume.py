"""Kill runs at random moments, go on with them, and compare the end with an undisturbed run.

For each rule or overlay: one undisturbed run, then others of the same settings whose process group
is killed one to three times, at moments drawn uniformly over the whole life of the undisturbed run,
from the start of Python to its exit. Each goes on with ``fit --ckpt_path last`` until it exits with
0 (from the beginning, where the kill came before there was a run to go on with). Then all that the
promise of equal bits covers is compared.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedlora.arguments import find_config
from fedlora.checkpoint import load
from fedlora.errors import CheckpointError, FedloraError
from fedlora.personal import ClientStore
from fedlora.run_folder import RunFolder

FEDLORA = (sys.executable, "-m", "fedlora")
# Ends that a signal may have: ours; the system's, where it came before fedlora could listen.
CODES = {"KILL": (-9,), "TERM": (143, -15), "INT": (130, -2)}
PATIENCE_S = 300  # until a process counts as hanging
SUMMARY_TIMES = ("seconds", "versions")
RULES = "FedAvg,FedExLoRA,FedSALoRA"


@dataclass(frozen=True)
class Subject:
    """What is killed.

    Attributes:
        name: as it is asked for and printed.
        settings: what it adds to the command line.
    """

    name: str
    settings: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Its name as that of one folder."""
        return self.name.replace("/", "-")

    @classmethod
    def of_rule(cls, name: str) -> Subject:
        """A rule, by its class name."""
        return cls(name, (f"--trainer.averaging.aggregator=fedlora.aggregation.{name}",))

    @classmethod
    def of_overlays(cls, name: str) -> Subject:
        """Shipped configs or files, joined by ``+``; later ones win.

        Raises:
            FedloraError: for one that is not there.
        """
        return cls(name, tuple(f"--config={find_config(part)}" for part in name.split("+")))


@dataclass
class Life:
    """What became of one process.

    Attributes:
        code: its exit code.
        seconds: how long it lived.
        killed: whether the signal reached it alive and ended it.
        stderr: what it wrote there.
    """

    code: int
    seconds: float
    killed: bool
    stderr: str


@dataclass
class Report:
    """What was seen of one subject."""

    kills: int = 0
    runs: int = 0
    identical: int = 0
    stages: Counter[str] = field(default_factory=Counter)
    leftovers: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)


def live(command: Sequence[str], log: Path, kill_after: float | None, sig: str) -> Life:
    """Run a command in a process group of its own and send it a signal after some seconds."""
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    sent = False
    with log.open("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        try:
            process.wait(timeout=PATIENCE_S if kill_after is None else kill_after)
        except subprocess.TimeoutExpired:
            sent = kill_after is not None
            os.killpg(process.pid, getattr(signal, f"SIG{sig}") if sent else signal.SIGKILL)
        try:
            code = process.wait(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        errors.seek(0)
        text = errors.read()
    return Life(code, time.perf_counter() - began, sent and code != 0, text)


def started(root: Path) -> bool:
    """Whether there is a run to go on with."""
    return any(root.glob("version_*/config.yaml"))


def stage(root: Path) -> str:
    """How far a run has come, as its files tell."""
    if not started(root):
        return "before the run folder"
    run = RunFolder.newest(root)
    if not run.checkpoint("last").exists():
        return "before the first checkpoint"
    if run.summary.exists():
        return "after the summary"
    try:
        return f"after round {load(run.checkpoint('last')).server.round_idx}"
    except CheckpointError:
        return "with a damaged checkpoint"


def disturbed(
    fresh: Sequence[str], root: Path, moments: Sequence[float], sig: str, report: Report
) -> int:
    """Run to the end, killed after each of ``moments``.

    Returns:
        How often it was killed; a run that did not end well is a fault in ``report``.
    """
    kills = 0
    for moment in (*moments, None):
        go_on = ("fit", "--ckpt_path", "last", f"--trainer.default_root_dir={root}")
        resumed = started(root)
        life = live([*FEDLORA, *(go_on if resumed else fresh)], root / "stderr.txt", moment, sig)
        if life.killed:
            kills += 1
            where = stage(root)
            report.stages[where] += 1
            report.faults += manners(life, sig, where)
        elif life.code == 0:
            break
        else:
            what = "going on" if resumed else "starting"
            report.faults.append(f"{root}: {what} ended with {life.code}: {life.stderr[-500:]}")
            break
    return kills


def manners(life: Life, sig: str, where: str) -> Iterator[str]:
    """What is wrong with how a process took a signal."""
    if sig == "KILL":
        return
    lines = life.stderr.strip().splitlines()
    ours, by_system = CODES[sig]
    # While Python still imports, nobody listens yet.
    early = where == "before the run folder"
    if life.code != ours and not (early and life.code == by_system):
        yield f"SIG{sig} {where}: exit code {life.code}, expected {ours}"
    if not early and len(lines) != 1:
        yield f"SIG{sig} {where}: {len(lines)} lines on stderr, expected 1: {lines[:3]}"


def fingerprint(root: Path) -> dict[str, Any]:
    """All that must be equal to the bit."""
    run = RunFolder.newest(root)
    found = {**_state(run, "last"), **_state(run, "best")}
    for path in (run.metrics, run.clients_csv, run.client_test, run.per_class):
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                found[path.name] = [_timeless(row) for row in csv.DictReader(file)]
    for path in sorted([*run.adapter.rglob("*"), *(run.path / "adapters").rglob("*")]):
        if path.suffix == ".safetensors":
            found[str(path.relative_to(run.path))] = path.read_bytes()
    found["summary.json"] = _timeless(json.loads(run.summary.read_text(encoding="utf-8")))
    return found


def _state(run: RunFolder, name: str) -> dict[str, Any]:
    """What a checkpoint holds, and the client files that it names."""
    saved = load(run.checkpoint(name))
    server, store = saved.server, ClientStore(run.clients)
    found: dict[str, Any] = {
        "round": server.round_idx,
        "versions of the client states": dict(server.versions),
        "rounds of the last download": dict(server.received),
        "history": [_timeless(row) for row in server.history],
        **{f"adapter/{n}": tensor for n, tensor in server.adapter.tensors()},
        **{f"residual/{n}": residual.dense() for n, residual in server.adapter.residual.items()},
        **_leaves({"rule": saved.rule, "callbacks": saved.callbacks}),
    }
    for client, version in server.versions.items():
        found[f"clients/{client}"] = store.path(client, version).read_bytes()
    return {f"{name}.ckpt {what}": value for what, value in found.items()}


def _leaves(state: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested state as path -> value, so that each tensor in it is compared by itself."""
    found: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            found |= _leaves(value, f"{prefix}{name}/")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _timeless(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _timeless(value) if isinstance(value, Mapping) else value
        for name, value in row.items()
        if name not in SUMMARY_TIMES and not name.startswith("time/")
    }


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, each with what it is and by how much."""
    found = [f"{name} is in one only" for name in sorted(one.keys() ^ other.keys())]
    for name in (name for name in one if name in other):
        a, b = one[name], other[name]
        if isinstance(a, torch.Tensor):
            if a.shape != b.shape:
                found.append(f"{name}: {tuple(a.shape)} != {tuple(b.shape)}")
            elif not torch.equal(a, b):
                found.append(f"{name}: by {(a - b).abs().max():.1e}")
        elif a != b:
            found.append(name if isinstance(a, bytes) else f"{name}: {_first(a, b)}"[:500])
    return found


def _first(a: Any, b: Any) -> str:
    """What differs first between two values, of two tables the first row."""
    if isinstance(a, list) and len(a) == len(b):
        a, b = next((x, y) for x, y in zip(a, b, strict=True) if x != y)
    elif isinstance(a, list):
        a, b = f"{len(a)} rows", f"{len(b)} rows"
    return f"{a} != {b}"


def leftovers(root: Path) -> set[str]:
    """Files that a kill left behind and that nothing will ever read or remove."""
    run = RunFolder.newest(root).path
    return {
        str(path.relative_to(run))
        for path in run.rglob("*")
        if path.name.endswith((".tmp", ".old"))
    }


def check(
    subject: Subject, options: argparse.Namespace, rest: Sequence[str], scratch: Path
) -> Report:
    """Kill and compare for one subject."""
    report = Report()
    draw = random.Random(f"{options.seed} {subject.name}")
    signals = options.signals.split(",")

    def fresh(root: Path) -> list[str]:
        return [
            *("fit", "--config=clip_lora.yaml", *subject.settings),
            *("--trainer.threads=1", "--trainer.progress=plain", *rest),
            f"--trainer.max_rounds={options.rounds}",
            f"--trainer.default_root_dir={root}",
        ]

    quiet = scratch / subject.folder / "undisturbed"
    life = live([*FEDLORA, *fresh(quiet)], quiet / "stderr.txt", None, "KILL")
    if life.code:
        report.faults.append(f"the undisturbed run ended with {life.code}: {life.stderr[-500:]}")
        return report
    expected = fingerprint(quiet)
    what = f"{life.seconds:.1f} s, {len(expected)} things compared"
    print(f"{subject.name}: undisturbed {what}", flush=True)
    attempt = 0
    while report.runs < options.kills:
        root = scratch / subject.folder / f"{attempt}"
        attempt += 1
        often = draw.choices((1, 2, 3), (6, 3, 1))[0]
        moments = [draw.uniform(0, life.seconds) for _ in range(often)]
        sig = signals[report.runs % len(signals)]
        kills = disturbed(fresh(root), root, moments, sig, report)
        report.kills += kills
        if not kills and stage(root) == "after the summary":
            continue  # it was faster than the kill: try another moment
        report.runs += 1
        ended = stage(root) == "after the summary"
        changed = differences(expected, fingerprint(root)) if ended else ["it did not end"]
        report.identical += not changed
        report.leftovers |= leftovers(root)
        times = ", ".join(f"{moment:.1f}" for moment in moments)
        print(f"  run {report.runs}: SIG{sig} x {kills} (drawn: {times} s)", flush=True)
        for line in changed:
            print(f"    differs: {line}")
    return report


def show(name: str, report: Report) -> None:
    """Print what was seen of a subject."""
    same = "" if report.identical == report.runs else f"{report.identical} of "
    print(f"{name}: {report.kills} kills, {same}{report.runs} runs identical")
    print(f"  killed {', '.join(f'{where}: {n}' for where, n in sorted(report.stages.items()))}")
    if report.leftovers:
        print(f"  left behind: {', '.join(sorted(report.leftovers))}")
    for fault in report.faults:
        print(f"  fault: {fault}")


def asked_for(options: argparse.Namespace) -> list[Subject]:
    """What is to be killed; without a choice the three rules.

    Raises:
        FedloraError: for an overlay that is not there.
    """
    rules = options.rules if options.rules or options.overlays else RULES
    return [
        *(Subject.of_rule(name) for name in rules.split(",") if name),
        *(Subject.of_overlays(name) for name in options.overlays.split(",") if name),
    ]


def main() -> int:
    """Check what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="What else is given goes to fedlora: --trainer.clients_per_round=5 …",
    )
    parser.add_argument("--kills", type=int, default=20, help="killed runs of each, at least")
    parser.add_argument("--rules", default="", help=f"default, without --overlays: {RULES}")
    parser.add_argument(
        "--overlays",
        default="",
        help="over clip_lora.yaml, e.g. personal/ditto.yaml,personal/fedsa.yaml; joined by +: "
        "objectives/scaffold.yaml+personal/local_head.yaml",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--signals", default="KILL", help="in turn, of: KILL,TERM,INT")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--scratch", type=Path, help="kept folder for the runs; must be new")
    options, rest = parser.parse_known_args()
    unknown = sorted(set(options.signals.split(",")) - set(CODES))
    if unknown:
        parser.error(f"--signals should be of {', '.join(CODES)} but got {', '.join(unknown)}")
    if options.scratch and options.scratch.exists():
        parser.error(f"--scratch {options.scratch} is there already: choose a new folder")
    try:
        subjects = asked_for(options)
    except FedloraError as error:
        parser.error(str(error))
    # A shell that starts us in the background lets children ignore Ctrl-C; a handler undoes that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    reports = []
    rest = [argument for argument in rest if argument != "--"]
    with tempfile.TemporaryDirectory() as temporary:
        scratch = options.scratch or Path(temporary)
        for subject in subjects:
            reports.append(check(subject, options, rest, scratch))
            show(subject.name, reports[-1])
    return int(any(r.faults or r.identical < r.runs or not r.runs for r in reports))


if __name__ == "__main__":
    raise SystemExit(main())
