"""The client app of Flower's simulation; a module of its own, so that actors can keep a model."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from model import AdaptedTower
from work import Work

app = ClientApp()


@cache
def kept_work(folder: str) -> Work:
    """The work, read once in each actor."""
    return Work.read(Path(folder))


@cache
def kept_model(folder: str) -> AdaptedTower:
    """The model, built once in each actor."""
    return AdaptedTower(kept_work(folder))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on the batches of one client in one round."""
    config = message.content["config"]
    torch.set_num_threads(config["threads"])
    work = kept_work(config["work"])
    # As Flower's templates have it where nothing is kept: a new model in each call.
    model = kept_model(config["work"]) if config["keep"] else AdaptedTower(work)
    model.set(message.content["arrays"].to_torch_state_dict())
    client = int(context.node_config["partition-id"])
    loss = model.train_client(work.batches(config["server-round"] - 1, client))
    metrics = {"num-examples": work.task.weights[client], "client": client, "loss": loss}
    trained = {name: parameter.detach() for name, parameter in model.trained().items()}
    content = RecordDict({"arrays": ArrayRecord(trained), "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=message)
