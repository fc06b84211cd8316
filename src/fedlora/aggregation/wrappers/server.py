"""Server optimizers: the mean is where a step leads to, and the step is taken with a memory."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fedlora.aggregation.base import Aggregator, turns
from fedlora.aggregation.wrappers.base import Wrapper
from fedlora.errors import FedloraError
from fedlora.state import AdapterState, ClientUpdate, Round

STATISTICS = ("running_mean", "running_var")  # counts of batches are whole numbers
Memory = dict[str, Tensor]  # of one tensor: what is remembered, by name


class ServerOptimizer(Wrapper):
    """An optimizer on the server, for which a round's change is the gradient.

    Per tensor, ``D`` is what the rule makes of the round minus the server's, and the server goes
    ``w <- w + lr * direction(D)`` (Reddi et al., "Adaptive Federated Optimization", ICLR 2021,
    arXiv 2003.00295, algorithm 2). Only tensors that clients sent in this round take a step: a
    factor that is frozen stays as it is, and so does what is remembered of it. Running statistics
    of normalisation layers take their mean: after a step a variance might be below zero. What is
    remembered is float64, and under the tensors' names, since rounds may train other factors.

    Args:
        rule: what makes the change; None means FedAvg. Its new factors must be a step from the old
            ones, with nothing beside them.
        lr: length of a step.

    Raises:
        FedloraError: for a rule that this cannot go around, and numbers out of range.
    """

    def __init__(self, rule: Aggregator | None = None, lr: float = 1.0) -> None:
        super().__init__(rule)
        _check_rule(self)
        _check_above_zero("lr", lr)
        self.lr = lr
        self.exact = False
        self._memory: dict[str, Memory] = {}

    def start(self, server: AdapterState, base: Mapping[str, Tensor], rnd: Round) -> AdapterState:
        """As the rule starts; what another run left is forgotten."""
        self._memory = {}
        return super().start(server, base, rnd)

    @abstractmethod
    def direction(self, change: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Where to go for a change, and what to remember instead; edits nothing.

        Args:
            change: D of one tensor, float64.
            memory: what was remembered of it; empty before its first step.

        Returns:
            The step in units of ``lr``, and the new memory.
        """

    def aggregate(
        self, server: AdapterState, updates: Iterable[ClientUpdate], rnd: Round
    ) -> AdapterState:
        """The server's adapter after one step towards what the rule makes of the updates."""
        sent: set[str] = set()
        watched = _names(updates, sent)
        mean = super().aggregate(server, watched, rnd)
        for _ in watched:  # a rule may stop early; nothing is remembered before the last was read
            pass
        tensors, before = dict(mean.tensors()), dict(server.tensors())
        memory = dict(self._memory)
        for name in [n for n, t in tensors.items() if n in sent and _takes_steps(n, t)]:
            old = before[name].double()
            step, memory[name] = self.direction(
                tensors[name].double() - old, self._memory.get(name, {})
            )
            tensors[name] = (old + self.lr * step).to(before[name].dtype)
        self._memory = memory
        return AdapterState.from_tensors(tensors).over(mean)

    def state_dict(self) -> dict[str, Any]:
        """What is remembered of each tensor, beside the rule's state."""
        memory = {name: dict(values) for name, values in self._memory.items()}
        return {**super().state_dict(), "memory": memory}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        super().load_state_dict(state)
        self._memory = {name: dict(values) for name, values in state["memory"].items()}


class FedAvgM(ServerOptimizer):
    """Momentum on the server: ``v <- momentum * v + D``, ``w <- w + lr * v``.

    Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification", 2019, arXiv 1909.06335, section 4.3. With momentum 0 and lr 1 it is the rule
    alone.

    Args:
        rule: what makes the change D; None means FedAvg.
        lr: length of a step.
        momentum: share of the last direction that is kept, from 0 to below 1. In the long run steps
            are 1 / (1 - momentum) times as long: lower ``lr`` with it.
    """

    def __init__(
        self, rule: Aggregator | None = None, lr: float = 1.0, momentum: float = 0.9
    ) -> None:
        super().__init__(rule, lr)
        _check_share("momentum", momentum)
        self.momentum = momentum

    def direction(self, change: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The change, and what is left of those before."""
        v = change + self.momentum * memory["v"] if memory else change
        return v, {"v": v}


class FedAdam(ServerOptimizer):
    """Adam on the server: the step is ``lr * m / (sqrt(v) + tau)``, entry by entry.

    ``m <- beta1 m + (1 - beta1) D`` from 0 and ``v <- beta2 v + (1 - beta2) D^2`` from ``tau^2``,
    without a correction of bias (Reddi et al., ICLR 2021, arXiv 2003.00295, algorithm 2).

    Args:
        rule: what makes the change D; None means FedAvg.
        lr: length of a step; an entry moves by about as much in a round, so small.
        beta1: share of m that is kept, from 0 to below 1.
        beta2: share of v that is kept, from 0 to below 1.
        tau: above 0; the smaller, the more alike are the steps of all entries.
    """

    def __init__(
        self,
        rule: Aggregator | None = None,
        lr: float = 0.01,
        beta1: float = 0.9,
        beta2: float = 0.99,
        tau: float = 1e-3,
    ) -> None:
        super().__init__(rule, lr)
        _check_share("beta1", beta1)
        _check_share("beta2", beta2)
        _check_above_zero("tau", tau)
        self.beta1 = beta1
        self.beta2 = beta2
        self.tau = tau

    def direction(self, change: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The mean of the last changes over their size."""
        m = (1 - self.beta1) * change
        if memory:
            m += self.beta1 * memory["m"]
        v = self.second(memory["v"] if memory else _tau_squared(change, self.tau), change.square())
        return m / (v.sqrt() + self.tau), {"m": m, "v": v}

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """The new v, of the old one and ``D^2``."""
        return self.beta2 * v + (1 - self.beta2) * square


class FedYogi(FedAdam):
    """Yogi on the server: Adam whose v follows slowly where changes get smaller.

    ``v <- v - (1 - beta2) D^2 sign(v - D^2)``, else as :class:`FedAdam` (Reddi et al., ICLR 2021,
    arXiv 2003.00295, algorithm 2). It takes FedAdam's arguments.
    """

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """The new v, of the old one and ``D^2``."""
        return v - (1 - self.beta2) * square * (v - square).sign()


class FedAdagrad(ServerOptimizer):
    """Adagrad on the server: ``v <- v + D^2``, the step is ``lr * D / (sqrt(v) + tau)``.

    v goes on from ``tau^2`` and only grows (Reddi et al., ICLR 2021, arXiv 2003.00295, algorithm 2,
    with beta1 = 0).

    Args:
        rule: what makes the change D; None means FedAvg.
        lr: length of a step; an entry moves by about as much in the first round.
        tau: above 0; the smaller, the more alike are the steps of all entries.
    """

    def __init__(self, rule: Aggregator | None = None, lr: float = 0.01, tau: float = 1e-3) -> None:
        super().__init__(rule, lr)
        _check_above_zero("tau", tau)
        self.tau = tau

    def direction(self, change: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The change over the size of all so far."""
        v = (memory["v"] if memory else _tau_squared(change, self.tau)) + change.square()
        return change / (v.sqrt() + self.tau), {"v": v}


def _tau_squared(like: Tensor, tau: float) -> Tensor:
    return torch.full_like(like, tau**2)


def _names(updates: Iterable[ClientUpdate], names: set[str]) -> Iterator[ClientUpdate]:
    """Pass the updates on, noting what those with weight sent."""
    for update in updates:
        if update.weight:
            names.update(name for name, _ in update.payload.tensors())
        yield update


def _takes_steps(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not name.endswith(STATISTICS)


def _check_rule(wrapper: ServerOptimizer) -> None:
    """Refuse a rule whose result is no step that could be taken otherwise."""
    rule = wrapper.rule
    reasons = {
        "corrected": "makes a residual for the very means that this would not go to",
        "anew": "makes its factors anew, so that their difference to the old ones is no direction",
    }
    if rule.factors != "step":
        raise FedloraError(
            f"{wrapper.name} cannot be: {rule.name} {reasons[rule.factors]}. Put "
            f"{type(wrapper).__name__} around FedAvg, FFALoRA or RoLoRA, or use {rule.name} alone."
        )
    if not any(rule.shared(now) for now in turns(Round(0))):
        raise FedloraError(
            f"{wrapper.name} cannot be: under {rule.name} nothing is averaged, so there is no step "
            f"to take. Put {type(wrapper).__name__} around FedAvg, or use {rule.name} alone."
        )
    while isinstance(rule, Wrapper):
        if isinstance(rule, ServerOptimizer):
            raise FedloraError(
                f"{wrapper.name} cannot be: the server takes one step a round. Use one of "
                f"{type(wrapper).__name__} and {type(rule).__name__}."
            )
        rule = rule.rule


def _check_above_zero(name: str, value: float) -> None:
    if not 0 < value < math.inf:  # NaN is neither
        raise FedloraError(f"aggregator.{name} must be above 0 and finite, got {value}.")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise FedloraError(f"aggregator.{name} must be from 0 to below 1, got {value}.")
