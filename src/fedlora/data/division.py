"""Which rows are for testing, for validation, and whose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedlora.data.partition import Rows, partition
from fedlora.sampling import derive_seed

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

    from fedlora.data.sources import ImageTable


@dataclass(frozen=True, eq=False)
class Division:
    """Rows of a table, each in one part at most.

    Attributes:
        train: per client, what it trains on.
        client_val: per client, what it validates on (may be empty).
        val: the server's validation split.
        test: the test split.
        names: per client, its site; empty strings where clients are not sites.
    """

    train: tuple[Rows, ...]
    client_val: tuple[Rows, ...]
    val: Rows
    test: Rows
    names: tuple[str, ...]


def divide(
    table: ImageTable,
    *,
    num_clients: int,
    partitioner: Partitioner | None,
    val_fraction: float,
    client_val_fraction: float,
    seed: int,
) -> Division:
    """Divide a table; the same pictures land in the same part in whatever order they come.

    Args:
        table: the pictures.
        num_clients: how many clients the partitioner must make.
        partitioner: used as a copy, so that it can be used again; None for
            :func:`default_partitioner`.
        val_fraction: part of the training rows for the server's validation, stratified, taken
            before partitioning; without effect where the table has a "val" split of its own.
        client_val_fraction: part of each client's rows that it validates on, stratified. A client
            keeps at least one row for training.
        seed: of the order in which the partitioner sees rows, and of the validation parts.

    Raises:
        ValueError: if the rows cannot be divided as asked or a client would get none.
    """
    # By key first, so that the order in which a source lists its rows has no say; shuffled
    # then, because IidPartitioner cuts contiguous pieces.
    order = np.argsort(table.keys, kind="stable")
    order = order[np.random.default_rng(derive_seed(seed, "rows")).permutation(len(order))]
    split = table.split[order]
    pool, val, test = (order[split == name] for name in ("train", "val", "test"))
    if not len(val):
        held = stratified(table.labels[pool], val_fraction)
        pool, val = pool[~held], pool[held]
    clients = partition(table, pool, num_clients, partitioner, seed)
    train, client_val = [], []
    for i, rows in enumerate(clients):
        if not len(rows):
            raise ValueError(
                f"client {i} has no training samples: {len(pool)} pictures were divided among "
                f"{num_clients} clients. Lower num_clients or set the partitioner's "
                "min_partition_size to 1 or more."
            )
        rng = np.random.default_rng(derive_seed(seed, "client_val", i))
        shuffled = rows[rng.permutation(len(rows))]
        held = stratified(table.labels[shuffled], client_val_fraction, keep=1)
        train.append(shuffled[~held])
        client_val.append(shuffled[held])
    return Division(tuple(train), tuple(client_val), val, test, _names(table, clients))


def stratified(labels: Rows, fraction: float, keep: int = 0) -> NDArray[np.bool_]:
    """Choose the first ``fraction`` of each class, in all ``fraction * n`` rows, rounded.

    Args:
        labels: (n,), in random order already.
        fraction: 0 up to, not including, 1.
        keep: rows that must remain unchosen.

    Returns:
        (n,), True for the chosen.

    Example:
        >>> stratified(np.array([5, 5, 5, 7, 7, 5]), 0.5).tolist()
        [True, True, False, True, False, False]
    """
    _, kind, counts = np.unique(labels, return_inverse=True, return_counts=True)
    exact = counts * fraction
    take = np.floor(exact).astype(np.int64)
    total = min(int(len(labels) * fraction + 0.5), max(len(labels) - keep, 0))
    # What rounding down left over goes to the classes that lost most by it.
    take[np.argsort(take - exact, kind="stable")[: max(total - int(take.sum()), 0)]] += 1
    by_class = np.argsort(kind, kind="stable")
    place = np.empty(len(labels), dtype=np.int64)
    place[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen: NDArray[np.bool_] = place < take[kind]
    return chosen


def _names(table: ImageTable, clients: list[Rows]) -> tuple[str, ...]:
    """Each client's site, where each client is one site of its own."""
    if table.site is not None:
        sites = [set(table.site[rows].tolist()) for rows in clients]
        if all(len(site) == 1 for site in sites) and len(set().union(*sites)) == len(sites):
            return tuple(str(*site) for site in sites)
    return ("",) * len(clients)
