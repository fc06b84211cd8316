"""Evaluation: every sample counts once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fedlora.distributed.world import World
from fedlora.engines.parallel import assign
from fedlora.modules.metrics import MetricName, Scores, compute_metrics, update_metrics

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from fedlora.aggregation import Aggregator
    from fedlora.data.datamodule import FederatedDataModule
    from fedlora.engines.sequential import SequentialEngine
    from fedlora.modules.classifier import CLIPLoRAClassifier
    from fedlora.state import Client, Round, ServerState

Batch = dict[str, Tensor]
Step = Callable[[Batch, int], dict[str, Tensor]]


def in_turns(
    fabric: Fabric, batches: Iterable[Batch], step: Step, world: World
) -> Iterator[dict[str, Tensor]]:
    """What a step says of each batch, in their order, on rank 0; elsewhere nothing.

    Processes take turns with whole batches. So each batch is of the same rows, and what is said of
    it of the same bits, however many processes there are.

    Args:
        fabric: device and precision.
        batches: the rows; a ``DataLoader`` loads only what is a process's own.
        step: of the module.
        world: the processes of the run.
    """

    def take(number: int, batch: Batch) -> dict[str, Tensor]:
        # The index is read here, for which the device would have to be waited for.
        batch = {n: v if n == "index" else v.to(fabric.device) for n, v in batch.items()}
        with fabric.autocast():
            return step(batch, number)

    if world.size == 1:
        yield from (take(number, batch) for number, batch in enumerate(batches))
        return
    count, own = _own_batches(batches, world)
    owners = [number % world.size for number in range(count)]
    for out in world.in_order(owners, lambda number: take(number, next(own))):
        yield {name: value.to(fabric.device) for name, value in out.items()}


def rows_in_turns(rows: int, size: int, world: World) -> list[int]:
    """Of rows in batches of a size, how many each process takes in :func:`in_turns`."""
    starts = [range(rank * size, rows, world.size * size) for rank in range(world.size)]
    return [sum(min(size, rows - start) for start in own) for own in starts]


def _own_batches(batches: Iterable[Batch], world: World) -> tuple[int, Iterator[Batch]]:
    """The number of batches, and those whose turn is this process's."""
    if not isinstance(batches, DataLoader) or batches.batch_sampler is None:
        found = list(batches)
        return len(found), iter(found[world.rank :: world.size])
    picks = list(batches.batch_sampler)
    own = DataLoader(
        batches.dataset,
        batch_sampler=picks[world.rank :: world.size],
        collate_fn=batches.collate_fn,
        num_workers=batches.num_workers,
    )
    return len(picks), iter(own)


@torch.no_grad()
def evaluate(
    fabric: Fabric,
    module: CLIPLoRAClassifier,
    batches: Iterable[Batch],
    step: Step,
    names: Sequence[MetricName] = (),
    world: World | None = None,
) -> Scores:
    """Metrics of the model as it is loaded; empty where there are no rows.

    Args:
        fabric: device and precision.
        module: the classifier.
        batches: the rows.
        step: ``module.validation_step`` or ``module.test_step``.
        names: what to measure besides ``acc`` and ``loss``.
        world: the processes that share the work; rank 0 has the result, the others an empty one.
    """
    module.eval()
    metrics = module.make_metrics(names).to(fabric.device)
    rows = 0
    holding = nullcontext() if module.model is None else module.model.holding_text()
    with holding:
        for out in in_turns(fabric, batches, step, world or World()):
            update_metrics(metrics, out)
            rows += len(out["label"])
    return compute_metrics(metrics, names) if rows else Scores({})


def evaluate_split(
    fabric: Fabric,
    module: CLIPLoRAClassifier,
    data: FederatedDataModule,
    split: Literal["val", "test"],
    per_class: bool = False,
    world: World | None = None,
) -> Scores:
    """All that the model's ``metrics`` name, of a split of the server, as ``val/acc`` and so on.

    Args:
        fabric: device and precision.
        module: the classifier.
        data: has the split.
        split: which.
        per_class: each class's figures too, where ``metrics`` names them.
        world: the processes that share the work; rank 0 has the result, the others an empty one.
    """
    testing = split == "test"
    batches = data.test_dataloader() if testing else data.val_dataloader()
    step = module.test_step if testing else module.validation_step
    names = [name for name in module.metrics if per_class or name != "per_class"]
    scores = evaluate(fabric, module, batches, step, names, world)
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
    busy: Sequence[int] = (),
) -> dict[int, ClientScore]:
    """Figures of each client's own validation or test rows, of the model that it uses.

    Where something stays with the clients that is their own model, elsewhere the common one.

    Args:
        engine: has the model and the data.
        clients: whose.
        rnd: the round.
        server: the server's state.
        rule: what averages the clients.
        split: which of their rows.
        busy: rows that each process is still at; empty: none.

    Returns:
        Client id -> its figures, for clients that have such rows; on rank 0, elsewhere nothing.
    """
    personal = engine.personal(rule, rnd)
    fabric, module, data = engine.loop.fabric, engine.loop.module, engine.data
    rows, batches = data.num_client_val, data.client_val_batches
    if split == "test":
        rows, batches = data.num_client_test, data.client_test_batches
    having = [client for client in clients if rows(client)]

    def score(number: int) -> list[float]:
        client = having[number]
        if personal:
            engine.load_own(client, rnd, server, rule)
        values = evaluate(fabric, module, batches(client), module.validation_step).values
        return [float(values[name] or 0.0) for name in ("acc", "loss")]

    # A client whole on one process: its figures do not depend on how many there are.
    owners = assign([rows(client) for client in having], engine.world.size, busy)
    scores = zip(having, engine.world.in_order(owners, score), strict=False)
    found = {client.id: ClientScore(rows(client), *figures) for client, figures in scores}
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
