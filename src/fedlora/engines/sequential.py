"""Plays the clients of a round one after the other in this process."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from fedlora.aggregation.base import turns
from fedlora.distributed.world import World
from fedlora.engines.lane import Lane
from fedlora.engines.local import LocalLoop, NonFiniteError
from fedlora.engines.shared import SharedSteps
from fedlora.engines.turn import Clock, Course, Start, Turn
from fedlora.personal import Kept
from fedlora.sampling import Absence, Plan
from fedlora.state import AdapterState, Client, ClientUpdate, Part, Round, ServerState

if TYPE_CHECKING:
    from fedlora.aggregation import Aggregator
    from fedlora.callbacks.objective import Objective
    from fedlora.data import FederatedDataModule
    from fedlora.modules.clip_wrapper import CLIPLoRAWrapper
    from fedlora.personal import ClientStore

NOT_FINITE = "not finite"


class SequentialEngine:
    """One client at a time, on one frozen backbone.

    Args:
        loop: the local loop.
        data: gives each client's batches.
        store: what stays with the clients.
        objectives: what clients minimise besides their loss.
        on_start: called before a client trains.
        on_absent: called with a client that does not answer, the bytes that it was sent, and the
            error where there was one.
        leaves_out: whether an error leaves its client out of the round instead of ending it.
        world: the processes of the run.

    Attributes:
        unanswered_nbytes: sent in this round to clients that did not answer.
    """

    def __init__(
        self,
        loop: LocalLoop,
        data: FederatedDataModule,
        store: ClientStore,
        objectives: Sequence[Objective],
        on_start: Callable[[Client], None],
        on_absent: Callable[[Absence, int, Exception | None], None],
        leaves_out: Callable[[Exception], bool],
        world: World | None = None,
    ) -> None:
        self.loop = loop
        self.data = data
        self.store = store
        self.objectives = [each for each in objectives if not each.own_model]
        self.own_objectives = [each for each in objectives if each.own_model]
        self.on_start = on_start
        self.on_absent = on_absent
        self.leaves_out = leaves_out
        self.world = world or World()
        self.unanswered_nbytes = 0

    @property
    def lora(self) -> CLIPLoRAWrapper:
        """The adapter in the model."""
        return self.loop.lora

    @property
    def lanes(self) -> int:
        """How often a client trains in a round."""
        return 1 + bool(self.own_objectives)

    def num_steps(self, client: Client) -> int:
        """Optimizer steps that a client takes in a round, in each of its lanes."""
        return self.loop.num_steps(self.data.num_batches(client))

    def personal(self, rule: Aggregator, rnd: Round) -> bool:
        """Whether each client has a model of its own."""
        return bool(self.own_objectives) or any(rule.private(now) for now in turns(rnd))

    def load_own(self, client: Client, rnd: Round, server: ServerState, rule: Aggregator) -> None:
        """Load the model that a client uses: its own where it has one, else the common one."""
        start = self.start_of(client, rnd, server, rule)
        state = start.kept.own.over(start.state) if self.own_objectives else start.state
        self.lora.load(state.padded(server.adapter.ranks))

    def sent(
        self, client: Client, rnd: Round, server: ServerState, rule: Aggregator
    ) -> tuple[Client, AdapterState, AdapterState]:
        """The client as the rule is told, what it then knows of the adapter, and what travels."""
        client = replace(client, last_round=server.received.get(client.id))
        down = rule.distribute(server.adapter, client, rnd)
        return client, down.over(server.adapter.cut(client.rank, client.scale)), down

    def start_of(self, client: Client, rnd: Round, server: ServerState, rule: Aggregator) -> Start:
        """What a client starts from."""
        client, sent, down = self.sent(client, rnd, server, rule)
        # Public knowledge, then what the client kept, then what travelled. The private part goes
        # into the model only: no rule sees it.
        kept = self.store.read(client.id, server.versions)
        state = down.over(kept.adapter.over(sent))
        return Start(client, sent, state, kept, down.nbytes)

    def play(
        self, plan: Plan, rnd: Round, server: ServerState, rule: Aggregator
    ) -> Generator[ClientUpdate, None, None]:
        """Train each client that is to answer and yield what it sends, in their order."""
        self.unanswered_nbytes = 0
        for absence in plan.absent:
            self._miss(absence, rnd, server, rule)
        for client, turn in self.take_turns(plan, rnd, server, rule):
            if turn.update is None:
                self._miss(Absence(client, turn.reason, True), rnd, server, rule, turn.error)
                continue
            if turn.kept:
                self.store.note(client.id, rnd.idx + 1)
            yield turn.update

    def take_turns(
        self, plan: Plan, rnd: Round, server: ServerState, rule: Aggregator
    ) -> Iterator[tuple[Client, Turn]]:
        """Every client's turn, in their order."""
        turns = self.steps(plan, rnd, server, rule).turns(plan.players)
        yield from zip(plan.players, turns, strict=True)

    def steps(self, plan: Plan, rnd: Round, server: ServerState, rule: Aggregator) -> SharedSteps:
        """What trains clients, and writes what stays with them."""

        def begin(start: Start, seat: int | None) -> Course:
            return self._course(start, rnd, server, rule, plan.limits.get(start.client.id), seat)

        def conclude(client: Client, result: tuple[ClientUpdate, Kept]) -> Turn:
            update, kept = result
            # Not the client's fault where that fails. What is written counts.
            if kept:
                self.store.write(client.id, rnd.idx + 1, kept)
            return Turn(update, bool(kept))

        return SharedSteps(
            self.loop,
            self.on_start,
            lambda client: self.start_of(client, rnd, server, rule),
            begin,
            conclude,
            self._left_out,
        )

    def _left_out(self, error: Exception) -> Turn:
        """The turn of a client that raised an error, where that does not end the round."""
        if not self.leaves_out(error):
            raise error
        why = NOT_FINITE if isinstance(error, NonFiniteError) else f"error: {_line(error)}"
        return Turn(reason=why, error=error)

    def _miss(
        self,
        absence: Absence,
        rnd: Round,
        server: ServerState,
        rule: Aggregator,
        error: Exception | None = None,
    ) -> None:
        nbytes = 0
        if absence.reached:
            client, _, down = self.sent(absence.client, rnd, server, rule)
            nbytes = down.nbytes + _nbytes(self._download(client, self.shared(rule, rnd)))
        self.unanswered_nbytes += nbytes
        self.on_absent(absence, nbytes, error)

    def _course(
        self,
        start: Start,
        rnd: Round,
        server: ServerState,
        rule: Aggregator,
        limit: int | None,
        seat: int | None,
    ) -> Course:
        """A client's turn; each lane that it yields is to take all of its steps meanwhile."""
        clock = Clock()
        client, trainable = start.client, rule.trainable(rnd)
        self.lora.set_trainable(trainable)
        lane = self.loop.open(client, rnd, start.state.padded(server.adapter.ranks), seat)
        lane.objectives, lane.memory = self.objectives, dict(start.kept.memory)
        if self.objectives or self.own_objectives:
            shared = {name: lane.parameters[name] for name in self.shared(rule, rnd)}
            lane.received = self._download(client, shared)
            lane.anchor = {name: own.detach().clone() for name, own in shared.items()}
        yield from self._train(lane, rnd, limit, clock)
        trained, seconds = self._trained(trainable, lane), lane.seconds
        own = start.kept.own
        if self.own_objectives:
            second = self._open_own(start, server, lane, rnd)
            yield from self._train(second, rnd, limit, clock)
            # With what is trained in other rounds: the server's moves on.
            ever = {part for now in turns(rnd) for part in rule.trainable(now)}
            before = own.over(start.state).only(ever)
            own = self._trained(trainable, second).over(before)
            seconds += second.seconds
        payload = rule.upload(start.sent, trained, client, rnd)
        kept = Kept(rule.stays(trained, rnd).over(start.kept.adapter), own, lane.memory)
        update = ClientUpdate(
            client=client,
            sent=start.sent,
            payload=payload,
            weight=float(client.num_samples),
            extra=lane.extra,
            metrics={**lane.metrics(), "seconds": seconds + clock.seconds()},
            num_steps=lane.step,
            down_nbytes=start.down_nbytes + _nbytes(lane.received),
        )
        return update, kept

    def _open_own(self, start: Start, server: ServerState, first: Lane, rnd: Round) -> Lane:
        """A lane of the client's own model, to train on the batches of its first; the whole."""
        state = start.kept.own.over(start.state).padded(server.adapter.ranks)
        lane = self.loop.open(start.client, rnd, state, first.seat)
        lane.objectives, lane.anchor, lane.own = self.own_objectives, first.anchor, True
        return lane

    def _train(self, lane: Lane, rnd: Round, limit: int | None, clock: Clock) -> Iterator[Lane]:
        client = lane.client
        self.loop.keep_frozen(client, self.data.client_rows(client))
        self.loop.start(
            lane,
            rnd,
            self.data.num_batches(client),
            lambda epoch: self.data.client_batches(client, rnd, epoch),
            limit,
        )
        clock.stop()
        yield lane
        clock.go_on()
        self.loop.finish(lane, rnd)

    def _trained(self, trainable: frozenset[Part], lane: Lane) -> AdapterState:
        stack, seat = self.loop.stack, lane.seat
        state = self.lora.state() if stack is None or seat is None else stack.take(seat)
        return state.only(trainable).cut(lane.client.rank)

    def _download(self, client: Client, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the objectives send to a client beside the adapter."""
        return {n: t for each in self.objectives for n, t in each.download(client, shared).items()}

    def beside_nbytes(self, client: Client, rule: Aggregator, rnd: Round) -> tuple[int, int]:
        """Bytes that travel up and down for the objectives beside the adapter."""
        shared = self.shared(rule, rnd)
        up = sum(_nbytes(each.sent(shared)) for each in self.objectives)
        return up, _nbytes(self._download(client, shared))

    def shared(self, rule: Aggregator, rnd: Round) -> dict[str, Tensor]:
        """The parameters that clients train and the server averages, by name; not copies."""
        parameters = self.lora.parameters
        views = AdapterState(parameters["A"], parameters["B"], parameters["other"])
        stays = dict(rule.stays(views.only(rule.trainable(rnd)), rnd).tensors())
        travels = dict(views.only(rule.shared(rnd)).tensors())
        return {name: tensor for name, tensor in travels.items() if name not in stays}

    def kept_nbytes(self, rule: Aggregator, rnd: Round, rank: int) -> int:
        """Bytes of the file that a client of some rank keeps, once it has played often enough."""
        state = self.lora.state().cut(rank)
        tensors: dict[str, Tensor] = {}
        for now in turns(rnd):
            trained = state.only(rule.trainable(now))
            shared = self.shared(rule, now)
            memory = {n: t for each in self.objectives for n, t in each.remembered(shared).items()}
            own = trained if self.own_objectives else AdapterState()
            tensors |= dict(Kept(rule.stays(trained, now), own, memory).tensors())
        return Kept.from_tensors(tensors).nbytes() if tensors else 0


def _nbytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _line(error: Exception) -> str:
    """The first line of what an error says, with its type."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}{f': {said[0]}' if said else ''}"
