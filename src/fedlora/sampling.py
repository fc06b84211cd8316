"""Which clients play, and every seed: pure functions of (seed, round, client)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedlora.state import Client, Round


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
    digest = hashlib.sha256("\x1f".join(repr(key) for key in keys).encode()).digest()
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
    # Ranking each client by its own hash needs no generator and does not depend on list order.
    ranked = sorted(clients, key=lambda c: derive_seed(rnd.seed, "choose", rnd.idx, c.id))
    chosen = {client.id for client in ranked[: rnd.cohort]}
    return [client for client in clients if client.id in chosen]
