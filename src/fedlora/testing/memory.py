"""Checks of what a rule keeps between rounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedlora.state import ClientUpdate
from fedlora.testing.compare import PromiseError, bits, differences, require, state_bits
from fedlora.testing.federation import Federation, Trial, Turn, saved


class GoneError(Exception):
    """A client is gone."""


class StoppedError(KeyboardInterrupt):
    """The run is stopped."""


def saved_state(trial: Trial) -> None:
    """A new rule that loads what was saved goes on as the old one does."""
    old = trial.ready()
    try:
        saved(old.rule.state_dict())
    except Exception as error:
        what = "state_dict() holds more than tensors, numbers, strings, lists and dicts"
        raise PromiseError(f"{what}, so torch.load(weights_only=True) refuses it") from error
    new = old.resumed(trial.make_rule())
    _same_rounds(old, new, "after load_state_dict()")


def _same_rounds(old: Federation, new: Federation, when: str) -> None:
    for ahead in (1, 2):
        left, right = old.play(), new.play()
        what = differences(left.after, right.after)
        require(not what, f"{when} round {ahead} gives another {'; '.join(what)}")
        same = bits(old.rule.state_dict()) == bits(new.rule.state_dict())
        require(same, f"{when} round {ahead} leaves another state_dict()")


def interruption(trial: Trial) -> None:
    """A round that breaks leaves the rule as it was, and can be played again."""
    federation, clean = trial.ready(), trial.ready()
    turns = list(federation.turns())
    want = clean.average(list(clean.turns()))
    before = state_bits(federation.rule)
    for error in (GoneError(), StoppedError()):
        for count in range(len(turns)):
            _break(federation, turns[:count], error)
            require(
                state_bits(federation.rule) == before,
                f"a round that broke after {count} of {len(turns)} updates changed the rule",
            )
    what = differences(federation.average(turns), want)
    require(not what, f"played again after it broke, a round gives another {'; '.join(what)}")


def _break(federation: Federation, turns: Sequence[Turn], error: BaseException) -> None:
    """Let the stream raise after some updates; a rule may not have read as far."""
    raised = []

    def stream() -> Iterator[ClientUpdate]:
        yield from (turn.update for turn in turns)
        raised.append(error)
        raise error

    try:
        federation.rule.aggregate(federation.server, stream(), federation.round)
    except (GoneError, StoppedError):
        return
    require(not raised, f"aggregate() hides that {type(error).__name__} was raised by the updates")


def commit(trial: Trial) -> None:
    """The rule's state changes only after the last update was read."""
    federation = trial.ready()
    turns = list(federation.turns())
    before = bits(federation.rule.state_dict())

    def stream() -> Iterator[Turn]:
        for number, turn in enumerate(turns):
            yield turn
            require(
                bits(federation.rule.state_dict()) == before,
                f"the state changed with update {number + 1} of {len(turns)}, before the last was "
                "read",
            )

    federation.average(stream())
