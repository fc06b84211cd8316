"""Who gets which of the training rows: partitioners, and in one line why one gives up."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

# Before flwr_datasets is imported anywhere: it reports its use to its makers otherwise.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

    from fedlora.data.sources import ImageTable

Rows = NDArray[np.int64]


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


def partition(
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
