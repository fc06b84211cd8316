"""The one local loop, the only place with a backward pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedlora.engines.rows import Rows, add_figures, add_gradients
from fedlora.errors import FedloraError
from fedlora.sampling import derive_seed
from fedlora.state import Client, Round

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from fedlora.callbacks.objective import Objective
    from fedlora.distributed.world import World
    from fedlora.modules.classifier import CLIPLoRAClassifier
    from fedlora.modules.clip_wrapper import CLIPLoRAWrapper

Batch = dict[str, Tensor]


class NonFiniteError(FedloraError):
    """A client's loss or adapter became NaN or infinite."""


@dataclass
class Lane:
    """One client while it trains.

    Attributes:
        client: who.
        parameters: the leaves that it trains, by name.
        optimizer: fresh for this round.
        step: optimizer steps taken.
        loss: sum of the samples' losses, float64, on the device.
        correct: samples classified right, on the device.
        seen: samples seen.
        objectives: what changes its gradients, or looks at how it went.
        anchor: of the parameters that the server averages, its values at the start, on the device.
        received: what came for the objectives beside the adapter.
        extra: of the objectives, to travel to the server beside the adapter.
        memory: what the client remembers for the objectives; they replace values, edit none.
        scratch: the objectives' own, for as long as the lane lasts.
        own: whether it trains the client's own model beside the common one.
    """

    client: Client
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    objectives: Sequence[Objective] = ()
    anchor: Mapping[str, Tensor] = field(default_factory=dict)
    received: Mapping[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)
    scratch: dict[str, Tensor] = field(default_factory=dict)
    own: bool = False
    step: int = 0
    loss: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    correct: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    seen: int = 0

    def metrics(self) -> dict[str, float]:
        """Mean training loss and accuracy over the samples seen."""
        count = max(self.seen, 1)
        return {"loss": float(self.loss) / count, "acc": float(self.correct) / count}


@dataclass(frozen=True)
class LocalLoop:
    """Trains lanes.

    Attributes:
        fabric: autocast, backward and optimizer steps under its precision.
        module: the classifier; its step returns ``losses`` (n,) and ``correct`` (n,).
        epochs: passes over the client's rows; ignored where ``steps`` is given.
        steps: optimizer steps; rows are passed over as often as that takes.
        clip: largest norm of a lane's gradient; None does not clip.
        accumulate: batches per optimizer step.
        limit_batches: most batches per epoch; None means all.
        lr_factor: round idx -> what the learning rates of its optimizers are multiplied with.
        on_batch: called after each batch with its lane, what the step returned, and the batch.
        rows_over: the processes that the rows of each batch are spread over, where they are: all
            train the same client, and come to the same parameters.
    """

    fabric: Fabric
    module: CLIPLoRAClassifier
    epochs: int = 1
    steps: int | None = None
    clip: float | None = None
    accumulate: int = 1
    limit_batches: int | None = None
    lr_factor: Callable[[int], float] = lambda _: 1.0
    on_batch: Callable[[Lane, dict[str, Tensor], Batch], None] | None = None
    rows_over: World | None = None

    def num_batches(self, per_epoch: int) -> int:
        """Batches that a client with ``per_epoch`` batches runs."""
        if self.limit_batches is not None:
            per_epoch = min(per_epoch, self.limit_batches)
        return per_epoch * self.epochs if self.steps is None else self.steps * self.accumulate

    def num_steps(self, per_epoch: int) -> int:
        """Optimizer steps that a client with ``per_epoch`` batches takes."""
        return -(-self.num_batches(per_epoch) // self.accumulate)

    @property
    def lora(self) -> CLIPLoRAWrapper:
        """The adapter in the model."""
        if self.module.lora is None:
            raise FedloraError("the model is not built yet.")
        return self.module.lora

    def open(self, client: Client, rnd: Round) -> Lane:
        """A lane on what the module holds and has trainable now."""
        optimizer = self.module.configure_optimizers()
        optimizer.zero_grad(set_to_none=True)  # what a client that broke off may have left
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self.lr_factor(rnd.idx)
        return Lane(client, self.lora.trainable(), optimizer)

    def run(
        self,
        lane: Lane,
        rnd: Round,
        per_epoch: int,
        batches: Callable[[int], Iterable[Batch]],
        most_steps: int | None = None,
    ) -> None:
        """Train one client.

        Args:
            lane: of :meth:`open`.
            rnd: the round.
            per_epoch: number of batches of an epoch.
            batches: epoch -> its batches.
            most_steps: stop after this many optimizer steps; None runs to the end.

        Raises:
            NonFiniteError: when the loss or a trained parameter is NaN or infinite at the end.
        """
        self._reset_scaler()
        device = self.fabric.device
        lane.loss, lane.correct = lane.loss.to(device), lane.correct.to(device)
        key = derive_seed(rnd.seed, "dropout", rnd.idx, lane.client.id)
        total = self.num_batches(per_epoch)
        if most_steps is not None:
            total = min(total, most_steps * self.accumulate)
        for objective in lane.objectives:
            objective.on_lane_start(lane)
        self.module.train()
        try:
            for window in _windows(
                itertools.islice(self._stream(batches), total), self.accumulate, total
            ):
                for position, (batch, count) in enumerate(window):
                    number = lane.step * self.accumulate + position
                    self._backward(lane, batch, count, (key, number))
                self._step(lane)
        finally:
            self.lora.set_dropout_key(None)
        if self.rows_over is not None:
            add_figures(lane, self.rows_over)
        for objective in lane.objectives:
            objective.on_lane_end(lane)
        self._check_finite(lane, rnd)

    def _stream(self, batches: Callable[[int], Iterable[Batch]]) -> Iterator[Batch]:
        for epoch in itertools.count():
            yield from itertools.islice(batches(epoch), self.limit_batches)

    def _backward(self, lane: Lane, batch: Batch, count: int, key: tuple[int, int]) -> None:
        own = Rows.of(batch, self.rows_over)
        if own is not None:
            batch = own.cut(batch)
        if not len(batch["label"]):  # fewer rows than processes
            return
        self.lora.set_dropout_key(*key, own)
        batch = {
            name: value.to(self.fabric.device, non_blocking=True) for name, value in batch.items()
        }
        # Fabric does not autocast around a LightningModule's training_step on one device.
        with self.fabric.autocast():
            out = self.module.training_step(batch, lane.step)
        losses = out["losses"]
        # Of the whole batch, whose last one may be smaller.
        mean = losses.mean() if own is None else losses.sum() / own.total
        self.fabric.backward(mean / count)
        lane.loss += losses.detach().sum(dtype=torch.float64)
        lane.correct += out["correct"].sum()
        lane.seen += len(losses)
        if self.on_batch is not None:
            self.on_batch(lane, out, batch)

    def _step(self, lane: Lane) -> None:
        precision = self.fabric.strategy.precision
        if self.rows_over is not None:
            add_gradients(list(lane.parameters.values()), self.rows_over)
        if self.clip is not None or lane.objectives:
            precision.unscale_gradients(lane.optimizer)
        for objective in lane.objectives:
            objective.on_lane_gradients(lane)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(lane.parameters.values(), self.clip)
        self.fabric.strategy.optimizer_step(lane.optimizer)
        lane.optimizer.zero_grad(set_to_none=True)
        lane.step += 1

    def _reset_scaler(self) -> None:
        """A loss scale belongs to one client: the strategy's only scaler starts anew for each."""
        precision: Any = self.fabric.strategy.precision
        if getattr(precision, "scaler", None) is not None:
            precision.scaler = torch.amp.GradScaler(device=self.fabric.device.type)
            # It has a scale only then: a process may come to its first step without any rows.
            precision.scaler.scale(torch.zeros((), device=self.fabric.device))

    def _check_finite(self, lane: Lane, rnd: Round) -> None:
        # Once per client and not per step: reading a value waits for the device.
        checks = [
            lane.loss.isfinite(),
            *(p.detach().isfinite().all() for p in lane.parameters.values()),
        ]
        if not bool(torch.stack(checks).all()):
            what = "loss" if not bool(checks[0]) else "adapter"
            raise NonFiniteError(
                f"the {what} of {lane.client} became NaN or infinite in round {rnd.idx}. Lower the "
                "learning rate, set trainer.gradient_clip_val, or set trainer.on_nonfinite=skip to "
                "go on without such clients."
            )


def _windows(
    stream: Iterable[Batch], size: int, total: int
) -> Iterator[Iterator[tuple[Batch, int]]]:
    """The batches of each optimizer step, each with the number that its step really has."""
    stream = iter(stream)
    for start in range(0, total, size):
        count = min(size, total - start)
        yield ((batch, count) for batch in itertools.islice(stream, count))
