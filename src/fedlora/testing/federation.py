"""Plays a federation as the engine does, with random steps in the place of training."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace

import torch

from fedlora.aggregation.base import Aggregator
from fedlora.state import AdapterState, Client, ClientUpdate, Round
from fedlora.testing.cases import Case
from fedlora.testing.compare import require

Training = Callable[[AdapterState, Client], AdapterState]


@dataclass(frozen=True)
class Turn:
    """A client's part in a round.

    Attributes:
        update: what the rule is given.
        down: what travelled to the client.
        trained: the parts that it trained, as they are before anything leaves it.
        model: the adapter that it serves after its training, with what stays there.
    """

    update: ClientUpdate
    down: AdapterState
    trained: AdapterState
    model: AdapterState


@dataclass(frozen=True)
class Outcome:
    """A round that was played: the adapter before it, the turns and the adapter after it."""

    rnd: Round
    before: AdapterState
    turns: list[Turn]
    after: AdapterState


class Federation:
    """A rule and its clients between rounds.

    Args:
        rule: under test.
        case: what to play.
    """

    def __init__(self, rule: Aggregator, case: Case) -> None:
        self.rule = rule
        self.case = case
        self.idx = 0
        self.received: dict[int, int] = {}
        self._kept: dict[int, AdapterState] = {}
        self._new: dict[int, AdapterState] = {}
        self.server = rule.start(case.start(), case.base(), self.round)

    @property
    def round(self) -> Round:
        """The round that comes next."""
        players = len(self.case.players(self.idx))
        return Round(self.idx, self.case.seed, len(self.case.clients), players)

    def turn(self, client: Client, train: Training | None = None) -> Turn:
        """What a client does in the next round; ``train`` gives its adapter after training."""
        rule, rnd = self.rule, self.round
        client = replace(client, last_round=self.received.get(client.id))
        down = rule.distribute(self.server, client, rnd)
        public = self.server.cut(client.rank, client.scale)
        sent = down.over(public)
        kept = self._kept.get(client.id, AdapterState())
        start = down.over(kept.over(public))
        ended = self.moved(start, client) if train is None else train(start, client)
        trained = ended.only(rule.trainable(rnd)).cut(client.rank)
        # What it kept of parts that it did not train in this round is still its own.
        self._new[client.id] = rule.stays(trained, rnd).over(kept)
        payload = rule.upload(sent, trained, client, rnd)
        update = ClientUpdate(
            client, sent, payload, float(client.num_samples), num_steps=1, down_nbytes=down.nbytes
        )
        return Turn(update, down, trained, replace(trained.over(start), added={}))

    def turns(self, clients: Sequence[Client] | None = None) -> Iterator[Turn]:
        """The turns of the next round, played when asked for."""
        for client in self.case.players(self.idx) if clients is None else clients:
            yield self.turn(client)

    def moved(self, start: AdapterState, client: Client) -> AdapterState:
        """A random step from where a client starts."""
        tensors = dict(start.tensors())
        counts = [tensor.numel() for tensor in tensors.values()]
        noise = torch.split_with_sizes(
            self.case.draw(sum(counts), key=(6, self.idx, client.id)), counts
        )
        ends: dict[str, dict[str, torch.Tensor]] = {"A": {}, "B": {}, "other": {}}
        for (name, tensor), step in zip(tensors.items(), noise, strict=True):
            part, path = name.split("/", 1)
            ends[part][path] = tensor + self.case.step * step.view_as(tensor)
        return replace(start, A=ends["A"], B=ends["B"], other=ends["other"])

    def average(self, turns: Iterable[Turn]) -> AdapterState:
        """What the rule makes of the round; nothing is committed here."""
        after = self.rule.aggregate(self.server, (turn.update for turn in turns), self.round)
        kind = type(after).__name__
        require(isinstance(after, AdapterState), f"aggregate() returns {kind}, no AdapterState")
        return after

    def commit(self, after: AdapterState, turns: Iterable[Turn]) -> None:
        """Go on to the next round."""
        self._kept.update(self._new)
        self._new = {}
        self.received.update({turn.update.client.id: self.idx for turn in turns})
        self.server = after
        self.idx += 1

    def play(self) -> Outcome:
        """Play the next round and go on."""
        rnd, before = self.round, self.server
        turns = list(self.turns())
        after = self.average(turns)
        self.commit(after, turns)
        return Outcome(rnd, before, turns, after)

    def resumed(self, rule: Aggregator) -> Federation:
        """This federation as a new process goes on with it: from what was saved."""
        rule.load_state_dict(saved(self.rule.state_dict()))
        other = copy(self)
        other.rule, other._new = rule, {}
        other.received, other._kept = dict(self.received), dict(self._kept)
        other.server = AdapterState.from_dict(saved(self.server.to_dict()))
        return other


def saved(state: dict[str, object]) -> dict[str, object]:
    """What comes back of a state that was written with torch and read without pickle."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    back: dict[str, object] = torch.load(file, weights_only=True)
    return back


@dataclass(frozen=True)
class Trial:
    """What a check is given: a way to make the rule, and a federation to try it on.

    Attributes:
        make_rule: makes a fresh rule.
        case: the federation.
    """

    make_rule: Callable[[], Aggregator]
    case: Case

    def start(self) -> Federation:
        """A new federation before its first round."""
        return Federation(self.make_rule(), self.case)

    def ready(self) -> Federation:
        """A new federation just before the round that is looked at."""
        federation = self.start()
        for _ in range(self.case.rounds):
            federation.play()
        return federation

    def rounds(self) -> Iterator[tuple[Aggregator, Outcome]]:
        """Every round of a new federation, to the one that is looked at."""
        federation = self.start()
        for _ in range(self.case.rounds + 1):
            yield federation.rule, federation.play()
