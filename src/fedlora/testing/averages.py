"""Checks of what is served after a round."""

from __future__ import annotations

from dataclasses import replace

from fedlora.testing.compare import (
    EXACT,
    agree,
    bits,
    differences,
    ideal_error,
    personal_layers,
    require,
)
from fedlora.testing.federation import Federation, Trial, Turn


def equal_clients(trial: Trial) -> None:
    """Clients that serve the same after their training: the server serves that, too."""
    case = trial.case.equal()
    _all_as_the_first(replace(trial, case=case), "not what all clients serve")
    _all_as_the_first(replace(trial, case=replace(case, step=0.0)), "changed, but nobody trained")


def _all_as_the_first(trial: Trial, what: str) -> None:
    federation = trial.ready()
    first, *others = federation.case.clients
    turn = federation.turn(first)
    turns = [turn, *(federation.turn(other, lambda *_: turn.model) for other in others)]
    agree(federation.rule, federation.round, federation.average(turns), turn.model, what)


def one_client(trial: Trial) -> None:
    """With one client what it serves is served."""
    federation = trial.ready()
    first = federation.case.clients[0]
    turn = federation.turn(replace(first, num_samples=first.num_samples or 1))
    after, what = federation.average([turn]), "not what the only client serves"
    agree(federation.rule, federation.round, after, turn.model, what)


def order(trial: Trial) -> None:
    """In another order the clients give the same, up to rounding."""
    one, other = trial.ready(), trial.ready()
    forward, turns = one.average(list(one.turns())), list(other.turns())
    # In reverse order weights that are swapped would be swapped back.
    after, what = other.average(turns[1:] + turns[:1]), "not the same when the first comes last"
    agree(one.rule, one.round, after, forward, what)


def exact(trial: Trial) -> None:
    """A rule that calls itself exact serves the ideal average in every round."""
    for rule, outcome in trial.rounds():
        weights = [turn.update.weight for turn in outcome.turns]
        if not rule.exact or not any(weights):
            continue
        own = personal_layers(rule, outcome.rnd, outcome.after)
        models = [turn.update.adapter if own else turn.model for turn in outcome.turns]
        shares = [weight / sum(weights) for weight in weights]
        error = ideal_error(outcome.after, models, shares)
        require(
            error < EXACT[trial.case.dtype],
            f"exact is promised, but what is served is off by {error:.1e} of the clients' sizes "
            f"in round {outcome.rnd.idx}",
        )


def scale(trial: Trial) -> None:
    """A client that scales more and has the smaller B for it changes nothing."""
    if not trial.make_rule().mixed_ranks:
        return
    one, other = trial.ready(), trial.ready()
    turns = list(one.turns())
    last = turns[-1].update.client
    again = [other.turn(turn.update.client) for turn in turns[:-1]]
    more = other.turn(
        replace(last, scale=last.scale * 3), lambda *_: turns[-1].model.cut(0, scale=3.0)
    )
    after = other.average([*again, more])
    agree(one.rule, one.round, after, one.average(turns), "not the same for s_k * 3 with B_k / 3")


def no_weight(trial: Trial) -> None:
    """Clients of weight zero change nothing, and without any weight nothing changes."""
    one, other = trial.ready(), trial.ready()
    counted = [turn for turn in one.turns() if turn.update.weight]
    mixed = [turn for pair in _with_idle(other) for turn in pair]
    left, right = one.average(counted), other.average(mixed)
    what = "; ".join(differences(left, right))
    require(not what, f"clients of weight 0 change {what}")
    states = one.rule.state_dict(), other.rule.state_dict()
    require(bits(states[0]) == bits(states[1]), "clients of weight 0 change the rule's state")
    for nobody in (True, False):
        federation = trial.ready()
        after = federation.average([] if nobody else [idle for idle, _ in _with_idle(federation)])
        what = "; ".join(differences(replace(federation.server, added={}), after))
        require(not what, f"a round without any weight changes {what}")


def _with_idle(federation: Federation) -> list[tuple[Turn, Turn]]:
    """The round's turns, each after one of a client without samples that trained elsewhere."""
    count = len(federation.case.clients)
    return [
        (federation.turn(replace(client, id=client.id + count, num_samples=0)), turn)
        for client, turn in zip(federation.case.clients, federation.turns(), strict=True)
    ]
