"""What a run leaves behind: the exported adapter, personal adapters, the summary, predictions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedlora.checkpoint import versions
from fedlora.engines.evaluate import in_turns, spread
from fedlora.export import export_adapter
from fedlora.files import write_csv, write_json

if TYPE_CHECKING:
    from fedlora.rounds import Rounds
    from fedlora.state import AdapterState
    from fedlora.trainer import FederatedTrainer


def export(rounds: Rounds, folder: Path, adapter: AdapterState, client: int | None = None) -> None:
    """Write ``adapter/``, or one client's folder under ``adapters/``."""
    about = {
        "round": rounds.trainer.server.round_idx,
        "rule": rounds.identity["rule"],
        "seed": rounds.trainer.seed,
        **({} if client is None else {"client": client}),
        "versions": versions(),
    }
    rank = rounds.trainer.averaging.export_rank
    export_adapter(folder, rounds.engine.lora, adapter, about, rank)


def export_personal(rounds: Rounds) -> int:
    """Write ``adapters/<client>/`` of each client that has a model of its own; returns how many.

    Those that never played have none: they are served ``adapter/``.
    """
    trainer, engine = rounds.trainer, rounds.engine
    server = trainer.server
    if not (rounds.personal and trainer.averaging.export_personal):
        return 0
    rnd = rounds.round(server.round_idx)
    for client in rounds.clients:
        if client.id in server.versions:
            engine.load_own(client, rnd, server, rounds.rule)
            folder = rounds.run.path / "adapters" / str(client.id)
            export(rounds, folder, engine.lora.state().cut(client.rank), client.id)
    engine.lora.load(server.adapter)
    return len(server.versions)


def write_summary(rounds: Rounds, test: Mapping[str, float | None]) -> dict[str, Any]:
    """Write ``summary.json`` of a run that is over, and return it."""
    trainer = rounds.trainer
    history = trainer.server.history
    first, last = history[0], history[-1]
    best = next((row for row in history if row["round"] == trainer.keeper.best_round), None)

    def total(name: str) -> float:
        return sum(row.get(name) or 0 for row in history)

    summary = {
        "round": trainer.server.round_idx,
        "finished": trainer.server.finished or "max_rounds",
        **test,
        # A run that goes on from an adapter has no untrained model.
        "start" if trainer.lightning_module.adapter else "zero_shot": {
            name: value for name, value in first.items() if name.startswith(("val/", "test/"))
        },
        "final": dict(last),
        "best": None if best is None else dict(best),
        "monitor": trainer.keeper.monitor or rounds.monitor,
        "comm/up_bytes": total("comm/up_bytes"),
        "comm/down_bytes": total("comm/down_bytes"),
        "seconds": total("time/round_s"),
        "rule": rounds.identity["rule"],
        "clients": len(rounds.clients),
        "seed": trainer.seed,
        "threads": torch.get_num_threads(),
        "device": str(trainer.fabric.device),
        "processes": trainer.world.size,
        "strategy": trainer.spread,
        "precision": trainer.averaging.precision,
        "base_dtype": trainer.averaging.base_dtype,
        "versions": versions(),
    }
    write_json(rounds.run.summary, summary)
    return summary


def summary_round(path: Path) -> int | None:
    """The round that a summary was written after; None where there is none."""
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["round"])
    except (OSError, ValueError, KeyError):
        return None


def write_client_scores(rounds: Rounds) -> dict[str, float | None]:
    """Write how each client does on its own test rows, where there are any.

    Returns:
        ``test/clients_acc_mean``, ``_min`` and ``_std`` over clients.
    """
    trainer = rounds.trainer
    scores = rounds.evaluate_clients(rounds.clients, trainer.server, "test")
    if not scores:  # as on any rank but 0
        return {}
    columns = ("id", "name", "samples", "played", "test_rows", "acc", "loss")
    write_csv(
        rounds.run.client_test,
        columns,
        (
            (c.id, c.name, c.num_samples, c.id in trainer.server.received, s.count, s.acc, s.loss)
            for c in rounds.clients
            if (s := scores.get(c.id)) is not None
        ),
    )
    return spread(scores, "test/clients_")


@torch.no_grad()
def write_predictions(trainer: FederatedTrainer, path: Path) -> int:
    """Write a row for every picture to predict, on rank 0; returns how many.

    ``index``: its row in the source; ``picture``: what the source calls it; ``label``: the class
    predicted; ``probability``: that of this class; ``truth``: the class that it has.
    """
    module, data = trainer.lightning_module, trainer.datamodule
    names = data.class_names
    module.eval()

    def step(batch: dict[str, Tensor], number: int) -> dict[str, Tensor]:
        return {**module.predict_step(batch, number), "label": batch["label"]}

    def rows() -> Iterator[tuple[int, str, str, float, str]]:
        for out in in_turns(trainer.fabric, data.predict_dataloader(), step, trainer.world):
            index, best = out["index"].cpu(), out["probs"].max(1)
            keys, truths = data.keys(index), out["label"]
            columns = index, keys, best.indices, best.values, truths
            for row, key, label, value, truth in zip(*columns, strict=True):
                probability = round(float(value), 6)
                yield int(row), key, names[int(label)], probability, names[int(truth)]

    if not trainer.world.is_zero:
        return len(list(rows()))
    return write_csv(path, ("index", "picture", "label", "probability", "truth"), rows())
