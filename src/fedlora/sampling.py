"""Which clients play, and every seed: pure functions of (seed, round, client)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal, get_args

from fedlora.errors import FedloraError

if TYPE_CHECKING:
    from fedlora.state import Client, Round

Late = Literal["drop", "partial"]
# Beyond that exp(slowness * z) is no simulation of anything, and soon no number either.
MAX_SLOWNESS = 10.0


def derive_seed(*keys: int | str) -> int:
    """Derive an independent seed from a path of keys.

    Python's ``hash()`` of a string differs per process, so the keys go through SHA-256.

    Args:
        keys: what the seed is for, e.g. ``(seed, "batches", round_idx, client_id)``.

    Returns:
        An integer in ``[0, 2**63)``, the same in every process and on every machine.

    Example:
        >>> derive_seed(0, "choose", 3) == derive_seed(0, "choose", 3)
        True
        >>> derive_seed(0, "choose", 3) == derive_seed(0, "choose", 4)
        False
    """
    # repr() keeps 1 and "1" apart; the separator keeps ("ab", "c") and ("a", "bc") apart.
    return _number(hashlib.sha256("\x1f".join(repr(key) for key in keys).encode()).digest())


def derive_seeds(*keys: int | str, each: Iterable[int | str]) -> Iterator[int]:
    """``derive_seed(*keys, one)`` for each of many, in less than half of the time.

    Args:
        keys: what all have in common.
        each: the last keys.

    Example:
        >>> list(derive_seeds(0, "choose", each=[3])) == [derive_seed(0, "choose", 3)]
        True
    """
    begun = hashlib.sha256("".join(f"{key!r}\x1f" for key in keys).encode())
    for key in each:
        whole = begun.copy()
        whole.update(repr(key).encode())
        yield _number(whole.digest())


def _number(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big") >> 1


def choose(clients: Sequence[Client], rnd: Round) -> list[Client]:
    """Choose the clients of a round, uniformly without replacement.

    Args:
        clients: every client of the federation.
        rnd: the round; ``rnd.cohort`` clients are drawn.

    Returns:
        The chosen clients in the order of ``clients``.
    """
    if rnd.cohort >= len(clients):
        return list(clients)
    return _in_order(clients, _ranked(clients, rnd)[: rnd.cohort])


@dataclass(frozen=True)
class Sampling:
    """Who of the federation is there, and who answers in time.

    Clients of a cross-device federation come and go. The server chooses more of them than it needs
    and takes those that finish first, and a round ends at a deadline (Bonawitz et al., "Towards
    Federated Learning at Scale: System Design", MLSys 2019, arXiv 1902.01046). What a slow client
    has done by then can be used too (partial work: Li et al., "Federated Optimization in
    Heterogeneous Networks", FedProx, MLSys 2020, arXiv 1812.06127). The defaults are a federation
    in which all that are chosen answer.

    Args:
        availability: probability that a client can be reached in a round, above 0, at most 1.
        dropout: probability that a client is sent the adapter and never answers, from 0 to below 1.
        over_selection: share of ``trainer.clients_per_round`` that is chosen beyond it; of those
            that answer the first to finish count.
        deadline_steps: a round ends after the time of this many optimizer steps of a client of
            usual speed; None: it waits for all.
        slowness: spread of the clients' speed, from 0 to 10: an optimizer step takes client k
            ``exp(slowness * z_k)`` times as long as usual, with z_k standard normal, drawn once
            for the run.
        late: a client that is not done by the deadline is left out (``drop``) or sends what it has
            (``partial``).
    """

    availability: float = 1.0
    dropout: float = 0.0
    over_selection: float = 0.0
    deadline_steps: int | None = None
    slowness: float = 0.0
    late: Late = "drop"

    def validate(self) -> None:
        """Refuse values out of range and those that would have no effect.

        Raises:
            FedloraError: names the field.
        """
        # Ranges are asked for, not their opposites: NaN lies in none.
        deadline = 1 if self.deadline_steps is None else self.deadline_steps
        for name, fits, must in (
            ("availability", 0 < self.availability <= 1, "above 0 and at most 1"),
            ("dropout", 0 <= self.dropout < 1, "at least 0 and below 1"),
            ("over_selection", 0 <= self.over_selection < math.inf, "a number from 0 up"),
            ("deadline_steps", 1 <= deadline < math.inf, "at least 1"),
            ("slowness", 0 <= self.slowness <= MAX_SLOWNESS, f"from 0 to {MAX_SLOWNESS:g}"),
            ("late", self.late in get_args(Late), " or ".join(get_args(Late))),
        ):
            if not fits:
                got = getattr(self, name)
                raise FedloraError(f"trainer.sampling.{name} must be {must}, got {got}.")
        self._check_effect()

    def _check_effect(self) -> None:
        if self.deadline_steps is not None:
            return
        if self.late == "partial":
            raise FedloraError(
                "trainer.sampling.late=partial needs a deadline: nobody is late without one. Set "
                "trainer.sampling.deadline_steps, or leave late out."
            )
        if self.slowness and not self.over_selection:
            raise FedloraError(
                f"trainer.sampling.slowness={self.slowness} has no effect where a round waits for "
                "all. Set trainer.sampling.deadline_steps or over_selection, or leave it out."
            )


@dataclass(frozen=True)
class Absence:
    """A client that was looked for in a round, and whose answer does not count.

    Attributes:
        client: who.
        reason: "unavailable", "dropped out", "late" or "not needed".
        reached: whether the adapter was sent to it.
    """

    client: Client
    reason: str
    reached: bool


@dataclass(frozen=True)
class Plan:
    """Who plays in a round.

    Attributes:
        players: those that will answer, in the order of the federation.
        limits: client id -> most optimizer steps that it gets done; only players cut short.
        absent: the others that were looked for, in the order of the federation.
    """

    players: tuple[Client, ...]
    limits: Mapping[int, int]
    absent: tuple[Absence, ...]


def plan(
    clients: Sequence[Client], rnd: Round, sampling: Sampling, steps: Callable[[Client], int]
) -> Plan:
    """Choose the clients of a round and foretell which of them will answer.

    It is known before anybody trains whose work would be thrown away, so nobody does it.

    Args:
        clients: every client of the federation.
        rnd: the round; at most ``rnd.cohort`` clients play.
        sampling: who is there and who answers in time; valid.
        steps: optimizer steps that a client would take if it were let.

    Returns:
        The plan, which does not depend on the order of ``clients`` but for its own order; with
        ``Sampling()`` the players are those of :func:`choose`. It may have no players at all.
    """
    chosen, reasons = _reach(clients, rnd, sampling)
    finished: list[tuple[float, Client]] = []
    limits: dict[int, int] = {}
    for client in chosen:
        if _happens(sampling.dropout, rnd.seed, "drops out", rnd.idx, client.id):
            reasons[client.id] = "dropped out"
            continue
        time, limit = _finish(client, rnd.seed, sampling, steps(client))
        if limit == 0:
            reasons[client.id] = "late"
            continue
        finished.append((time, client))
        if limit is not None:
            limits[client.id] = limit
    finished.sort(key=lambda answer: answer[0])  # stable: among equals the ranking decides
    answers = [client for _, client in finished]
    reasons |= dict.fromkeys((client.id for client in answers[rnd.cohort :]), "not needed")
    return Plan(
        players=tuple(_in_order(clients, answers[: rnd.cohort])),
        limits={number: limit for number, limit in limits.items() if number not in reasons},
        absent=tuple(
            Absence(client, reasons[client.id], reached=reasons[client.id] != "unavailable")
            for client in clients
            if client.id in reasons
        ),
    )


def _ranked(clients: Sequence[Client], rnd: Round) -> list[Client]:
    """The clients as the round looks for them."""
    # Ranking each client by its own hash needs no generator and does not depend on list order.
    ids = (client.id for client in clients)
    hashes = list(derive_seeds(rnd.seed, "choose", rnd.idx, each=ids))
    return [clients[place] for place in sorted(range(len(clients)), key=hashes.__getitem__)]


def _in_order(clients: Sequence[Client], some: Sequence[Client]) -> list[Client]:
    kept = {client.id for client in some}
    return [client for client in clients if client.id in kept]


def _reach(
    clients: Sequence[Client], rnd: Round, sampling: Sampling
) -> tuple[list[Client], dict[int, str]]:
    """Those that are sent the adapter, by rank, and those passed over on the way to them."""
    # What was typed counts, not its binary neighbour: 100 * (1 + 0.1) is above 110.
    wanted = math.ceil(rnd.cohort * (1 + Fraction(str(sampling.over_selection))))
    chosen: list[Client] = []
    missed: dict[int, str] = {}
    for client in _ranked(clients, rnd):
        if len(chosen) == wanted:
            break
        if _happens(sampling.availability, rnd.seed, "is available", rnd.idx, client.id):
            chosen.append(client)
        else:
            missed[client.id] = "unavailable"
    return chosen, missed


def _finish(client: Client, seed: int, sampling: Sampling, steps: int) -> tuple[float, int | None]:
    """When a client finishes, in steps of usual speed, and its limit: None where it gets all done.

    A client that sends what it has by the deadline works until then.
    """
    pace = 1.0
    if sampling.slowness:
        normal = NormalDist().inv_cdf(max(_uniform(seed, "speed", client.id), 2.0**-54))
        pace = math.exp(sampling.slowness * normal)
    deadline = sampling.deadline_steps
    if deadline is None:
        return steps * pace, None
    # Compared in whole steps: as times, rounding could make a client late that loses no step.
    done = math.floor(deadline / pace)
    if done >= steps:
        return steps * pace, None
    return deadline, done if sampling.late == "partial" else 0


def _uniform(*keys: int | str) -> float:
    """A number in [0, 1) of 53 bits; all 63 would round up to 1."""
    return (derive_seed(*keys) >> 10) / 2**53


def _happens(probability: float, *keys: int | str) -> bool:
    """Whether something of a probability happens; what is certain is not drawn."""
    return probability > 0 and (probability >= 1 or _uniform(*keys) < probability)
