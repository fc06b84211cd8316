"""One run of ``rules.py``, federated, pooled or untrained, and the folder that keeps what came out.

Everything is played in this process, on one thread, from the same command line that a user gives.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
from from_config import FromConfig
from lightning import Trainer, seed_everything
from server import Tally

from fedlora.callbacks.averaging import AdapterAveraging
from fedlora.errors import FedloraError
from fedlora.files import write_json
from fedlora.state import AdapterState, ClientUpdate, Round

Kind = Literal["federated", "central", "untrained"]
Figures = dict[str, Any]
ACCURACIES = ("val", "own_val", "test", "own_test", "own_worst")
NOTHING: Figures = {"rounds": [], "server_s": []}
# What a round's row of metrics.csv is called here.
ROUND = {
    "val": "val/acc",
    "own_val": "clients/acc_mean",
    "up": "comm/up_bytes",
    "down": "comm/down_bytes",
    "error": "agg/error",
}


@dataclass(frozen=True)
class Run:
    """A run, told apart by its arguments.

    Attributes:
        name: what its file is called, before a digest of the rest.
        kind: how it is played.
        args: what follows ``fedlora fit``.
    """

    name: str
    kind: Kind
    args: tuple[str, ...]

    @property
    def file(self) -> str:
        """The name of the file that keeps it."""
        said = "\n".join((self.kind, *self.args))
        return f"{self.name}-{hashlib.sha256(said.encode()).hexdigest()[:10]}.json"


class ServerClock:
    """Times what the server does to average, without the clients that play meanwhile."""

    def __init__(self, averaging: AdapterAveraging) -> None:
        self.seconds: list[float] = []
        self._average = averaging.average
        averaging.average = self.average  # the rule must not notice: its name is in checkpoints

    def average(
        self, server: AdapterState, updates: Iterable[ClientUpdate], rnd: Round
    ) -> AdapterState:
        """What the callback does, timed."""
        tally = Tally()
        began = time.perf_counter()
        averaged = self._average(server, tally.watch(updates), rnd)
        self.seconds.append(time.perf_counter() - began - tally.seconds)
        return averaged


def play(run: Run) -> Figures:
    """Play a run in this process; training that ends in NaN has an accuracy of 0."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    torch.set_num_threads(1)
    began = time.perf_counter()
    try:
        figures = federated(run) if run.kind == "federated" else pooled(run)
    except FedloraError as error:
        if "NaN" not in str(error):
            raise
        figures = {**dict.fromkeys(ACCURACIES, 0.0), **NOTHING, "failed": str(error)}
    return {**figures, "seconds": time.perf_counter() - began, "torch": torch.__version__}


def federated(run: Run) -> Figures:
    """The federated run: a row for each round, and the tests at its end."""
    with tempfile.TemporaryDirectory() as root:
        built = FromConfig(*run.args, f"--trainer.default_root_dir={root}")
        clock = ServerClock(built.trainer.averaging)
        built.fit()
        summary = json.loads(built.trainer.run.summary.read_text(encoding="utf-8"))
    history = built.trainer.server.history
    rounds = [{name: row.get(key) for name, key in ROUND.items()} for row in history]
    return {
        **{name: rounds[-1][name] for name in ("val", "own_val")},
        "test": summary["test/acc"],
        "own_test": summary["test/clients_acc_mean"],
        "own_worst": summary["test/clients_acc_min"],
        "rounds": rounds,
        "server_s": clock.seconds,
    }


def pooled(run: Run) -> Figures:
    """The pooled rows of all clients: as many epochs as a client makes in all rounds, or none."""
    built = FromConfig(*run.args)
    settings, model, data = built.trainer, built.model, built.datamodule
    seed_everything(settings.seed, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        precision=settings.averaging.precision,
        max_epochs=settings.max_rounds * settings.local_epochs,
        limit_train_batches=settings.limit_train_batches,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if run.kind == "central":
        trainer.fit(model, datamodule=data)
    (tested,) = trainer.test(model, datamodule=data, verbose=False)
    val = data.client_val_batches, data.client_test_batches
    own_val, own_test = ([accuracy(model, of(c)) for c in data.clients()] for of in val)
    return {
        "val": accuracy(model, data.val_dataloader()),
        "own_val": mean(value for value in own_val if value is not None),
        "test": tested["test/acc"],
        "own_test": mean(value for value in own_test if value is not None),
        "own_worst": min(value for value in own_test if value is not None),
        "own_test_rows": [data.num_client_test(client) for client in data.clients()],
    }


@torch.no_grad()
def accuracy(model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> float | None:
    """Of the model as it is; None without rows."""
    model.eval()
    right = [model(batch["image"]).argmax(1) == batch["label"] for batch in batches]
    return float(torch.cat(right).double().mean()) if right else None


class Runs:
    """Plays runs and keeps each in a file as it ends; what is there is not played again.

    Args:
        folder: where they are kept.
        workers: processes that play them; 1 plays them here.
    """

    def __init__(self, folder: Path, workers: int) -> None:
        self.folder = folder
        self.workers = workers
        self.done: dict[Run, Figures] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def all(self, runs: Sequence[Run], what: str) -> None:
        """Play those that are not kept yet."""
        wanted = [run for run in dict.fromkeys(runs) if not self._kept(run)]
        if not wanted:
            return
        print(f"{what}: {len(set(runs))} runs, {len(wanted)} of them to play", flush=True)
        spent = 0.0
        for number, (run, figures) in enumerate(self._played(wanted), 1):
            kept = {"kind": run.kind, "args": list(run.args), **figures}
            write_json(self.folder / run.file, kept)
            self.done[run] = kept
            spent += figures["seconds"]
            left = (len(wanted) - number) * spent / number / self.workers
            print(
                f"  {number}/{len(wanted)} {run.name}: val {figures['val']:.3f}, "
                f"{figures['seconds']:.1f} s; {left / 60:.1f} min left of {what}",
                flush=True,
            )

    def _kept(self, run: Run) -> bool:
        path = self.folder / run.file
        if run not in self.done and path.exists():
            self.done[run] = json.loads(path.read_text(encoding="utf-8"))
        return run in self.done

    def _played(self, runs: Sequence[Run]) -> Iterator[tuple[Run, Figures]]:
        if self.workers == 1:
            yield from ((run, play(run)) for run in runs)
            return
        with ProcessPoolExecutor(self.workers, get_context("spawn")) as pool:
            futures = {pool.submit(play, run): run for run in runs}
            try:
                yield from ((futures[future], future.result()) for future in as_completed(futures))
            finally:
                pool.shutdown(cancel_futures=True)

    def __getitem__(self, run: Run) -> Figures:
        return self.done[run]
