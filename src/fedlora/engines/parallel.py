"""Plays the clients of a round on several processes, each client whole on one of them."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fedlora.distributed.world import MOST
from fedlora.engines.sequential import SequentialEngine
from fedlora.engines.turn import Turn
from fedlora.state import Client, Round, ServerState

if TYPE_CHECKING:
    from fedlora.aggregation import Aggregator
    from fedlora.sampling import Plan


# In rows, for the embedded model on a CPU, roughly: what a step takes whatever its rows, and what
# the update of a client takes on rank 0, whoever trained it. It only says who plays whom.
STEP = 8
UPDATE = 1


def assign(costs: Sequence[int], size: int, loads: Sequence[int] = ()) -> list[int]:
    """Who does what, so that all are done at about the same time.

    The longest first, each to whoever has least so far (Graham, "Bounds on Multiprocessing Timing
    Anomalies", 1969: at most 4/3 of the best).

    Args:
        costs: of each item, in any unit.
        size: ranks.
        loads: what each rank has to do besides; empty: nothing.

    Returns:
        The rank of each item; the same on every rank.
    """
    heap = list(zip(loads or [0] * size, range(size), strict=True))
    heapq.heapify(heap)  # of equal loads the lowest rank
    owners = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda number: -costs[number]):
        load, rank = heap[0]
        owners[item] = rank
        heapq.heapreplace(heap, (load + costs[item], rank))
    return owners


def lead(owners: Sequence[int], costs: Sequence[int], most: int) -> list[int]:
    """Let the lower ranks have the first of what costs the same, at most ``most`` in a row.

    Rank 0 takes results in the items' order. With its own behind it, little is left for it to do
    once the others' last ones come, while they have nothing to do any more.
    """
    changed = list(owners)
    for first in range(0, len(owners), most):
        alike: dict[int, list[int]] = {}
        for item in range(first, min(first + most, len(owners))):
            alike.setdefault(costs[item], []).append(item)
        for items in alike.values():
            for item, rank in zip(items, sorted(owners[item] for item in items), strict=True):
                changed[item] = rank
    return changed


class ClientParallelEngine(SequentialEngine):
    """Each client of a round on one of the processes; their updates are the same ones.

    On rank 0 they are yielded in client order, elsewhere none is.
    """

    def take_turns(
        self, plan: Plan, rnd: Round, server: ServerState, rule: Aggregator
    ) -> Iterator[tuple[Client, Turn]]:
        """Every client's turn in their order, on rank 0."""
        players = plan.players
        costs = [self._cost(client, plan.limits.get(client.id)) for client in players]

        def arrived(number: int, plain: dict[str, Any]) -> Turn:
            client, sent, _ = self.sent(players[number], rnd, server, rule)
            return Turn.from_dict(plain, client, sent)

        busy = [len(players) * UPDATE, *(0 for _ in range(self.world.size - 1))]
        owners = assign(costs, self.world.size, busy)
        # As many as a process may keep until it is their turn.
        owners = lead(owners, costs, max(1, MOST // max(1, server.adapter.nbytes)))
        mine = [
            client for client, rank in zip(players, owners, strict=True) if rank == self.world.rank
        ]
        steps = self.steps(plan, rnd, server, rule)
        own = steps.turns(mine)
        turns = self.world.in_order(
            owners,
            lambda _: next(own),  # it asks for each of this rank's, in their order
            Turn.to_dict,
            arrived,
            lambda turn: turn.update.nbytes if turn.update else 0,
            steps.ready,
            ahead=len(players),
        )
        yield from zip(players, turns, strict=False)  # elsewhere than on rank 0 there are none

    def _cost(self, client: Client, limit: int | None) -> int:
        """What a client's turn takes, in rows."""
        per_epoch = self.data.num_batches(client)
        batches = self.loop.num_batches(per_epoch)
        if limit is not None:
            batches = min(batches, limit * self.loop.accumulate)
        return batches * (client.num_samples // max(per_epoch, 1) + STEP)
