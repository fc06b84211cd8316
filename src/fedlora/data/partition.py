"""Who gets which of the training rows: partitioners, and in one line why one gives up."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora.errors import FedloraError

# Before flwr_datasets is imported anywhere: it reports its use to its makers otherwise.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

    from fedlora.data.sources.base import ImageTable

Rows = NDArray[np.int64]
# Where nothing else says how many there are.
DEFAULT_NUM_CLIENTS = 10


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
        FedloraError: if the numbers differ.
    """
    if count is not None and count != num_clients:
        raise FedloraError(
            f"data.num_clients is {num_clients} but {type(partitioner).__name__} makes {count} "
            f"partitions (num_partitions={count}). Set both to the same number, for example "
            f"num_clients={count}."
        )


def partition(
    table: ImageTable,
    pool: Rows,
    num_clients: int | None,
    partitioner: Partitioner | None,
    seed: int,
) -> list[Rows]:
    """The rows of each client.

    Args:
        table: the pictures.
        pool: the rows to divide, shuffled.
        num_clients: how many clients there must be; None takes what the partitioner makes.
        partitioner: used as a copy; None: one client per site, or :func:`default_partitioner`.
        seed: of the default partitioner.

    Raises:
        FedloraError: if it cannot be done.
    """
    from datasets import Dataset

    if partitioner is None and table.site is not None:
        # NaturalIdPartitioner gives the same, and takes seconds for it.
        return _by_site(table.site[pool], pool, num_clients)
    if partitioner is None:
        num_clients = DEFAULT_NUM_CLIENTS if num_clients is None else num_clients
        partitioner = default_partitioner(max(min(num_clients, len(pool)), 1), len(pool), seed)
    if num_clients is not None and num_clients > len(pool):
        raise FedloraError(_too_many(num_clients, len(pool)))
    columns: dict[str, Any] = {"row": pool.tolist(), "label": table.labels[pool].tolist()}
    if table.site is not None:
        columns["site"] = table.site[pool].tolist()
    columns |= {
        name: column[pool].tolist() for name, column in table.columns.items() if name not in columns
    }
    _check_column(partitioner, columns)
    # A partitioner takes a data set once only and its generator moves on: work on a copy.
    working = deepcopy(partitioner)
    dataset = Dataset.from_dict(columns)
    with _quietly(partitioner, dataset, num_clients):
        working.dataset = dataset
        count = working.num_partitions
    if num_clients is not None:
        check_num_partitions(partitioner, num_clients, count)
    elif count > len(pool):
        raise FedloraError(_too_many(count, len(pool)))
    with _quietly(partitioner, dataset, count):
        parts = list(_load(working, count))
    if len(np.unique(np.concatenate(parts))) != sum(map(len, parts)):
        raise FedloraError(
            f"{type(partitioner).__name__} gives one picture to several clients. Use a "
            "partitioner that divides rows."
        )
    return parts


def _load(partitioner: Partitioner, count: int) -> Iterator[Rows]:
    """The rows of each of its parts."""
    for i in range(count):
        yield np.asarray(partitioner.load_partition(i)["row"][:], dtype=np.int64)
        # Those of the library have decided everything by now, and only select from then on: a data
        # set of each part would take longer than all else, seconds for thousands of clients.
        if not i and type(partitioner).__module__.startswith("flwr_datasets."):
            vars(partitioner)["_dataset"] = _Selection(partitioner.dataset)


class _Selection:
    """A data set that selects rows as arrays; in all else it is the data set."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.rows: Rows = np.asarray(dataset["row"][:], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dataset, name)

    def select(self, indices: Sequence[int]) -> dict[str, Rows]:
        """The rows at some places."""
        return {"row": self.rows[np.asarray(indices, dtype=np.int64)]}

    def shard(self, num_shards: int, index: int, contiguous: bool) -> dict[str, Rows]:
        """One of so many pieces, the first ones longer by one where it does not come out even."""
        length, longer = divmod(len(self.rows), num_shards)
        start = length * index + min(index, longer)
        return {"row": self.rows[start : start + length + (index < longer)]}


def _by_site(site: NDArray[np.str_], pool: Rows, num_clients: int | None) -> list[Rows]:
    """One client per site, in the order of their names."""
    parts = by_value(site)
    sites = list(parts)
    if len(sites) == 1 and num_clients != 1:
        raise FedloraError(
            f"all training pictures are of one site, '{sites[0]}': there is nobody to train with. "
            "If that is no site, name the folder or column that is; or divide the pictures anew, "
            "for example with data.partitioner=IidPartitioner."
        )
    if num_clients not in (None, len(sites)):
        raise FedloraError(
            f"data.num_clients is {num_clients} but the training pictures are of {len(sites)} "
            "sites. Leave it out for one client per site, or divide the pictures anew, for "
            "example with data.partitioner=IidPartitioner."
        )
    return [pool[here] for here in parts.values()]


def by_value(values: NDArray[Any]) -> dict[Any, Rows]:
    """Where each value stands, ascending; values in their own order.

    Example:
        >>> {value: rows.tolist() for value, rows in by_value(np.array(["b", "a", "b"])).items()}
        {'a': [1], 'b': [0, 2]}
    """
    names, kind, counts = np.unique(values, return_inverse=True, return_counts=True)
    # One sort: comparing all with each value takes seconds for thousands of them.
    places = np.split(np.argsort(kind, kind="stable"), np.cumsum(counts))[:-1]
    return dict(zip(names.tolist(), places, strict=True))


def _too_many(num_clients: int, pictures: int) -> str:
    default = ", the default" if num_clients == DEFAULT_NUM_CLIENTS else ""
    return (
        f"data.num_clients must be at most {pictures} (the number of training pictures), "
        f"got {num_clients}{default}. Lower it or add pictures."
    )


def _check_column(partitioner: Partitioner, columns: Mapping[str, Any]) -> None:
    from flwr_datasets.partitioner import (
        NaturalIdPartitioner,
        VerticalEvenPartitioner,
        VerticalSizePartitioner,
    )

    if isinstance(partitioner, VerticalEvenPartitioner | VerticalSizePartitioner):
        raise FedloraError(
            f"{type(partitioner).__name__} divides columns, not pictures. Use one that divides "
            "rows, such as IidPartitioner or DirichletPartitioner."
        )
    allowed = [name for name in columns if name != "row"]
    column = getattr(partitioner, "_partition_by", None)
    if isinstance(column, str) and column not in allowed:
        raise FedloraError(
            f"partition_by of {type(partitioner).__name__} must be one of "
            f'{", ".join(allowed)} (the columns of this source), got "{column}".'
        )
    empty = isinstance(partitioner, NaturalIdPartitioner) and columns[str(column)].count("")
    if empty:
        raise FedloraError(
            f"the column {column} is empty for {empty} of the training pictures: nobody knows "
            "whose they are. Fill it in, or divide by another column."
        )


@contextmanager
def _quietly(partitioner: Partitioner, dataset: Any, num_clients: int | None) -> Iterator[None]:
    """Silence a partitioner's warnings and progress bars; say in one line why it gave up."""
    # NaturalIdPartitioner has a progress bar and Dirichlet warns at each new attempt.
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        except Exception as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise FedloraError(
                f"{type(partitioner).__name__} could not divide {len(dataset)} pictures among "
                f"{num_clients or 'its'} clients: {why.rstrip('.')}. "
                f"{_way_out(partitioner, dataset)}"
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


def client_names(
    table: ImageTable, clients: Sequence[Rows], partitioner: Partitioner | None
) -> tuple[str, ...]:
    """What each client is called: its site, or what else it alone has; else nothing."""
    by = str(getattr(partitioner, "_partition_by", ""))
    columns = [table.columns[by]] if by in table.columns else []
    columns += [] if table.site is None else [table.site]
    for column in columns:
        values = [set(column[rows].tolist()) for rows in clients]
        if all(len(value) == 1 for value in values) and len(set().union(*values)) == len(values):
            return tuple(str(*value) for value in values)
    return ("",) * len(clients)


def link_partitioner(parser: Any) -> None:
    """Let the seed and the number of clients of a command line reach data and partitioner."""
    parser.link_arguments("seed_everything", "data.seed")
    parser.link_arguments("seed_everything", "data.partitioner.init_args.seed")
    parser.link_arguments(
        "data.num_clients", "data.partitioner.init_args.num_partitions", _num_partitions
    )


def _num_partitions(num_clients: int | None) -> int:
    return DEFAULT_NUM_CLIENTS if num_clients is None else num_clients
