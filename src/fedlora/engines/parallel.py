"""Plays the clients of a round on several processes, each client whole on one of them."""

from __future__ import annotations

import heapq
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fedlora.engines.sequential import SequentialEngine
from fedlora.engines.turn import Turn
from fedlora.state import Client, Round, ServerState

if TYPE_CHECKING:
    from fedlora.aggregation import Aggregator
    from fedlora.sampling import Plan


def assign(costs: Sequence[int], size: int) -> list[int]:
    """Who does what, so that all are done at about the same time.

    The longest first, each to whoever has least so far (Graham, "Bounds on Multiprocessing Timing
    Anomalies", 1969: at most 4/3 of the best).

    Args:
        costs: of each item, in any unit.
        size: ranks.

    Returns:
        The rank of each item; the same on every rank.
    """
    loads = [(0, rank) for rank in range(size)]  # a heap: of equal loads the lowest rank
    owners = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda number: -costs[number]):
        load, rank = loads[0]
        owners[item] = rank
        heapq.heapreplace(loads, (load + costs[item], rank))
    return owners


class ClientParallelEngine(SequentialEngine):
    """Each client of a round on one of the processes; their updates are the same ones.

    On rank 0 they are yielded in client order, elsewhere none is.
    """

    def take_turns(
        self, plan: Plan, rnd: Round, server: ServerState, rule: Aggregator
    ) -> Iterator[tuple[Client, Turn]]:
        """Every client's turn in their order, on rank 0."""
        players = plan.players
        costs = [min(self.num_steps(c), plan.limits.get(c.id, sys.maxsize)) for c in players]

        def arrived(number: int, plain: dict[str, Any]) -> Turn:
            client, sent, _ = self.sent(players[number], rnd, server, rule)
            return Turn.from_dict(plain, client, sent)

        turns = self.world.in_order(
            assign(costs, self.world.size),
            lambda number: self.take_turn(players[number], plan, rnd, server, rule),
            Turn.to_dict,
            arrived,
            lambda turn: turn.update.nbytes if turn.update else 0,
        )
        yield from zip(players, turns, strict=False)  # elsewhere than on rank 0 there are none
