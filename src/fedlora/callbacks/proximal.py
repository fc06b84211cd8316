"""FedProx: clients are held near the server's model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedlora.callbacks.objective import Objective, Setting, check_averaged
from fedlora.errors import FedloraError

if TYPE_CHECKING:
    from fedlora.engines.lane import Lane


class FedProx(Objective):
    """Adds ``mu / 2 ||w - w_t||^2`` to the loss of each client.

    From Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, arXiv
    1812.06127. w is what a client trains and the server averages, w_t what the server sent. What
    stays with a client (FedSA-LoRA's B, a local head) is not held. The penalty is of the factors as
    they are, not of their product.

    Args:
        mu: strength, from 0, which is plain training.

    Raises:
        FedloraError: for a negative mu.
    """

    def __init__(self, mu: float = 0.01) -> None:
        self.mu = check_strength("FedProx.mu", mu)

    def check(self, setting: Setting) -> None:
        """Refuse a rule that averages nothing."""
        check_averaged("FedProx", setting)

    def on_lane_gradients(self, lane: Lane) -> None:
        """Add ``mu (w - w_t)``."""
        pull(lane, self.mu)


def pull(lane: Lane, strength: float) -> None:
    """Add ``strength * (w - anchor)`` to the gradients of a lane."""
    if strength == 0:
        return
    for name, anchor in lane.anchor.items():
        parameter = lane.parameters[name]
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - anchor, alpha=strength)


def check_strength(name: str, value: float) -> float:
    """A strength, refused below 0.

    Raises:
        FedloraError: names the argument.
    """
    if not 0 <= value < float("inf"):
        raise FedloraError(f"{name} must be a number from 0, got {value}.")
    return value
