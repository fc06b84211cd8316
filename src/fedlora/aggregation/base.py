"""What a rule is: one abstract method, every other has a default."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedlora.state import PARTS, AdapterState, Client, ClientUpdate, Part, Residual, Round


class Aggregator(ABC):
    """A published way to average adapters.

    Called on rank 0, in client order. ``updates`` is produced while clients play, so a rule that
    consumes it as a stream uses constant memory. A rule edits none of its arguments, and commits
    state of its own only after the last update was consumed.

    Example:
        >>> class First(Aggregator):
        ...     def aggregate(self, server, updates, rnd):
        ...         return next(iter(updates)).adapter
    """

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
        """What travels to a client; the rest of ``server`` it knows already (from the seed)."""
        return replace(server.only(self.shared(rnd)), residual=server.residual)

    def trainable(self, rnd: Round) -> frozenset[Part]:
        """The parts that clients train in this round."""
        return PARTS

    def shared(self, rnd: Round) -> frozenset[Part]:
        """The parts that travel; what is trained but not shared stays with its client."""
        return self.trainable(rnd)

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


class WeightedMean(Aggregator):
    """The mean of what the clients send, each tensor apart, weighted by ``update.weight``.

    Streams: memory does not grow with clients. Sums are float64 and divided once at the end.
    """

    def aggregate(
        self, server: AdapterState, updates: Iterable[ClientUpdate], rnd: Round
    ) -> AdapterState:
        """The weighted mean over ``server``; ``server`` itself where no weight is above zero.

        Raises:
            ValueError: when two clients send tensors of other names or shapes.
        """
        total = 0.0
        sums: dict[str, Tensor] = {}
        dtypes: dict[str, torch.dtype] = {}
        for update in updates:
            if update.weight == 0:
                continue
            tensors = dict(update.payload.tensors())
            if sums and _shapes(tensors) != _shapes(sums):
                raise ValueError(
                    f"{type(self).__name__} takes the mean of tensors of one shape, but "
                    f"{update.client} sent other names or shapes than the client before. Give all "
                    "clients one rank."
                )
            for name, tensor in tensors.items():
                term = tensor.double() * update.weight
                sums[name] = term if name not in sums else sums[name].add_(term)
                dtypes[name] = tensor.dtype
            total += update.weight
        means: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}, "other": {}}
        for name, value in sums.items():
            part, path = name.split("/", 1)
            means[part][path] = (value / total).to(dtypes[name])
        return AdapterState(means["A"], means["B"], means["other"]).over(server)


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
        """Pass the updates on, adding up their products."""
        for update in updates:
            adapter = update.adapter
            for name in adapter.A if update.weight else ():
                term = product(adapter, name, update.weight)
                old = self._sums.get(name)
                self._sums[name] = term if old is None else old.add(term)
            self._total += update.weight
            yield update

    def minus(self, adapter: AdapterState) -> dict[str, Residual]:
        """Module path -> mean of the products minus the product of ``adapter``, float64."""
        return {
            name: Residual(total.U / self._total, total.V).add(product(adapter, name, -1.0))
            for name, total in self._sums.items()
        }


def product(adapter: AdapterState, name: str, weight: float = 1.0) -> Residual:
    """``weight * s * B A`` of one layer as a thin residual in float64."""
    scale = weight * adapter.scaling[name]
    return Residual(adapter.B[name].to(torch.float64) * scale, adapter.A[name].to(torch.float64))
