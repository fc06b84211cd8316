"""metrics.csv, clients.csv and the loggers, all derived from the checkpoint and mended by it."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.callbacks.base import FederatedCallback, Row
from fedlora.files import clear_os_errors, write_csv

if TYPE_CHECKING:
    from fedlora.modules.classifier import CLIPLoRAClassifier
    from fedlora.sampling import Absence
    from fedlora.state import Client, ClientUpdate
    from fedlora.trainer import FederatedTrainer

METRICS = (
    "round",
    "train/loss",
    "clients/answered",
    "val/acc",
    "val/loss",
    "clients/acc_mean",
    "clients/acc_min",
    "clients/acc_std",
    "comm/up_bytes",
    "comm/down_bytes",
    "agg/error",
    "agg/effective_rank",
    "clients/drift_mean",
    "clients/drift_max",
    "time/round_s",
)
CLIENTS = (
    "round",
    "id",
    "name",
    "samples",
    "rank",
    "status",
    "steps",
    "loss",
    "acc",
    "up_bytes",
    "down_bytes",
    "seconds",
)


class Records(FederatedCallback):
    """Writes a run's tables.

    ``clients.csv`` grows as clients end, ``metrics.csv`` is written anew from the history after
    each round, with a column at its end for each further figure that a row has. On resume rows of
    rounds that will be played again are dropped, one row in memory at a time. ``skipped.csv`` lists
    pictures that could not be read, where they are left out. Only the first process writes.
    """

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the tables, or mend those of the run that is resumed."""
        if not trainer.is_global_zero:
            return
        path = trainer.rounds.run.clients_csv
        _write(path, CLIENTS, _played(read_rows(path), trainer.server.round_idx))
        _write_metrics(trainer)
        skipped = trainer.datamodule.holdings.skipped
        if skipped:
            write_csv(trainer.rounds.run.skipped, ("picture", "reason"), skipped.items())

    def on_client_end(
        self, trainer: FederatedTrainer, pl_module: CLIPLoRAClassifier, update: ClientUpdate
    ) -> None:
        """Append the client's row."""
        _append(
            trainer,
            update.client,
            status="answered",
            steps=update.num_steps,
            up_bytes=update.nbytes,
            down_bytes=update.down_nbytes,
            **{name: update.metrics[name] for name in ("loss", "acc", "seconds")},
        )

    def on_client_absent(
        self,
        trainer: FederatedTrainer,
        pl_module: CLIPLoRAClassifier,
        absence: Absence,
        down_nbytes: int,
    ) -> None:
        """Append a row that says why there is nothing from the client."""
        _append(trainer, absence.client, status=absence.reason, down_bytes=down_nbytes)

    def on_round_end(
        self, trainer: FederatedTrainer, pl_module: CLIPLoRAClassifier, row: Row
    ) -> None:
        """Write the history and tell the loggers."""
        if not trainer.is_global_zero:
            return
        _write_metrics(trainer)
        values = {
            name: value for name, value in row.items() if value is not None and name != "round"
        }
        for logger in trainer.loggers:
            logger.log_metrics(values, step=int(row["round"] or 0))
            logger.save()


def _append(trainer: FederatedTrainer, client: Client, **values: float | str) -> None:
    row = {
        "round": trainer.server.round_idx + 1,
        "id": client.id,
        "name": client.name,
        "samples": client.num_samples,
        "rank": client.rank,
        **values,
    }
    path = trainer.rounds.run.clients_csv
    with clear_os_errors(path), path.open("a", encoding="utf-8", newline="") as file:
        csv.DictWriter(file, CLIENTS, lineterminator="\n").writerow(row)


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    """The whole rows of a CSV file, one after the other; a last line torn by a kill is left out."""
    if not path.exists():
        return
    whole = _ends_with_a_line(path)
    # A kill may tear a character, too: that must not stop a run from going on.
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        before: dict[str, str] | None = None
        for row in csv.DictReader(file):
            if before is not None:
                yield before
            before = None if None in row.values() or None in row else row
        if before is not None and whole:
            yield before


def _ends_with_a_line(path: Path) -> bool:
    """Whether the last line is whole: a torn one can have all of its columns."""
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return False
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _played(rows: Iterable[dict[str, str]], done: int) -> Iterator[dict[str, str]]:
    """The rows of rounds that will not be played again."""
    return (row for row in rows if row["round"].isdigit() and int(row["round"]) <= done)


def _write_metrics(trainer: Any) -> None:
    history = trainer.server.history
    _write(trainer.rounds.run.metrics, _metric_columns(history), history)


def _metric_columns(history: Sequence[Row]) -> tuple[str, ...]:
    """The columns of ``metrics.csv``: the usual ones, then those that these rows add.

    The test set is left out: it is looked at before the first round and after the last one only.
    """
    names = dict.fromkeys(name for row in history for name in row if not name.startswith("test/"))
    return (*METRICS, *(name for name in names if name not in METRICS))


def _write(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    write_csv(path, columns, ([row.get(name) for name in columns] for row in rows))
