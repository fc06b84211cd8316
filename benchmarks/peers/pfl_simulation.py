"""The rounds in pfl-research: FederatedAveraging on a SimulatedBackend, one process or several.

Several are started by torchrun; each takes its share of the clients, balanced by their rows.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from model import AdaptedTower
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor
from work import Work, norm, write_result


class Tower(AdaptedTower):
    """The tower with what pfl asks of a model, and a tally of the client's losses."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.tally: list[tuple[Tensor, int]] = []

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        loss = super().loss(images, labels)
        self.tally.append((loss.detach(), len(labels)))
        return loss

    def metrics(self, *_: Tensor) -> dict[str, Any]:
        """Nothing is evaluated."""
        return {}


class User(Dataset):
    """A client, whose batches are others in each round."""

    def __init__(self, work: Work, client: int) -> None:
        self.work, self.client, self.round_idx = work, client, 0
        super().__init__((), user_id=str(client))

    def __len__(self) -> int:
        return int(self.work.task.weights[self.client])

    def iter(self, batch_size: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.work.batches(self.round_idx, self.client)


class Averaging(FederatedAveraging):
    """Notes each client's loss, tells it the round, and leaves out all evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[tuple[int, int, float]] = []

    def get_next_central_contexts(self, *args: Any, **kwargs: Any) -> Any:
        contexts, model, metrics = super().get_next_central_contexts(*args, **kwargs)
        if contexts is not None:
            contexts = tuple(replace(each, do_evaluation=False) for each in contexts)
        return contexts, model, metrics

    def train_one_user(self, initial: Any, model: Any, user: User, context: Any) -> Any:
        user.round_idx = context.current_central_iteration
        tally = model.pytorch_model.tally
        tally.clear()
        found = super().train_one_user(initial, model, user, context)
        mean = sum(float(loss) * rows for loss, rows in tally) / sum(rows for _, rows in tally)
        self.losses.append((user.round_idx, user.client, mean))
        return found


class Stopwatch(TrainingProcessCallback):
    """Time and norm of each round."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.norms: list[float] = []

    def on_train_begin(self, *, model: Any) -> Metrics:
        self.began = time.perf_counter()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        self.seconds.append(time.perf_counter() - self.began)
        self.norms.append(norm([p.detach() for p in model.variable_map.values()]))
        self.began = time.perf_counter()
        return False, Metrics()


def gathered(losses: list[tuple[int, int, float]]) -> list[tuple[int, int, float]]:
    """Those of all processes."""
    if not torch.distributed.is_initialized():
        return losses
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, losses)
    return [each for part in parts for each in part]


def play(work: Work, rounds: int) -> tuple[Stopwatch, list[tuple[int, int, float]]]:
    """All rounds; what each client's loss was."""
    clients = range(len(work.task.weights))
    tower = Tower(work)
    model = PyTorchModel(
        tower,
        lambda _, lr: tower.optimizer(lr),
        torch.optim.SGD(tower.trained().values(), lr=1.0),
    )
    data = FederatedDataset(
        lambda client: User(work, client),
        get_user_sampler("minimize_reuse", list(clients)),
        user_id_to_weight={client: len(User(work, client)) for client in clients},
    )
    algorithm, stopwatch = Averaging(), Stopwatch()
    algorithm.run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds,
            train_cohort_size=len(clients),
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(data, None, postprocessors=[WeightByDatapoints()]),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=work.task.lr, local_batch_size=None
        ),
        callbacks=[stopwatch],
        send_metrics_to_platform=False,
    )
    return stopwatch, gathered(algorithm.losses)


def main() -> None:
    """Play the rounds of a work folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    stopwatch, found = play(Work.read(options.work), options.rounds)
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    losses = [
        [loss for _, _, loss in sorted(each for each in found if each[0] == idx)]
        for idx in range(options.rounds)
    ]
    write_result(
        options.out,
        seconds=stopwatch.seconds,
        losses=losses,
        norms=stopwatch.norms,
        version=version("pfl"),
    )


if __name__ == "__main__":
    main()
