"""Clients of unequal LoRA ranks: who trains which, and which rules can average them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, get_args

from fedlora.aggregation import RULES
from fedlora.errors import FedloraError
from fedlora.sampling import derive_seed
from fedlora.state import Client

if TYPE_CHECKING:
    from fedlora.aggregation import Aggregator
    from fedlora.modules.config import LoRAConfig

Ranks = int | list[int] | dict[int, float]
Alpha = Literal["scaled", "fixed"]


def assign_ranks(
    clients: Sequence[Client],
    ranks: Ranks | None,
    config: LoRAConfig,
    rule: Aggregator,
    seed: int,
    alpha: Alpha = "scaled",
) -> list[Client]:
    """Give each client the rank that it trains.

    Args:
        clients: every client of the federation.
        ranks: one rank for all; one for each client, in their order; or rank -> share of the
            clients, who gets which being drawn from the seed. None: all train the server's.
        config: the server's rank, the largest that a client can have, and scaling.
        rule: what averages them.
        seed: of the run.
        alpha: ``scaled``: lora_alpha grows with the rank, so that all scale alike; ``fixed``: one
            lora_alpha for all, so that a client of rank r_k scales by lora_alpha / r_k.

    Raises:
        FedloraError: for ranks that cannot be, and for a rule that needs equal ones.
    """
    if alpha not in get_args(Alpha):
        raise FedloraError(f"trainer.client_alpha should be scaled or fixed but got {alpha!r}.")
    if ranks is None and alpha == "fixed":
        raise FedloraError(
            "trainer.client_alpha=fixed is about clients of other ranks than the server: set "
            "trainer.client_ranks, or leave it out."
        )
    reason = _no_one_rank(config)
    if reason:
        if ranks is not None:
            raise FedloraError(f"trainer.client_ranks cannot be used here: {reason}. Leave it out.")
        return list(clients)
    given = [config.r] * len(clients) if ranks is None else _listed(ranks, clients, seed)
    wrong = [rank for rank in given if not (isinstance(rank, int) and 1 <= rank <= config.r)]
    if wrong:
        raise FedloraError(
            f"trainer.client_ranks must be whole numbers from 1 to model.lora.r={config.r}, got "
            f"{wrong[0]}. Change it, or set model.lora.r to the largest."
        )
    if not rule.mixed_ranks and any(rank != config.r for rank in given):
        able = ", ".join(name for name, known in RULES.items() if known.mixed_ranks)
        raise FedloraError(
            f"{rule.name} needs the server's rank, model.lora.r={config.r}, on all "
            "clients: trainer.client_ranks has others. Set model.lora.r where all are to have one "
            f"rank, else trainer.averaging.aggregator to one of {able}."
        )
    power = 0.5 if config.use_rslora else 1.0
    return [
        replace(
            client,
            rank=rank,
            scale=1.0 if alpha == "scaled" else (config.r / rank) ** power,
        )
        for client, rank in zip(clients, given, strict=True)
    ]


def _no_one_rank(config: LoRAConfig) -> str:
    """Why no single number says what rank a client has; empty where one does."""
    if not config.enabled:
        return "it is about LoRA, which is off (lora.enabled=false)"
    if {"encoder", "classifier"} <= set(config.target_components):
        return "the head has a rank of its own beside the encoder's (lora.target_components)"
    return ""


def _listed(ranks: Ranks, clients: Sequence[Client], seed: int) -> list[int]:
    if isinstance(ranks, Mapping):
        return _drawn(ranks, clients, seed)
    if not isinstance(ranks, Sequence):
        return [ranks] * len(clients)
    if len(ranks) != len(clients):
        raise FedloraError(
            f"trainer.client_ranks lists {len(ranks)} ranks for {len(clients)} clients. Give one "
            "for each, one for all, or shares such as '{4: 0.5, 8: 0.5}'."
        )
    return list(ranks)


def _drawn(shares: Mapping[int, float], clients: Sequence[Client], seed: int) -> list[int]:
    """Each rank for its share of the clients, to the nearest client."""
    numbers = all(isinstance(share, int | float) and share >= 0 for share in shares.values())
    reached = list(accumulate(shares.values(), initial=0.0)) if numbers else [0.0]
    total = reached[-1]
    if not 0 < total < math.inf:
        raise FedloraError(
            "trainer.client_ranks must give ranks shares, none below 0 and one above, such as "
            f"'{{4: 0.5, 8: 0.5}}', got {dict(shares)}."
        )
    order = sorted(clients, key=lambda client: derive_seed(seed, "rank", client.id))
    found: dict[int, int] = {}
    for rank, share in zip(shares, reached[1:], strict=True):
        for client in order[len(found) : round(len(order) * share / total)]:
            found[client.id] = rank
    return [found[client.id] for client in clients]
