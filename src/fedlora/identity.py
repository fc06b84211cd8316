"""What a resumed run must share with the one that it goes on with, besides its config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedlora.aggregation import Aggregator
from fedlora.state import Client

if TYPE_CHECKING:
    from fedlora.engines.sequential import SequentialEngine
    from fedlora.trainer import FederatedTrainer


def of(
    trainer: FederatedTrainer, engine: SequentialEngine, clients: Sequence[Client]
) -> dict[str, Any]:
    """Names and plain values, as the checkpoint keeps them."""
    return {
        "seed": trainer.seed,
        "rule": class_path(trainer.averaging.aggregator),
        "objectives": [class_path(each) for each in trainer.objectives],
        "rounds of trainer.round_lr": trainer.round_lr.horizon(trainer.max_rounds),
        "base_model_sha256": engine.lora.federated.base_sha256,
        "class_names": list(engine.data.class_names),
        "pictures_sha256": engine.data.holdings.fingerprint(),
        "client_samples": [client.num_samples for client in clients],
        "client_ranks": [client.rank for client in clients],
        "client_scales": [client.scale for client in clients],
        "scaling": dict(engine.lora.scaling),
        "shapes": {name: list(tensor.shape) for name, tensor in engine.lora.state().tensors()},
    }


def class_path(value: object) -> str:
    """Its class, and that of the rule which it wraps."""
    path, wrapped = f"{type(value).__module__}.{type(value).__qualname__}", None
    if isinstance(value, Aggregator):
        wrapped = getattr(value, "rule", None)
    return path if wrapped is None else f"{path}({class_path(wrapped)})"
