"""Checks of what a rule takes and gives."""

from __future__ import annotations

from dataclasses import replace

from fedlora.errors import FedloraError
from fedlora.state import PARTS, AdapterState, Client, Round
from fedlora.testing.compare import bits, require, state_bits
from fedlora.testing.federation import Federation, Trial, Turn

Ended = list[tuple[AdapterState, list[object]]]  # what was trained; the bits of it and of the rule


def parts(trial: Trial) -> None:
    """What is shared is trained, and what is trained is a part of an adapter."""
    rule, count = trial.make_rule(), len(trial.case.clients)
    for idx in range(6):
        rnd = Round(idx, trial.case.seed, count, count)
        trainable, shared = rule.trainable(rnd), rule.shared(rnd)
        require(trainable <= PARTS, f"trainable() names {_listed(trainable - PARTS)}, no part")
        require(
            shared <= trainable,
            f"shared() names {_listed(shared - trainable)} in round {idx}, which is not trained",
        )


def result(trial: Trial) -> None:
    """A whole adapter comes out: names, shapes, type and scaling of the server."""
    for case in (trial.case, replace(trial.case, step=0.0)):
        federation = Federation(trial.make_rule(), case)
        _whole(case.start(), federation.server, "start()")
        for _ in range(case.rounds + 1):
            outcome = federation.play()
            unmoved = "" if case.step else " without any training"
            _whole(outcome.before, outcome.after, f"round {outcome.rnd.idx}{unmoved}")


def _whole(before: AdapterState, after: AdapterState, when: str) -> None:
    for part in ("A", "B", "other"):
        old, new = getattr(before, part), getattr(after, part)
        require(old.keys() == new.keys(), f"{when} gives other names in {part}")
        for name, tensor in new.items():
            form, want = (tuple(t.shape) for t in (tensor, old[name]))
            require(form == want, f"{when} gives {part} of {name} the shape {form}, not {want}")
            kind = old[name].dtype
            require(tensor.dtype == kind, f"{when} makes {part} of {name} {tensor.dtype}")
            require(bool(tensor.isfinite().all()), f"{when} makes {part} of {name} not finite")
    require(dict(before.scaling) == dict(after.scaling), f"{when} changes the scaling")
    for name, change in (*after.residual.items(), *after.added.items()):
        form, want = change.shape, (before.B[name].shape[0], before.A[name].shape[1])
        require(form == want, f"{when} gives the residual of {name} the shape {form}, not {want}")
        kinds = {tensor.dtype for tensor in (change.U, change.V) if tensor is not None}
        require(kinds == {before.A[name].dtype}, f"{when} makes the residual of {name} {kinds}")
        finite = bool(change.dense().isfinite().all())
        require(finite, f"{when} makes the residual of {name} not finite")


def arguments(trial: Trial) -> None:
    """No argument of any method is edited, nor the rule where it is called on a client."""
    rule, case = trial.make_rule(), trial.case
    server, base = case.start(), case.base()
    given = bits([server, base])
    rule.start(server, base, Round(0, case.seed, len(case.clients), len(case.clients)))
    require(bits([server, base]) == given, "start() edits its arguments")
    federation = trial.start()
    for _ in range(case.rounds + 1):
        _round_edits_nothing(federation)


def _round_edits_nothing(federation: Federation) -> None:
    turns: list[Turn] = []
    given = bits(federation.server)
    for client in federation.case.players(federation.idx):
        ended: Ended = []

        def train(start: AdapterState, client: Client, ended: Ended = ended) -> AdapterState:
            end = federation.moved(start, client)
            ended.append((end, [bits(end), state_bits(federation.rule)]))
            return end

        turns.append(federation.turn(client, train))
        require(bits(federation.server) == given, "distribute() or upload() edits the server's")
        trained, (before, state) = ended[0]
        require(bits(trained) == before, "upload() edits what was trained")
        kept = state_bits(federation.rule) != state
        require(not kept, "upload() changes the rule, but it runs on the client")
    sent = [bits(turn.update) for turn in turns]
    after = federation.average(turns)
    require(bits(federation.server) == given, "aggregate() edits the server's adapter")
    require([bits(turn.update) for turn in turns] == sent, "aggregate() edits an update")
    federation.commit(after, turns)


def ranks(trial: Trial) -> None:
    """Every rank is averaged where that is promised; elsewhere another than the server's is not."""
    rank = max(trial.case.rank, 2)
    rule = trial.make_rule()
    mixed = [Client(number, 1, rank=number + 1) for number in range(rank)]
    case = replace(trial.case, rank=rank, clients=tuple(mixed))
    if rule.mixed_ranks:
        result(replace(trial, case=case))
        return
    for odd in ({0}, {1}, {0, 1, 2}):
        clients = [Client(number, 1, rank=rank - (number in odd)) for number in range(3)]
        federation = Federation(trial.make_rule(), replace(case, clients=tuple(clients)))
        turns = list(federation.turns(clients))
        if not any(turn.update.payload.ranks for turn in turns):
            return  # no factor leaves its client
        try:
            federation.average(turns)
        except FedloraError:
            continue
        require(False, f"mixed_ranks is not promised, but rank {rank - 1} beside {rank} is taken")


def _listed(names: frozenset[str]) -> str:
    return ", ".join(sorted(names))
