"""Checks of what travels."""

from __future__ import annotations

from dataclasses import replace

from fedlora.aggregation.base import Aggregator
from fedlora.state import AdapterState
from fedlora.testing.compare import bits, differences, require
from fedlora.testing.federation import Outcome, Trial, Turn


def payload(trial: Trial) -> None:
    """What is shared leaves the client, whole and alone; what else it trained stays there."""
    for rule, outcome in trial.rounds():
        for turn in outcome.turns:
            _stays(rule, outcome, turn)
            _leaves(rule, outcome, turn)


def _stays(rule: Aggregator, outcome: Outcome, turn: Turn) -> None:
    when, private = f"in round {outcome.rnd.idx}", rule.private(outcome.rnd)
    trained = dict(turn.trained.tensors())
    kept = dict(rule.stays(turn.trained, outcome.rnd).tensors())
    for name, tensor in kept.items():
        right = name in trained and bits(tensor) == bits(trained[name])
        require(right, f"stays() keeps another {name} than was trained {when}")
        named = name.split("/", 1)[0] in private
        require(named, f"stays() keeps {name} {when}, of a part that private() does not name")
    shared = dict(turn.trained.only(rule.shared(outcome.rnd)).tensors())
    lost = sorted(trained.keys() - kept.keys() - shared.keys())
    require(not lost, f"stays() does not keep {', '.join(lost)} {when}, which is not shared")


def _leaves(rule: Aggregator, outcome: Outcome, turn: Turn) -> None:
    shared, sent = rule.shared(outcome.rnd), turn.update.payload
    got, want = (dict(state.tensors()) for state in (sent, turn.trained.only(shared)))
    when = f"in round {outcome.rnd.idx}"
    kept = {name for name, _ in rule.stays(turn.trained, outcome.rnd).tensors()}
    both = sorted(got.keys() & kept)
    require(not both, f"upload() sends {', '.join(both)} {when}, which stays() keeps")
    want = {name: tensor for name, tensor in want.items() if name not in kept}
    more, less = sorted(got.keys() - want.keys()), sorted(want.keys() - got.keys())
    require(not more, f"upload() sends {', '.join(more)} {when}, which shared() does not name")
    require(not less, f"upload() does not send {', '.join(less)} {when}, which shared() names")
    for name, tensor in got.items():
        form, right = tuple(tensor.shape), tuple(want[name].shape)
        require(form == right, f"upload() sends {name} of shape {form}, not {right}, {when}")
        kind = want[name].dtype
        require(tensor.dtype == kind, f"upload() sends {name} as {tensor.dtype} {when}")
    nbytes = sum(tensor.nbytes for tensor in got.values())
    require(sent.nbytes == nbytes, f"upload() sends a residual {when}")
    scaling = dict(turn.update.adapter.scaling)
    require(scaling == dict(turn.trained.scaling), f"upload() sends another scaling {when}")


def distribution(trial: Trial) -> None:
    """With what it knows already, a client gets to the server's adapter by what it is sent.

    It knows the adapter of :meth:`Aggregator.start` and what it was sent in the rounds that it
    played in; it may have missed any.
    """
    federation = trial.start()
    first = federation.server
    has: dict[int, AdapterState] = {}
    for _ in range(trial.case.rounds + 1):
        outcome = federation.play()
        for turn in outcome.turns:
            client = turn.update.client
            had = has.get(client.id, first.cut(client.rank, client.scale))
            has[client.id] = got = federation.rule.receive(had, turn.down, outcome.rnd)
            want = outcome.before.cut(client.rank, client.scale)
            what = differences(replace(got, added={}), replace(want, added={}))
            require(
                not what,
                f"client {client.id} does not get to {'; '.join(what)} in round {outcome.rnd.idx}: "
                f"distribute() sent {_named(turn.down)}",
            )


def _named(down: AdapterState) -> str:
    fields = ("A", "B", "other", "residual", "added")
    return ", ".join(name for name in fields if getattr(down, name)) or "nothing"
