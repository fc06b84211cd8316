"""One round's clients: played, watched, averaged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedlora.aggregation.meter import AggregationMeter, Figures
from fedlora.distributed.world import World
from fedlora.errors import FedloraError
from fedlora.sampling import Absence, Plan
from fedlora.state import AdapterState, ClientUpdate, Round
from fedlora.tally import Tally

if TYPE_CHECKING:
    from fedlora.engines.sequential import SequentialEngine
    from fedlora.trainer import FederatedTrainer

Report = dict[str, float | None]


@dataclass(frozen=True)
class Averaged:
    """What became of the adapter in a round, the same in every process.

    Attributes:
        adapter: the new one.
        answered: ids of the clients that answered.
        versions: client id -> version of what was written that stays with it.
        report: the round's figures.
    """

    adapter: AdapterState
    answered: list[int]
    versions: dict[int, int]
    report: Report


class Cohort:
    """Plays a round's clients and averages what they send.

    Args:
        trainer: settings, hooks and the server's state.
        engine: plays the clients.
    """

    def __init__(self, trainer: FederatedTrainer, engine: SequentialEngine) -> None:
        self.trainer = trainer
        self.engine = engine
        self.world = engine.world
        self.rule = trainer.averaging.aggregator

    def average(self, planned: Plan, rnd: Round) -> Averaged:
        """Play the clients, and load what becomes of the adapter into the model."""
        self._tell_server_state()
        server = self.trainer.server
        adapter: AdapterState | None = None
        report: Report = {}
        with closing(self.engine.play(planned, rnd, server, self.rule)) as updates:
            if self.world.is_zero:
                adapter, report = self._averaged(updates, planned, rnd)
            else:
                for _ in updates:  # rank 0 averages
                    pass
        noted = self.engine.store.take_noted()
        adapter = share_adapter(self.world, adapter)
        rest = self.world.share(lambda: [[c.id for c in self.tally.clients], noted, report])
        self.engine.lora.load(adapter)
        return Averaged(adapter, *rest)

    def _averaged(
        self, updates: Iterable[ClientUpdate], planned: Plan, rnd: Round
    ) -> tuple[AdapterState, Report]:
        trainer, before = self.trainer, self.trainer.server.adapter
        own = self.rule.stays(before, rnd)
        # There is no one average of layers that are the clients' own.
        meter = None if own.A or own.B else AggregationMeter()
        self.tally = tally = Tally(rnd, trainer.min_clients if planned.players else 0)
        told = self._announce(updates)
        seen = tally.watch(meter.watch(told) if meter else told)
        adapter = trainer.averaging.average(before, seen, rnd)
        for _ in seen:  # a rule that stops early must still let every client train
            pass
        _check_finite(adapter, rnd)
        figures = meter.figures(adapter) if meter else Figures()
        return adapter, {
            "round": rnd.idx + 1,
            "train/loss": tally.loss,
            "clients/answered": len(tally.clients),
            "comm/up_bytes": tally.up,
            "comm/down_bytes": tally.down + self.engine.unanswered_nbytes,
            "agg/error": figures.error,
            "agg/effective_rank": figures.effective_rank,
            "clients/drift_mean": figures.drift_mean,
            "clients/drift_max": figures.drift_max,
        }

    def _tell_server_state(self) -> None:
        """What the server knows besides the adapter, where clients may play: c of SCAFFOLD."""
        if self.world.size == 1:
            return
        objectives = self.trainer.objectives
        states = self.world.share(
            lambda: [self.rule.state_dict(), *(each.state_dict() for each in objectives)]
        )
        if not self.world.is_zero:
            self.rule.load_state_dict(states[0])
            for objective, state in zip(objectives, states[1:], strict=True):
                objective.load_state_dict(state)

    def miss(self, absence: Absence, nbytes: int, error: Exception | None) -> None:
        """Take note of a client that does not answer."""
        if not self.world.is_zero:
            return
        if error is not None:
            self.trainer.progress.say_left_out(absence, error)
        self.tally.miss(absence, error)  # last: it forgets where the error is from
        self.trainer.call("on_client_absent", absence, nbytes)

    def _announce(self, updates: Iterable[ClientUpdate]) -> Iterator[ClientUpdate]:
        for update in updates:
            self.trainer.call("on_client_end", update)
            yield update


def share_adapter(world: World, adapter: AdapterState | None) -> AdapterState:
    """Rank 0's adapter on every rank: itself there, and equal to the bit elsewhere."""
    plain: Mapping[str, Any] = world.share(lambda: adapter.to_dict() if adapter else {})
    return AdapterState.from_dict(plain) if adapter is None else adapter


def _check_finite(adapter: AdapterState, rnd: Round) -> None:
    tensors = dict(adapter.tensors()) | {n: r.U for n, r in adapter.residual.items()}
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise FedloraError(
            f"the averaged adapter became NaN or infinite in round {rnd.idx} ({bad[0]}). Lower the "
            "learning rate or set trainer.gradient_clip_val."
        )
