"""What a rule is: one abstract method, every other has a default."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from fedlora.errors import FedloraError
from fedlora.flat import as_one, split
from fedlora.state import PARTS, AdapterState, Client, ClientUpdate, Part, Residual, Round

Factors = Literal["step", "corrected", "anew"]


class Aggregator(ABC):
    """A published way to average adapters.

    ``start`` and ``aggregate`` are called on rank 0, in client order; the other methods also where
    a client plays, which may be another process: state that they use must be in ``state_dict``,
    which is told to all before each round. ``updates`` is produced while clients play, so a rule
    that consumes it as a stream uses constant memory. A rule edits none of its arguments, and
    commits state of its own only after the last update was consumed.

    Attributes:
        exact: what is served after a round is ``sum_k p_k (R_k + s_k B_k A_k)``: promised here,
            checked by :func:`fedlora.testing.check_aggregator`.
        mixed_ranks: clients may have different ranks; others are refused before the run.
        factors: what the new factors are to the old ones: a ``step`` from them, entry by entry; a
            step with a residual that corrects just that step (``corrected``); or made ``anew`` in
            other coordinates, so that nothing learned about the old entries holds for the new.

    Example:
        >>> class First(Aggregator):
        ...     def aggregate(self, server, updates, rnd):
        ...         return next((update.adapter for update in updates if update.weight), server)
    """

    exact: bool = False
    mixed_ranks: bool = False
    factors: Factors = "step"

    @property
    def name(self) -> str:
        """As it is called in messages."""
        return type(self).__name__

    @abstractmethod
    def aggregate(
        self, server: AdapterState, updates: Iterable[ClientUpdate], rnd: Round
    ) -> AdapterState:
        """The next global adapter.

        Args:
            server: the global adapter that this round started from.
            updates: one per client, in client order, produced while clients play.
            rnd: the round.

        Returns:
            A whole adapter state.
        """

    def start(self, server: AdapterState, base: Mapping[str, Tensor], rnd: Round) -> AdapterState:
        """Called once before the first round; may look at the frozen weights ``base``."""
        return server

    def distribute(self, server: AdapterState, client: Client, rnd: Round) -> AdapterState:
        """What travels to a client; the rest of ``server`` it knows already.

        The shared parts, cut to the client's rank, and of the residual as much as it lacks. What a
        run starts from, drawn from the seed or an adapter from a file, counts as known to all.
        """
        return beside(server.only(self.shared(rnd)), server, client, rnd)

    def receive(self, had: AdapterState, down: AdapterState, rnd: Round) -> AdapterState:
        """What a client makes of what it has and what came; override for what it works out itself.

        In one process the engine loads the server's adapter, which this must give, to the bit.

        Args:
            had: what it knew since it was last sent something, or what the run started from.
            down: of :meth:`distribute`.
            rnd: the round.

        Returns:
            The factors and head that came, else those it had; the residual that came whole, else
            its own with what was added.
        """
        residual = dict(had.residual)
        for name, change in down.added.items():
            old = residual.get(name)
            residual[name] = change if old is None else old.add(change)
        return replace(down.over(had), residual={**residual, **down.residual}, added={})

    def trainable(self, rnd: Round) -> frozenset[Part]:
        """The parts that clients train in this round."""
        return PARTS

    def shared(self, rnd: Round) -> frozenset[Part]:
        """The parts that travel; what is trained but not shared stays with its client."""
        return self.trainable(rnd)

    def private(self, rnd: Round) -> frozenset[Part]:
        """The parts of which something stays: each client then has a model of its own."""
        return self.trainable(rnd) - self.shared(rnd)

    def stays(self, trained: AdapterState, rnd: Round) -> AdapterState:
        """What of all that it trained stays with its client, in one of the private parts.

        It is kept there until the client plays again, and no rule ever sees it.
        """
        return trained.only(self.private(rnd))

    def upload(
        self, sent: AdapterState, trained: AdapterState, client: Client, rnd: Round
    ) -> AdapterState:
        """What leaves the client; called there, before anything does."""
        return trained.only(self.shared(rnd))

    def state_dict(self) -> dict[str, Any]:
        """Server state such as momenta: tensors, numbers, dicts; never anything of one client."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027  (a default: no state)
        """The inverse of :meth:`state_dict`."""


def turns(rnd: Round) -> tuple[Round, Round]:
    """This round and the next: a rule whose parts take turns names others in them."""
    return rnd, replace(rnd, idx=rnd.idx + 1)


def beside(down: AdapterState, server: AdapterState, client: Client, rnd: Round) -> AdapterState:
    """``down`` cut to the client's rank, with what the client lacks of the server's residual.

    A client that was sent the residual in the round before needs only what that round added; one
    that was not, the whole, and so does everyone where that is smaller.
    """
    whole, added = (
        sum(change.nbytes for change in part.values()) for part in (server.residual, server.added)
    )
    last = client.last_round if rnd.idx else -1  # all know what the run starts from
    follows = last is not None and last == rnd.idx - 1
    down = down.cut(client.rank, client.scale)
    if follows and added < whole:
        return replace(down, added=server.added)
    return replace(down, residual=server.residual)


class WeightedMean(Aggregator):
    """The mean of what the clients send, each tensor apart, weighted by ``update.weight``.

    Streams: memory does not grow with clients. Sums are float64 and divided once at the end.

    Attributes:
        averaged: the parts that it is the mean of; of the others it leaves the server's.
    """

    averaged: frozenset[Part] = PARTS

    def aggregate(
        self, server: AdapterState, updates: Iterable[ClientUpdate], rnd: Round
    ) -> AdapterState:
        """The weighted mean over ``server``; ``server`` itself where no weight is above zero.

        Raises:
            FedloraError: when a client sends tensors of other names than the one before, or of
                other shapes than the server has.
        """
        total = 0.0
        known = _shapes(dict(server.tensors()))
        tensors: dict[str, Tensor] = {}
        sums: Tensor | None = None  # end to end: more tensors would take longer, more entries not
        for update in updates:
            if update.weight == 0:
                continue
            now = dict(update.payload.only(self.averaged).tensors())
            if _shapes(now) != {name: known.get(name) for name in tensors or now}:
                raise FedloraError(
                    f"{type(self).__name__} takes the mean of tensors of one shape, but "
                    f"{update.client} sent other names or shapes than the server or the client "
                    "before. Give all clients the server's rank."
                )
            tensors = {name: now[name] for name in tensors or now}  # in the order of the first
            if tensors:
                term = as_one([*tensors.values()])
                if sums is None:
                    sums = torch.zeros_like(term, dtype=torch.float64)
                sums.add_(term, alpha=update.weight)
            total += update.weight
        means: dict[str, Tensor] = {}
        if sums is not None:
            parts = split(sums / total, [tensor.shape for tensor in tensors.values()])
            each = zip(tensors.items(), parts, strict=True)
            means = {name: part.to(tensor.dtype) for (name, tensor), part in each}
        mean = AdapterState.from_tensors(means).over(server)
        return replace(mean, added={})  # the residual stayed as it was


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


class ProductMean:
    """Collects the weighted mean of the products s_k B_k A_k of a stream that others consume.

    A product is kept thin or dense, whichever is smaller, so memory is bounded by the dense
    weights however many clients there are.
    """

    def __init__(self) -> None:
        self._total = 0.0
        self._sums: dict[str, Residual] = {}

    def watch(self, updates: Iterable[ClientUpdate]) -> Iterator[ClientUpdate]:
        """Pass the updates on, adding up their products.

        Raises:
            FedloraError: when two clients send factors of other layers.
        """
        layers: tuple[set[str], ...] | None = None
        for update in updates:
            adapter, sent = update.adapter, (set(update.payload.A), set(update.payload.B))
            layers = layers or sent
            if sent != layers:
                raise FedloraError(
                    f"{update.client} sent factors of other layers than the client before. Adapt "
                    "the same layers on all clients."
                )
            for name in adapter.A if update.weight else ():
                term = product(adapter, name, update.weight)
                old = self._sums.get(name)
                self._sums[name] = term if old is None else old.add(term)
            self._total += update.weight
            yield update

    def mean(self) -> dict[str, Residual]:
        """Module path -> mean of the products, float64."""
        return {name: Residual(s.U / self._total, s.V) for name, s in self._sums.items()}

    def minus(self, adapter: AdapterState) -> dict[str, Residual]:
        """Module path -> mean of the products minus the product of ``adapter``, float64."""
        return {name: m.add(product(adapter, name, -1.0)) for name, m in self.mean().items()}


def product(adapter: AdapterState, name: str, weight: float = 1.0) -> Residual:
    """``weight * s * B A`` of one layer as a thin residual in float64."""
    scale = weight * adapter.scaling[name]
    return Residual(adapter.B[name].to(torch.float64) * scale, adapter.A[name].to(torch.float64))


def grown(
    server: AdapterState, after: AdapterState, changes: Mapping[str, Residual]
) -> AdapterState:
    """``after`` serving the residual of ``server`` and ``changes`` beside its factors.

    A client that has the residual of ``server`` gets to the same bits with what was added.
    """
    residual, added = dict(server.residual), {}
    for name, change in changes.items():
        added[name] = new = change.to(after.A[name].dtype)
        old = residual.get(name)
        residual[name] = new if old is None else old.add(new)
    return replace(after, residual=residual, added=added)


def check_least(name: str, value: float | None, least: float) -> None:
    """Refuse an argument of a rule that is too small; None is none.

    Raises:
        FedloraError: names the argument and the least value.
    """
    if value is not None and not value >= least:  # NaN is too small, too
        raise FedloraError(f"aggregator.{name} must be {least:g} or above, got {value}.")
