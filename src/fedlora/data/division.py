"""Which rows are for testing, for validation, and whose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedlora.data.partition import Rows, by_value, client_names, partition
from fedlora.errors import FedloraError
from fedlora.sampling import derive_seed

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

    from fedlora.data.sources.base import ImageTable

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Division:
    """Rows of a table, each in one part at most, but for what clients and the server both test on.

    Attributes:
        train: per client, what it trains on.
        client_val: per client, what it validates on (may be empty).
        client_test: per client, what it tests on (may be empty): rows taken out of its own, and
            the test split's rows of its site where clients are sites. The latter are in ``test``
            too.
        val: the server's validation split.
        test: the test split.
        names: per client, its site; empty strings where clients are not sites.
        idle: rows in no part: the partitioner gave them to nobody, ``n_shots`` left them over, or
            they are for testing at a site that is not held out where others are.
        unusable: rows that were left out beforehand.
    """

    train: tuple[Rows, ...]
    client_val: tuple[Rows, ...]
    client_test: tuple[Rows, ...]
    val: Rows
    test: Rows
    names: tuple[str, ...]
    idle: int = 0
    unusable: int = 0

    def shared_test(self) -> int:
        """How many rows both a client and the server test on."""
        return int(np.isin(np.concatenate(self.client_test), self.test).sum())


def divide(
    table: ImageTable,
    *,
    num_clients: int | None,
    partitioner: Partitioner | None,
    val_fraction: float,
    client_val_fraction: float,
    seed: int,
    client_test_fraction: float = 0.0,
    test_fraction: float = 0.0,
    hold_out: Sequence[str] = (),
    n_shots: int | None = None,
    usable: Mask | None = None,
    class_names: Sequence[str] | None = None,
) -> Division:
    """Divide a table; the same pictures land in the same part in whatever order they come.

    Args:
        table: the pictures.
        num_clients: how many clients there must be; None: one per site without a partitioner,
            else as many as the partitioner makes.
        partitioner: used as a copy, so that it can be used again; None: one client per site where
            the table has sites, else :func:`~fedlora.data.partition.default_partitioner`.
        val_fraction: part of the training rows for the server's validation, of each site and
            class, taken before partitioning; without effect where the table has a "val" split.
        client_val_fraction: part of each client's rows that it validates on, stratified. A client
            keeps at least one row for training.
        seed: of the order in which the partitioner sees rows, and of all parts but the test split.
        client_test_fraction: part of each client's rows that it tests on, stratified, taken before
            its validation part; a client keeps at least one row. Where each client is a site and
            nothing is held out it tests on its site's rows of the test split besides.
        test_fraction: part of the training rows, of each site and class, that becomes the test
            split where the table has none and nothing is held out. Which rows depends on their
            keys alone.
        hold_out: sites, or ``column=value``, whose rows are the test split and nothing else; test
            rows of others are left out then.
        n_shots: most training rows of a class that a client keeps.
        usable: (n,) False for rows to leave out; None for all.
        class_names: how messages call the labels.

    Raises:
        FedloraError: if the rows cannot be divided as asked, a client would get none, or a class
            none to train on.
    """
    # By key first, so that the order in which a source lists its rows has no say; shuffled
    # then, because IidPartitioner cuts contiguous pieces.
    order = np.argsort(table.keys, kind="stable")
    order = order[np.random.default_rng(derive_seed(seed, "rows")).permutation(len(order))]
    if usable is not None:
        order = order[usable[order]]
    pool, val, test = (order[table.split[order] == name] for name in ("train", "val", "test"))
    if hold_out:
        held = _held_out(table, hold_out)
        pool, val, test = pool[~held[pool]], val[~held[val]], order[held[order]]
    elif not len(test) and test_fraction:
        # By a digest of the key: whatever the seed is, and a picture more moves hardly any other.
        ranked = pool[np.argsort([derive_seed("test split", str(k)) for k in table.keys[pool]])]
        held = _per_site(table, ranked, test_fraction)
        pool, test = pool[~np.isin(pool, ranked[held])], ranked[held]
    if not len(val):
        held = _per_site(table, pool, val_fraction)
        pool, val = pool[~held], pool[held]
    _check_classes(table, pool, val, test, class_names)
    clients = partition(table, pool, num_clients, partitioner, seed)
    _check_clients(clients, len(pool))
    shared = _test_rows_of_sites(table, clients, test[:0] if hold_out else test)
    train, client_val, client_test = [], [], []
    for i, rows in enumerate(clients):
        # Without such a part all else must stay as it is: no shuffling then.
        rest, own = rows, rows[:0]
        if client_test_fraction:
            rest, own = _take(table, rows, client_test_fraction, seed, "client_test", i)
        rest, validated = _take(table, rest, client_val_fraction, seed, "client_val", i)
        train.append(_first_of_each(table.labels, rest, n_shots))
        client_val.append(validated)
        client_test.append(np.concatenate([shared[i], own]))
    parts = (*train, *client_val, *client_test, val, test)
    return Division(
        train=tuple(train),
        client_val=tuple(client_val),
        client_test=tuple(client_test),
        val=val,
        test=test,
        names=client_names(table, clients, partitioner),
        idle=len(order) - sum(map(len, parts)) + sum(map(len, shared)),
        unusable=len(table) - len(order),
    )


def _test_rows_of_sites(table: ImageTable, clients: Sequence[Rows], test: Rows) -> list[Rows]:
    """For each client the test rows of its site; none where clients are not sites."""
    if table.site is None:
        return [test[:0]] * len(clients)
    there = by_value(table.site[test])
    # Without the partitioner's own column names are sites, or empty.
    names = client_names(table, clients, None)
    return [test[there[name]] if name in there else test[:0] for name in names]


def _take(
    table: ImageTable, rows: Rows, fraction: float, seed: int, what: str, client: int
) -> tuple[Rows, Rows]:
    """Shuffle a client's rows and take a part of them: the others, the part."""
    order = np.random.default_rng(derive_seed(seed, what, client)).permutation(len(rows))
    shuffled = rows[order]
    held = stratified(table.labels[shuffled], fraction, keep=1)
    return shuffled[~held], shuffled[held]


def stratified(labels: Rows, fraction: float, keep: int = 0, keep_each: int = 0) -> Mask:
    """Choose the first ``fraction`` of each class, in all ``fraction * n`` rows, rounded.

    Args:
        labels: (n,), in random order already.
        fraction: 0 up to, not including, 1.
        keep: rows that must remain unchosen.
        keep_each: rows of each class that must remain unchosen; fewer are chosen in all then.

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
    take = np.minimum(take, np.maximum(counts - keep_each, 0))
    chosen: Mask = _place(labels) < take[kind]
    return chosen


def _place(labels: Rows) -> Rows:
    """For each row, how many rows of its class come before it."""
    _, kind, counts = np.unique(labels, return_inverse=True, return_counts=True)
    place = np.empty(len(labels), dtype=np.int64)
    by_class = np.argsort(kind, kind="stable")
    place[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return place


def _first_of_each(labels: Rows, rows: Rows, count: int | None) -> Rows:
    return rows if count is None else rows[_place(labels[rows]) < count]


def _per_site(table: ImageTable, rows: Rows, fraction: float) -> Mask:
    """Choose a part of each site's rows, never the last one of a class or of a site."""
    if table.site is None:
        return stratified(table.labels[rows], fraction, keep_each=1)
    chosen = np.zeros(len(rows), dtype=np.bool_)
    for here in by_value(table.site[rows]).values():
        chosen[here] = stratified(table.labels[rows[here]], fraction, keep=1, keep_each=1)
    return chosen


def _held_out(table: ImageTable, names: Sequence[str]) -> Mask:
    """The rows that ``hold_out`` names."""
    held = np.zeros(len(table), dtype=np.bool_)
    for name in names:
        found = np.zeros(len(table), dtype=np.bool_) if table.site is None else table.site == name
        column, equals, value = name.partition("=")
        columns = {**table.columns, **({} if table.site is None else {"site": table.site})}
        if not found.any() and equals and column in columns:
            found = columns[column].astype(np.str_) == value
        if not found.any():
            raise FedloraError(_no_such_site(table, name))
        held |= found
    if held.all():
        raise FedloraError(
            "data.hold_out names all pictures: there is none left to train on. Name fewer sites."
        )
    return held


def _no_such_site(table: ImageTable, name: str) -> str:
    import difflib

    sites = [] if table.site is None else np.unique(table.site).tolist()
    close = difflib.get_close_matches(name, sites, n=1)
    there = [f"the sites {_some(sites)}"] if sites else []
    there += [
        f"{column}={_some(np.unique(values).tolist())}" for column, values in table.columns.items()
    ]
    return (
        f"data.hold_out names '{name}' but no picture is of it: there are "
        f"{'; '.join(there) or 'no sites and no other columns'}."
        + (f" Did you mean '{close[0]}'?" if close else " Name one of them." * bool(there))
    )


def _some(names: Sequence[object]) -> str:
    return f"{', '.join(map(str, names[:8]))}{' …' * (len(names) > 8)}"


def _check_clients(clients: Sequence[Rows], pictures: int) -> None:
    """Refuse a client without training samples."""
    for i, rows in enumerate(clients):
        if not len(rows):
            raise FedloraError(
                f"client {i} has no training samples: {pictures} pictures were divided among "
                f"{len(clients)} clients. Lower num_clients or set the partitioner's "
                "min_partition_size to 1 or more."
            )


def _check_classes(
    table: ImageTable, pool: Rows, val: Rows, test: Rows, names: Sequence[str] | None
) -> None:
    """Refuse a class that nothing can be learnt of, and a single class."""

    def name(label: int) -> str:
        return f"'{names[label]}'" if names else str(label)

    trained = np.unique(table.labels[pool])
    for split, rows in (("test", test), ("validation", val)):
        only = np.setdiff1d(table.labels[rows], trained)
        if len(only):
            count = int((table.labels[rows] == only[0]).sum())
            raise FedloraError(
                f"class {name(only[0])} is in the {split} split only ({count} pictures): nothing "
                f"can be learnt of it. Add training pictures of it, or take it out."
            )
    if len(trained) == 1:
        raise FedloraError(
            f"all training pictures are of one class, {name(trained[0])}: a classifier needs at "
            "least two. Add pictures of another class."
        )
