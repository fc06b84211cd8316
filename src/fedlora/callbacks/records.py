"""metrics.csv, clients.csv and the loggers, all derived from the checkpoint and mended by it."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.callbacks.base import FederatedCallback, Row
from fedlora.files import clear_os_errors, write_text

if TYPE_CHECKING:
    from fedlora.modules.classifier import CLIPLoRAClassifier
    from fedlora.state import ClientUpdate
    from fedlora.trainer import FederatedTrainer

METRICS = (
    "round",
    "train/loss",
    "val/acc",
    "val/loss",
    "clients/acc_mean",
    "clients/acc_min",
    "clients/acc_std",
    "comm/up_bytes",
    "comm/down_bytes",
    "agg/error",
    "time/round_s",
)
CLIENTS = (
    "round",
    "id",
    "name",
    "samples",
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
    each round. On resume rows of rounds that will be played again are dropped.
    """

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the tables, or mend those of the run that is resumed."""
        path, done = trainer.rounds.run.clients_csv, trainer.server.round_idx
        kept = [
            row for row in read_rows(path) if row["round"].isdigit() and int(row["round"]) <= done
        ]
        write_text(path, _table(CLIENTS, kept))
        write_text(trainer.rounds.run.metrics, _table(METRICS, trainer.server.history))

    def on_client_end(
        self, trainer: FederatedTrainer, pl_module: CLIPLoRAClassifier, update: ClientUpdate
    ) -> None:
        """Append the client's row."""
        client = update.client
        row = {
            "round": trainer.server.round_idx + 1,
            "id": client.id,
            "name": client.name,
            "samples": client.num_samples,
            "steps": update.num_steps,
            "up_bytes": update.nbytes,
            "down_bytes": update.down_nbytes,
            **{name: update.metrics[name] for name in ("loss", "acc", "seconds")},
        }
        with (
            clear_os_errors(trainer.rounds.run.clients_csv),
            trainer.rounds.run.clients_csv.open("a", encoding="utf-8", newline="") as file,
        ):
            csv.DictWriter(file, CLIENTS, lineterminator="\n").writerow(row)

    def on_round_end(
        self, trainer: FederatedTrainer, pl_module: CLIPLoRAClassifier, row: Row
    ) -> None:
        """Write the history and tell the loggers."""
        write_text(trainer.rounds.run.metrics, _table(METRICS, trainer.server.history))
        values = {
            name: value for name, value in row.items() if value is not None and name != "round"
        }
        for logger in trainer.loggers:
            logger.log_metrics(values, step=int(row["round"] or 0))
            logger.save()


def read_rows(path: Path) -> list[dict[str, str]]:
    """The whole rows of a CSV file; a last line torn by a kill is left out."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values() and None not in row]


def _table(columns: tuple[str, ...], rows: Any) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(_cells(row) for row in rows)
    return text.getvalue()


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: "" if value is None else value for name, value in row.items()}
