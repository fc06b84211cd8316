"""Ditto: beside the common model each client trains one of its own, held near it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedlora.aggregation.base import turns
from fedlora.callbacks.objective import Objective, Setting, check_averaged
from fedlora.callbacks.proximal import check_strength, pull
from fedlora.errors import FedloraError

if TYPE_CHECKING:
    from fedlora.engines.lane import Lane


class Ditto(Objective):
    """Each client keeps v_k, trained with ``v_k <- v_k - eta (grad F_k(v_k) + lam (v_k - w_t))``.

    From Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021,
    arXiv 2012.04221, algorithm 1. A client that plays trains twice on the same batches: the common
    model from w_t, which is averaged as without Ditto to the bit, then v_k, with the same
    optimizer, epochs and steps. v_k starts from the w_t of the first round that the client plays
    in, stays whole with it, and is what is evaluated and exported for it; a client that never
    played is served the common model. A round costs twice the training and no traffic.

    Args:
        lam: how strongly v_k is held near w_t; 0 is training alone.

    Raises:
        FedloraError: for a negative lam.
    """

    own_model = True

    def __init__(self, lam: float = 0.1) -> None:
        self.lam = check_strength("Ditto.lam", lam)

    def check(self, setting: Setting) -> None:
        """Refuse rules without a common model whose factors v_k can be compared with."""
        check_averaged("Ditto", setting)
        rule, name = setting.rule, setting.rule.name
        if any(rule.private(now) for now in turns(setting.rnd)):
            raise FedloraError(
                f"{name} gives each client a model of its own already, so Ditto would be a second "
                "one. Leave one of them out."
            )
        if rule.factors != "step":
            raise FedloraError(
                f"Ditto holds a client's own factors near the server's, and {name} makes those "
                "anew, or corrects them by a residual that is no client's own. Use FedAvg, "
                "FFALoRA or RoLoRA with it."
            )

    def on_lane_gradients(self, lane: Lane) -> None:
        """Add ``lam (v_k - w_t)``."""
        pull(lane, self.lam)
