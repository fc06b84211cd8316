"""What a wrapper is: a rule around a rule, which does as that does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from fedlora.aggregation.base import Aggregator
from fedlora.aggregation.fedavg import FedAvg
from fedlora.state import AdapterState, Client, ClientUpdate, Part, Round


class Wrapper(Aggregator):
    """Does in everything as the rule in it; a subclass overrides what it changes.

    A subclass that shares less than its rule changes ``distribute``, ``receive``, ``upload`` and
    ``stays`` as well, since those of the rule know nothing of it:
    :class:`~fedlora.aggregation.Local` is one. Wrappers go around each other, too.

    Args:
        rule: what it goes around; None means :class:`~fedlora.aggregation.FedAvg`.

    Example:
        >>> class Doubled(Wrapper):
        ...     def aggregate(self, server, updates, rnd):
        ...         mean = super().aggregate(server, updates, rnd)
        ...         far = {name: 2 * B - server.B[name] for name, B in mean.B.items()}
        ...         return replace(mean, B=far)
        >>> Doubled().name
        'Doubled(FedAvg)'
    """

    def __init__(self, rule: Aggregator | None = None) -> None:
        self.rule = FedAvg() if rule is None else rule
        self.exact = self.rule.exact
        self.mixed_ranks = self.rule.mixed_ranks
        self.factors = self.rule.factors

    @property
    def name(self) -> str:
        """With the rule in it, as ``FedAdam(FFALoRA)``."""
        return f"{type(self).__name__}({self.rule.name})"

    def __str__(self) -> str:
        """The same."""
        return self.name

    def start(self, server: AdapterState, base: Mapping[str, Tensor], rnd: Round) -> AdapterState:
        """As the rule starts."""
        return self.rule.start(server, base, rnd)

    def distribute(self, server: AdapterState, client: Client, rnd: Round) -> AdapterState:
        """What the rule sends to a client."""
        return self.rule.distribute(server, client, rnd)

    def receive(self, had: AdapterState, down: AdapterState, rnd: Round) -> AdapterState:
        """What a client makes of it under the rule."""
        return self.rule.receive(had, down, rnd)

    def trainable(self, rnd: Round) -> frozenset[Part]:
        """What clients train under the rule."""
        return self.rule.trainable(rnd)

    def shared(self, rnd: Round) -> frozenset[Part]:
        """What travels under the rule."""
        return self.rule.shared(rnd)

    def private(self, rnd: Round) -> frozenset[Part]:
        """Of which parts something stays under the rule."""
        return self.rule.private(rnd)

    def stays(self, trained: AdapterState, rnd: Round) -> AdapterState:
        """What stays with its client under the rule."""
        return self.rule.stays(trained, rnd)

    def upload(
        self, sent: AdapterState, trained: AdapterState, client: Client, rnd: Round
    ) -> AdapterState:
        """What leaves the client under the rule."""
        return self.rule.upload(sent, trained, client, rnd)

    def aggregate(
        self, server: AdapterState, updates: Iterable[ClientUpdate], rnd: Round
    ) -> AdapterState:
        """What the rule makes of the updates."""
        return self.rule.aggregate(server, updates, rnd)

    def state_dict(self) -> dict[str, Any]:
        """The rule's state; a subclass puts its own beside it."""
        return {"rule": self.rule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.rule.load_state_dict(state["rule"])
