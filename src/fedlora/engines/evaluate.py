"""Evaluation: every sample counts once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class ClientScore:
    """How a client does on its own rows.

    Attributes:
        count: rows.
        acc: accuracy.
        loss: mean loss.
    """

    count: int
    acc: float
    loss: float


def evaluate_clients(
    engine: SequentialEngine,
    clients: Sequence[Client],
    rnd: Round,
    server: ServerState,
    rule: Aggregator,
    split: Literal["val", "test"] = "val",
) -> dict[int, ClientScore]:
    """Figures of each client's own validation or test rows, of the model that it uses.

    Where something stays with the clients that is their own model, elsewhere the common one.

    Returns:
        Client id -> its figures, for clients that have such rows.
    """
    personal = engine.personal(rule, rnd)
    fabric, module, data = engine.loop.fabric, engine.loop.module, engine.data
    testing = split == "test"
    found = {}
    for client in clients:
        count = data.num_client_test(client) if testing else data.num_client_val(client)
        if not count:
            continue
        if personal:
            engine.load_own(client, rnd, server, rule)
        batches = data.client_test_batches(client) if testing else data.client_val_batches(client)
        values = evaluate(fabric, module, batches, module.validation_step).values
        acc, loss = (float(values[name] or 0.0) for name in ("acc", "loss"))
        found[client.id] = ClientScore(count, acc, loss)
    if personal:
        engine.lora.load(server.adapter)
    return found


def spread(scores: Mapping[int, ClientScore], prefix: str) -> dict[str, float | None]:
    """``acc_mean``, ``acc_min`` and ``acc_std`` over clients, each counting once.

    All are None where no client has rows.
    """
    names = ("acc_mean", "acc_min", "acc_std")
    if not scores:
        return dict.fromkeys(f"{prefix}{name}" for name in names)
    accuracies = torch.tensor([score.acc for score in scores.values()], dtype=torch.float64)
    values = accuracies.mean(), accuracies.min(), accuracies.std(correction=0)
    return {f"{prefix}{name}": float(value) for name, value in zip(names, values, strict=True)}
