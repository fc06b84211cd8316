"""Evaluation: every sample counts once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fedlora.modules.metrics import MetricName, Scores, compute_metrics, update_metrics

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from fedlora.aggregation import Aggregator
    from fedlora.data.datamodule import FederatedDataModule
    from fedlora.engines.sequential import SequentialEngine
    from fedlora.modules.classifier import CLIPLoRAClassifier
    from fedlora.state import Client, Round, ServerState


def batches_on(fabric: Fabric, batches: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Each batch on Fabric's device."""
    for batch in batches:
        yield {name: value.to(fabric.device) for name, value in batch.items()}


@torch.no_grad()
def evaluate(
    fabric: Fabric,
    module: CLIPLoRAClassifier,
    batches: Iterable[dict[str, Tensor]],
    step: Callable[[dict[str, Tensor], int], dict[str, Tensor]],
    names: Sequence[MetricName] = (),
) -> Scores:
    """Metrics of the model as it is loaded; empty where there are no rows.

    Args:
        fabric: device and precision.
        module: the classifier.
        batches: the rows.
        step: ``module.validation_step`` or ``module.test_step``.
        names: what to measure besides ``acc`` and ``loss``.
    """
    module.eval()
    metrics = module.make_metrics(names).to(fabric.device)
    rows = 0
    for index, batch in enumerate(batches_on(fabric, batches)):
        with fabric.autocast():
            out = step(batch, index)
        update_metrics(metrics, out)
        rows += len(batch["label"])
    return compute_metrics(metrics, names) if rows else Scores({})


def evaluate_split(
    fabric: Fabric,
    module: CLIPLoRAClassifier,
    data: FederatedDataModule,
    split: Literal["val", "test"],
    per_class: bool = False,
) -> Scores:
    """All that the model's ``metrics`` name, of a split of the server, as ``val/acc`` and so on.

    Args:
        fabric: device and precision.
        module: the classifier.
        data: has the split.
        split: which.
        per_class: each class's figures too, where ``metrics`` names them.
    """
    testing = split == "test"
    batches = data.test_dataloader() if testing else data.val_dataloader()
    step = module.test_step if testing else module.validation_step
    names = [name for name in module.metrics if per_class or name != "per_class"]
    scores = evaluate(fabric, module, batches, step, names)
    values = {f"{split}/{name}": value for name, value in scores.values.items()}
    return Scores(values, scores.classes)


def evaluate_clients(
    engine: SequentialEngine,
    clients: Sequence[Client],
    rnd: Round,
    server: ServerState,
    rule: Aggregator,
) -> dict[str, float | None]:
    """Accuracy on each client's own validation rows, of the model that it would use.

    Where something stays with the clients that is their own model, elsewhere the global one.

    Returns:
        ``clients/acc_mean``, ``clients/acc_min`` and ``clients/acc_std`` (over clients, each
        counting once); None where no client has validation rows.
    """
    personal = rule.private(rnd)
    fabric, module = engine.loop.fabric, engine.loop.module
    values = []
    for client in clients:
        if personal:
            engine.load(client, rnd, server, rule)
        batches = engine.data.client_val_batches(client)
        found = evaluate(fabric, module, batches, module.validation_step).values
        values.extend([found["acc"]] if found else [])
    if personal:
        engine.lora.load(server.adapter)
    if not values:
        return {"clients/acc_mean": None, "clients/acc_min": None, "clients/acc_std": None}
    accuracies = torch.tensor(values, dtype=torch.float64)
    return {
        "clients/acc_mean": float(accuracies.mean()),
        "clients/acc_min": float(accuracies.min()),
        "clients/acc_std": float(accuracies.std(correction=0)),
    }
