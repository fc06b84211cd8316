from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from fedlora.data.division import divide, stratified
from fedlora.data.partition import by_value, default_partitioner, partition
from fedlora.data.sources.base import ImageTable


def table(n=600, classes=5, site=None, val=0):
    split = np.array(["train"] * n)
    split[: n // 5] = "test"
    split[n // 5 : n // 5 + val] = "val"
    keys = np.array([f"{i * 7919 % 10007:05d}" for i in range(n)])  # distinct, in no order
    return ImageTable(np.arange(n) % classes, split, keys, site)


def run(of, partitioner=None, num_clients=4, val=0.1, client_val=0.2, seed=0):
    return divide(
        of,
        num_clients=num_clients,
        partitioner=partitioner,
        val_fraction=val,
        client_val_fraction=client_val,
        seed=seed,
    )


def all_rows(division):
    return np.concatenate([*division.train, *division.client_val, division.val, division.test])


def keys_of(of, division):
    parts = [*division.train, *division.client_val, division.val, division.test]
    return [of.keys[rows].tolist() for rows in parts]


def iid(n):
    from flwr_datasets.partitioner import IidPartitioner

    return IidPartitioner(n)


@pytest.mark.parametrize(
    ("labels", "fraction", "keep", "expected"),
    [
        # 4 of class 5 -> 2, 2 of class 7 -> 1: the first ones of each.
        ([5, 5, 5, 7, 7, 5], 0.5, 0, [1, 1, 0, 1, 0, 0]),
        # 3 and 3 of a third: 1 each.
        ([0, 0, 0, 1, 1, 1], 1 / 3, 0, [1, 0, 0, 1, 0, 0]),
        # 0.25 * 5 = 1.25 -> one row, to the class whose 0.75 was rounded down (2 * 0.25 = 0.5).
        ([0, 0, 1, 1, 1], 0.25, 0, [0, 0, 1, 0, 0]),
        ([3], 0.9, 1, [0]),
        ([3, 4], 0.9, 1, [1, 0]),
        ([3, 3, 3, 3], 0.1, 1, [0, 0, 0, 0]),
        ([1, 2], 0.0, 0, [0, 0]),
        ([], 0.5, 1, []),
    ],
)
def test_stratified_by_hand(labels, fraction, keep, expected):
    chosen = stratified(np.array(labels, dtype=np.int64), fraction, keep)
    assert chosen.tolist() == [bool(value) for value in expected]


def test_every_row_once():
    division = run(table())
    assert sorted(all_rows(division)) == list(range(600))
    assert len(division.test) == 120
    assert len(division.val) == 48  # 0.1 of the other 480
    assert np.bincount(table().labels[division.val]).min() >= 9  # 9.6 of each class
    assert len(division.train) == len(division.client_val) == 4
    for train, held in zip(division.train, division.client_val, strict=True):
        assert len(held) == int(0.2 * (len(train) + len(held)) + 0.5)


def test_a_val_split_of_the_source_is_used():
    division = run(table(val=30))
    assert sorted(division.val) == list(range(120, 150))
    assert sorted(all_rows(division)) == list(range(600))


@pytest.mark.parametrize("make", [lambda: None, lambda: iid(4)])
def test_the_order_of_the_source_has_no_say(make):
    first = table()
    order = np.random.default_rng(1).permutation(600)
    second = ImageTable(first.labels[order], first.split[order], first.keys[order])
    assert keys_of(first, run(first, make())) == keys_of(second, run(second, make()))


def test_seeds():
    same, again, other = (run(table(), iid(4), seed=seed) for seed in (0, 0, 1))
    assert keys_of(table(), same) == keys_of(table(), again)
    assert set(same.val) != set(other.val)
    assert set(same.train[0]) != set(other.train[0])
    assert set(same.test) == set(other.test)


def test_a_partitioner_is_not_changed_by_use():
    partitioner = default_partitioner(4, 432, seed=3)
    first, second = run(table(), partitioner), run(table(), partitioner)
    assert keys_of(table(), first) == keys_of(table(), second)
    assert not partitioner.is_dataset_assigned()


def test_rows_are_shuffled_before_iid():
    # Sorted by class, a contiguous fourth would hold two of the five classes.
    split = np.array((["test"] + ["train"] * 4) * 120)
    sorted_table = ImageTable(np.repeat(np.arange(5), 120), split, np.arange(600))
    for rows in run(sorted_table, iid(4)).train:
        assert len(np.unique(sorted_table.labels[rows])) >= 4


def test_natural_partition_by_site_names_the_clients():
    from flwr_datasets.partitioner import NaturalIdPartitioner

    of = table(site=np.array(["berlin", "åbo", "cádiz"] * 200))
    division = run(of, NaturalIdPartitioner("site"), num_clients=3)
    assert division.names == ("berlin", "cádiz", "åbo")
    for name, rows in zip(division.names, division.train, strict=True):
        assert set(of.site[rows]) == {name}
    assert run(of, iid(3), num_clients=3).names == ("", "", "")


def test_chatter_is_silenced(capfd, recwarn):
    from flwr_datasets.partitioner import DirichletPartitioner, NaturalIdPartitioner

    run(table(site=np.array(["a", "b"] * 300)), NaturalIdPartitioner("site"), num_clients=2)
    # 108 rows each on average and at least 80: this seed warns seven times before it gets there.
    hard = DirichletPartitioner(4, "label", 0.5, min_partition_size=80, seed=1)
    run(table(), hard)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_partitioning_leaves_the_global_generators_alone():
    import random

    import torch

    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    run(table())
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert before == after


def test_default_partitioner_lowers_its_minimum():
    # An eighth of the mean size, within 1 and 10.
    for clients, least in ((4, 10), (20, 6), (200, 1)):
        assert default_partitioner(clients, 1000, 0)._min_partition_size == least


def flwr(name, *args, **kwargs):
    import flwr_datasets.partitioner

    return getattr(flwr_datasets.partitioner, name)(*args, **kwargs)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("IidPartitioner", [7]),  # 432 rows: 5 of 62 and 2 of 61
        ("DirichletPartitioner", [5, "label", 0.5]),
        ("PathologicalPartitioner", [5, "label", 2]),
        ("ShardPartitioner", [5, "label", 3, 20]),  # sorts first
        ("SizePartitioner", [[5, 1, 300]]),
        ("ExponentialPartitioner", [4]),
        ("InnerDirichletPartitioner", [[50] * 5, "label", 0.5]),
        ("ContinuousPartitioner", [5, "label", 0.3]),
        ("DistributionPartitioner", [np.arange(1, 11).reshape(5, 2), 5, 2, "label", 1]),
        ("NaturalIdPartitioner", ["site"]),
        ("GroupedNaturalIdPartitioner", ["site", 2]),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_rows_are_those_that_the_library_selects(name, args):
    from datasets import Dataset

    of = table(site=np.array([f"site {row % 7}" for row in range(600)]))
    pool = np.random.default_rng(0).permutation(600)[:432]
    ours, theirs = (flwr(name, *args) for _ in range(2))
    theirs.dataset = Dataset.from_dict(
        {"row": pool, "label": of.labels[pool], "site": of.site[pool].tolist()}
    )
    parts = partition(of, pool, None, ours, seed=0)
    assert len(parts) == theirs.num_partitions
    for i, rows in enumerate(parts):
        assert rows.dtype == np.int64
        assert rows.tolist() == theirs.load_partition(i)["row"][:]


def test_a_partitioner_of_ones_own_gets_data_sets():
    from datasets import Dataset
    from flwr_datasets.partitioner import IidPartitioner

    class Own(IidPartitioner):
        def load_partition(self, partition_id):
            assert isinstance(self.dataset, Dataset)
            return self.dataset.filter(lambda row: row["row"] % self.num_partitions == partition_id)

    parts = partition(table(), np.arange(30), 3, Own(3), seed=0)
    assert [rows.tolist() for rows in parts] == [list(range(i, 30, 3)) for i in range(3)]


@pytest.mark.parametrize(
    ("clients", "make", "message"),
    [
        (433, lambda: None, r"num_clients must be at most 432 .* got 433\. Lower it"),
        (
            4,
            lambda: flwr("IidPartitioner", 3),
            r"num_clients is 4 but IidPartitioner makes 3 partitions \(num_partitions=3\).*"
            "num_clients=3",
        ),
        (
            4,
            lambda: flwr("NaturalIdPartitioner", "label"),
            "num_clients is 4 but NaturalIdPartitioner makes 5 partitions",
        ),
        (
            4,
            lambda: flwr("NaturalIdPartitioner", "site"),
            'partition_by of NaturalIdPartitioner must be one of label .* got "site"',
        ),
        (
            2,
            lambda: flwr("SizePartitioner", [300, 300]),
            "SizePartitioner could not divide 432 pictures among 2 clients: .*600.*Change",
        ),
        (
            30,
            lambda: flwr("DirichletPartitioner", 30, "label", 0.01, min_partition_size=0),
            r"client \d+ has no training samples: 432 pictures .* Lower num_clients or set",
        ),
    ],
)
def test_what_cannot_be_divided(clients, make, message):
    with pytest.raises(ValueError, match=message) as caught:
        run(table(), make(), num_clients=clients)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("clients", "alpha", "least"), [(10, 0.001, 10), (40, 0.3, 12)])
def test_dirichlet_names_a_setting_that_works(clients, alpha, least):
    def make(alpha, least):
        return flwr("DirichletPartitioner", clients, "label", alpha, min_partition_size=least)

    with pytest.raises(ValueError, match=r"alpha=\S+ with min_partition_size=\d+ works") as caught:
        run(table(), make(alpha, least), num_clients=clients)
    found = re.search(r"alpha=(\S+) with min_partition_size=(\d+)", str(caught.value))
    partitioner = make(float(found[1]), int(found[2]))
    assert min(map(len, run(table(), partitioner, num_clients=clients).train)) > 0


def test_dirichlet_that_cannot_work_names_another():
    with pytest.raises(ValueError, match="Use IidPartitioner or lower num_clients"):
        run(table(), num_clients=400)
    assert len(run(table(), iid(400), num_clients=400).train) == 400


def test_flwr_datasets_does_not_phone_home():
    code = (
        "import os, sys, fedlora.data.partition\n"
        "assert 'flwr_datasets' not in sys.modules and 'datasets' not in sys.modules\n"
        "print(os.environ['FLWR_TELEMETRY_ENABLED'])"
    )
    env = {key: value for key, value in os.environ.items() if key != "FLWR_TELEMETRY_ENABLED"}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert out.stdout.strip() == "0", out.stderr


@pytest.mark.parametrize(
    "values", [[], ["b"], ["b", "a", "b", "ab", "a", "b"], [3.5, -1.0, 3.5, 2.0]], ids=str
)
def test_where_each_value_stands(values):
    found = by_value(np.array(values))
    assert list(found) == sorted(set(values))
    for value, places in found.items():
        assert places.tolist() == [i for i, other in enumerate(values) if other == value]
