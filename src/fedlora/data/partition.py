"""Who gets which rows: the test, validation and client parts of a table of pictures."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora.sampling import derive_seed

# Before flwr_datasets is imported anywhere: it reports its use to its makers otherwise.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

    from fedlora.data.sources import ImageTable

Rows = NDArray[np.int64]


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
    clients = _partition(table, pool, num_clients, partitioner, seed)
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


def default_partitioner(num_clients: int, num_rows: int, seed: int) -> Partitioner:
    """Label skew as most papers have it: Dirichlet with alpha 0.3.

    Ten rows per client at least, fewer where that would be more than an eighth of the mean.
    """
    from flwr_datasets.partitioner import DirichletPartitioner

    return DirichletPartitioner(
        num_partitions=num_clients,
        partition_by="label",
        alpha=0.3,
        min_partition_size=max(1, min(10, num_rows // (8 * num_clients))),
        self_balancing=False,
        seed=seed,
    )


def check_num_partitions(partitioner: Partitioner, num_clients: int, count: int | None) -> None:
    """Refuse a partitioner that makes another number of clients.

    Args:
        partitioner: whom to name.
        num_clients: what the data module was told.
        count: how many parts it makes; None where it cannot tell without data.

    Raises:
        ValueError: if the numbers differ.
    """
    if count is not None and count != num_clients:
        raise ValueError(
            f"num_clients is {num_clients} but {type(partitioner).__name__} makes {count} "
            f"partitions (num_partitions={count}). Set both to the same number, for example "
            f"num_clients={count}."
        )


def _partition(
    table: ImageTable, pool: Rows, num_clients: int, partitioner: Partitioner | None, seed: int
) -> list[Rows]:
    """The rows of each client, by the partitioner."""
    from datasets import Dataset

    if num_clients > len(pool):
        raise ValueError(
            f"num_clients must be at most {len(pool)} (the number of training pictures), "
            f"got {num_clients}. Lower it or add pictures."
        )
    if partitioner is None:
        partitioner = default_partitioner(num_clients, len(pool), seed)
    columns = {"row": pool.tolist(), "label": table.labels[pool].tolist()}
    if table.site is not None:
        columns["site"] = table.site[pool].tolist()
    _check_column(partitioner, columns)
    # A partitioner takes a data set once only and its generator moves on: work on a copy.
    working = deepcopy(partitioner)
    dataset = Dataset.from_dict(columns)
    with _quietly(partitioner, dataset, num_clients):
        working.dataset = dataset
        count = working.num_partitions
    check_num_partitions(partitioner, num_clients, count)
    with _quietly(partitioner, dataset, num_clients):
        parts = [
            np.asarray(working.load_partition(i)["row"][:], dtype=np.int64) for i in range(count)
        ]
    if len(np.unique(np.concatenate(parts))) != sum(map(len, parts)):
        raise ValueError(
            f"{type(partitioner).__name__} gives one picture to several clients. Use a "
            "partitioner that divides rows."
        )
    return parts


def _check_column(partitioner: Partitioner, columns: Mapping[str, Any]) -> None:
    allowed = [name for name in columns if name != "row"]
    column = getattr(partitioner, "_partition_by", None)
    if isinstance(column, str) and column not in allowed:
        raise ValueError(
            f"partition_by of {type(partitioner).__name__} must be one of "
            f'{", ".join(allowed)} (the columns of this source), got "{column}".'
        )


@contextmanager
def _quietly(partitioner: Partitioner, dataset: Any, num_clients: int) -> Iterator[None]:
    """Silence a partitioner's warnings and progress bars; say in one line why it gave up."""
    # NaturalIdPartitioner has a progress bar and Dirichlet warns at each new attempt.
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        except Exception as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{type(partitioner).__name__} could not divide {len(dataset)} pictures among "
                f"{num_clients} clients: {why.rstrip('.')}. {_way_out(partitioner, dataset)}"
            ) from error


def _way_out(partitioner: Partitioner, dataset: Any) -> str:
    """A setting that was tried and works, for Dirichlet; a general hint for the others."""
    from flwr_datasets.partitioner import DirichletPartitioner

    alpha = getattr(partitioner, "_alpha", None)
    if not isinstance(partitioner, DirichletPartitioner) or alpha is None:
        return "Change its settings or num_clients."
    # A minimum above half of the mean size is hardly ever met by chance.
    feasible = max(1, len(dataset) // (2 * len(alpha)))
    least = min(getattr(partitioner, "_min_partition_size", 1), feasible)
    for factor in (2**power for power in range(15)):
        attempt = deepcopy(partitioner)
        vars(attempt).update(_alpha=alpha * factor, _min_partition_size=least, _dataset=dataset)
        try:
            _ = attempt.num_partitions
        except ValueError:
            continue
        same = len(set(alpha.tolist())) == 1
        found = f"alpha={alpha[0] * factor:g}" if same else f"alpha times {factor}"
        return f"{found} with min_partition_size={least} works; or lower num_clients."
    return "No other alpha was found to work. Use IidPartitioner or lower num_clients."


def _names(table: ImageTable, clients: list[Rows]) -> tuple[str, ...]:
    """Each client's site, where each client is one site of its own."""
    if table.site is not None:
        sites = [set(table.site[rows].tolist()) for rows in clients]
        if all(len(site) == 1 for site in sites) and len(set().union(*sites)) == len(sites):
            return tuple(str(*site) for site in sites)
    return ("",) * len(clients)
