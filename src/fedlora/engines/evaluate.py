"""Evaluation: every sample counts once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedlora.modules.metrics import update_metrics

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from fedlora.aggregation import Aggregator
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
) -> dict[str, float]:
    """Metrics of the model as it is loaded; empty where there are no rows.

    Args:
        fabric: device and precision.
        module: the classifier.
        batches: the rows.
        step: ``module.validation_step`` or ``module.test_step``.
    """
    module.eval()
    metrics = module.make_metrics().to(fabric.device)
    rows = 0
    for index, batch in enumerate(batches_on(fabric, batches)):
        with fabric.autocast():
            out = step(batch, index)
        update_metrics(metrics, out)
        rows += len(batch["label"])
    return {name: float(value) for name, value in metrics.compute().items()} if rows else {}


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
    personal = rule.trainable(rnd) != rule.shared(rnd)
    fabric, module = engine.loop.fabric, engine.loop.module
    values = []
    for client in clients:
        if personal:
            engine.load(client, rnd, server, rule)
        batches = engine.data.client_val_batches(client)
        metrics = evaluate(fabric, module, batches, module.validation_step)
        values.extend([metrics["acc"]] if metrics else [])
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
