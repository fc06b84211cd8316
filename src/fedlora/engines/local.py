"""The one local loop, the only place with a backward pass."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedlora.engines.lane import Batch, Lane, windows
from fedlora.engines.rows import Rows, add_figures, add_gradients
from fedlora.errors import FedloraError
from fedlora.flat import as_one
from fedlora.modules.lanes import Ticket
from fedlora.sampling import derive_seed
from fedlora.state import AdapterState, Client, Round

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from fedlora.distributed.world import World
    from fedlora.modules.classifier import CLIPLoRAClassifier
    from fedlora.modules.clip_wrapper import CLIPLoRAWrapper
    from fedlora.modules.lanes import LaneStack


class NonFiniteError(FedloraError):
    """A client's loss or adapter became NaN or infinite."""


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
        stack: the adapters of lanes that share steps; None where there is one lane, which trains
            the model's own.
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
    stack: LaneStack | None = None

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

    def open(
        self, client: Client, rnd: Round, state: AdapterState, seat: int | None = None
    ) -> Lane:
        """A lane on what the module has trainable now.

        Args:
            client: who.
            rnd: the round.
            state: what it starts from.
            seat: its place in the stack; None: the module.
        """
        if seat is None or self.stack is None:
            self.lora.load(state)
            room, parameters = None, self.lora.trainable()
            optimizer = self.module.configure_optimizers()
            optimizer.zero_grad(set_to_none=True)  # what a client that broke off may have left
        else:
            room = self.stack.put(seat, state)
            parameters = room.leaves()
            optimizer = self.module.make_optimizer(room.groups(self.module.optimizer_groups))
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self.lr_factor(rnd.idx)
        return Lane(client, parameters, optimizer, seat=seat, room=room)

    def start(
        self,
        lane: Lane,
        rnd: Round,
        per_epoch: int,
        batches: Callable[[int], Iterable[Batch]],
        most_steps: int | None = None,
    ) -> None:
        """Get a lane ready for its first step.

        Args:
            lane: of :meth:`open`.
            rnd: the round.
            per_epoch: number of batches of an epoch.
            batches: epoch -> its batches.
            most_steps: stop after this many optimizer steps; None runs to the end.
        """
        device = self.fabric.device
        lane.loss, lane.correct = lane.loss.to(device), lane.correct.to(device)
        lane.key = derive_seed(rnd.seed, "dropout", rnd.idx, lane.client.id)
        total = self.num_batches(per_epoch)
        if most_steps is not None:
            total = min(total, most_steps * self.accumulate)
        stream = itertools.islice(self._stream(batches), total)
        lane.windows = windows(stream, self.accumulate, total)
        lane.left = -(-total // self.accumulate)
        lane.scaler = self._make_scaler()
        for objective in lane.objectives:
            objective.on_lane_start(lane)
        if not self.module.training:  # which goes through every layer
            self.module.train()

    def step(self, lanes: Sequence[Lane]) -> None:
        """One optimizer step of each lane, together; more than one needs the stack.

        Lanes with fewer batches left for their step are left out of the others'.
        """
        began = time.perf_counter()
        own = [next(lane.windows) for lane in lanes]
        for position in range(self.accumulate):
            found = [(lane, next(window, None)) for lane, window in zip(lanes, own, strict=True)]
            work = [(lane, *item) for lane, item in found if item is not None]
            if not work:
                break
            self._backward(work, position)
        for lane in lanes:
            self._step(lane)
        spent = time.perf_counter() - began
        for lane in lanes:
            lane.seconds += spent / len(lanes)

    def finish(self, lane: Lane, rnd: Round) -> None:
        """Look at how it went.

        Raises:
            NonFiniteError: when the loss or a trained parameter is NaN or infinite.
        """
        if self.rows_over is not None:
            add_figures(lane, self.rows_over)
        for objective in lane.objectives:
            objective.on_lane_end(lane)
        self._check_finite(lane, rnd)

    def keep_frozen(self, client: Client, batches: Iterable[Batch]) -> None:
        """Compute what frozen blocks give for a client's rows, where that is kept."""
        with self.fabric.autocast():
            self.module.keep_frozen(client.id, client.num_samples, batches)

    def _stream(self, batches: Callable[[int], Iterable[Batch]]) -> Iterator[Batch]:
        for epoch in itertools.count():
            yield from itertools.islice(batches(epoch), self.limit_batches)

    def _backward(self, work: Sequence[tuple[Lane, Batch, int]], position: int) -> None:
        """Forward and backward of a batch of each lane, with the number that its step has."""
        if self.stack is not None and work[0][0].seat is not None:
            self._backward_together(self.stack, work, position)
            return
        ((lane, batch, count),) = work
        own = Rows.of(batch, self.rows_over)
        if own is not None:
            batch = own.cut(batch)
        if not len(batch["label"]):  # fewer rows than processes
            return
        batch = self._moved(batch)
        self.lora.set_dropout_key(lane.key, lane.step * self.accumulate + position, own)
        try:
            out = self._forward(batch, lane.step)
            losses = out["losses"]
            # Of the whole batch, whose last one may be smaller.
            mean = losses.mean() if own is None else losses.sum() / own.total
            self._pass_back(lane.scaled(mean / count))
        finally:
            self.lora.set_dropout_key(None)
        lane.add(losses, out["correct"])
        if self.on_batch is not None:
            self.on_batch(lane, out, batch)

    def _backward_together(
        self, stack: LaneStack, work: Sequence[tuple[Lane, Batch, int]], position: int
    ) -> None:
        # Those with as many rows side by side: they share their small products too.
        ordered = sorted(work, key=lambda item: len(item[1]["label"]))
        lanes, parts, counts = zip(*ordered, strict=True)
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        batch = self._moved(joined)
        rows = [len(part["label"]) for part in parts]
        tickets = [
            Ticket(lane.seat, size, lane.key, lane.step * self.accumulate + position)
            for lane, size in zip(lanes, rows, strict=True)
        ]
        with stack.together(tickets):
            out = self._forward(batch, position)
            pieces = [out[name].split_with_sizes(rows) for name in ("losses", "correct")]
            each = zip(lanes, pieces[0], counts, strict=True)
            total = [lane.scaled(losses.mean() / count) for lane, losses, count in each]
            self._pass_back(torch.stack(total).sum())
        moved = {name: value.split_with_sizes(rows) for name, value in batch.items()}
        for number, (lane, loss, correct) in enumerate(zip(lanes, *pieces, strict=True)):
            lane.add(loss, correct)
            if self.on_batch is not None:
                own = {"loss": loss.mean(), "losses": loss, "correct": correct}
                self.on_batch(lane, own, {name: part[number] for name, part in moved.items()})

    def _moved(self, batch: Batch) -> Batch:
        device = self.fabric.device
        if device.type == "cuda":  # from memory of any other kind the copy waits for the device
            batch = {name: value.pin_memory() for name, value in batch.items()}
        # The index is read here, for which the device would have to be waited for.
        return {
            name: value if name == "index" else value.to(device, non_blocking=True)
            for name, value in batch.items()
        }

    def _forward(self, batch: Batch, number: int) -> dict[str, Tensor]:
        # Fabric does not autocast around a LightningModule's training_step on one device.
        with self.fabric.autocast():
            return self.module.training_step(batch, number)

    def _pass_back(self, loss: Tensor) -> None:
        precision: Any = self.fabric.strategy.precision
        if getattr(precision, "scaler", None) is not None:
            precision.scaler = None  # the loss has each lane's own scale already
        self.fabric.backward(loss)

    def _step(self, lane: Lane) -> None:
        precision: Any = self.fabric.strategy.precision
        if lane.scaler is not None:
            precision.scaler = lane.scaler
        if self.rows_over is not None:
            add_gradients(list(lane.parameters.values()), self.rows_over)
        lane.settle_gradients()
        if self.clip is not None or lane.objectives:
            precision.unscale_gradients(lane.optimizer)
        for objective in lane.objectives:
            objective.on_lane_gradients(lane)
            lane.settle_gradients()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(lane.parameters.values(), self.clip)
        self.fabric.strategy.optimizer_step(lane.optimizer)
        lane.forget_gradients()
        lane.step += 1
        lane.left -= 1

    def _make_scaler(self) -> Any:
        """A loss scale of the lane's own, where the precision needs one: it belongs to a client."""
        if getattr(self.fabric.strategy.precision, "precision", "") != "16-mixed":
            return None
        scaler = torch.amp.GradScaler(device=self.fabric.device.type)
        # It has a scale only then: a process may come to its first step without any rows.
        scaler.scale(torch.zeros((), device=self.fabric.device))
        return scaler

    def _check_finite(self, lane: Lane, rnd: Round) -> None:
        # Once per client and not per step: reading a value waits for the device.
        trained = [p for group in lane.optimizer.param_groups for p in group["params"]]
        largest = as_one(trained).abs().amax()  # NaN where one is
        checks = torch.stack([lane.loss, largest.double()]).isfinite().tolist()
        if not all(checks):
            what = "adapter" if checks[0] else "loss"
            raise NonFiniteError(
                f"the {what} of {lane.client} became NaN or infinite in round {rnd.idx}. Lower the "
                "learning rate, set trainer.gradient_clip_val, or set trainer.on_nonfinite=skip to "
                "go on without such clients."
            )
