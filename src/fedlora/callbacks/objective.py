"""What clients minimise besides their loss: callbacks on lanes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedlora.aggregation import Aggregator
from fedlora.aggregation.base import turns
from fedlora.callbacks.base import FederatedCallback
from fedlora.errors import FedloraError
from fedlora.state import Client, Round

if TYPE_CHECKING:
    from fedlora.engines.lane import Lane


@dataclass(frozen=True)
class Setting:
    """What an objective is used with.

    Attributes:
        rule: what averages the clients.
        rnd: the first round.
        clients: every client of the federation.
        rank: LoRA rank of the server; 0 without LoRA.
        optimizer: one as each client makes it.
        clip: trainer.gradient_clip_val.
        precision: of the forward and backward pass.
    """

    rule: Aggregator
    rnd: Round
    clients: Sequence[Client]
    rank: int
    optimizer: torch.optim.Optimizer
    clip: float | None
    precision: str


class Objective(FederatedCallback):
    """Changes what clients minimise, in ``trainer.callbacks``.

    The engine trains each client in a *lane* and calls the three hooks below with it. Whatever is
    said of a client is on its lane, never in the objective, which all clients share: ``memory``
    stays with the client, ``extra`` travels to the server and arrives in ``update.extra``.

    Attributes:
        own_model: each client trains a model of its own in a second lane, on which this objective
            acts; others act on the first, whose result is averaged.
    """

    own_model: bool = False

    def check(self, setting: Setting) -> None:
        """Refuse what this objective cannot be used with.

        Raises:
            FedloraError: says why, and what to use instead.
        """

    def download(self, client: Client, shared: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What the server sends to a client beside the adapter; counted as traffic.

        Args:
            client: whom to.
            shared: the parameters that clients train in this round and the server averages.
        """
        return {}

    def sent(self, shared: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Tensors of the names and shapes that a client puts into ``extra``."""
        return {}

    def remembered(self, shared: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Tensors of the names and shapes that a client remembers.

        Args:
            shared: the parameters that the server averages.
        """
        return {}

    def on_lane_start(self, lane: Lane) -> None:
        """Called before the first step."""

    def on_lane_gradients(self, lane: Lane) -> None:
        """Called before each step, to edit the gradients; clipping comes after it."""

    def on_lane_end(self, lane: Lane) -> None:
        """Called after the last step."""


def check_objectives(objectives: Sequence[Objective], setting: Setting) -> None:
    """Refuse objectives that do not go together, or not with the rest.

    Raises:
        FedloraError: says why, and what to do.
    """
    for own in (False, True):
        names = [type(each).__name__ for each in objectives if each.own_model == own]
        if len(names) > 1:
            raise FedloraError(
                f"trainer.callbacks has {' and '.join(names)}: both change the same gradients, so "
                "neither would be what was published. Leave one out."
            )
    for objective in objectives:
        objective.check(setting)


def check_averaged(name: str, setting: Setting) -> None:
    """Refuse a rule under which there is no common model.

    Raises:
        FedloraError: names the rule.
    """
    if not any(setting.rule.shared(now) for now in turns(setting.rnd)):
        raise FedloraError(
            f"{name} keeps clients near the server's model, and under "
            f"{setting.rule.name} there is none: nothing is averaged. Leave it out, or "
            "set trainer.averaging.aggregator to another rule."
        )
