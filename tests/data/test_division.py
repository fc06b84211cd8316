from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from fedlora.data.division import divide, stratified
from fedlora.data.sources.base import ImageTable

SITES = np.array(["north", "south", "west"])


def table(n=300, classes=5, site=True, test=False, **more):
    rows = np.arange(n)
    split = np.where((rows % 10 == 0) & test, "test", "train")
    keys = np.array([f"{i * 7919 % 10007:05d}" for i in range(n)])
    # Three unequal sites, each with every class.
    return ImageTable(
        rows % classes, split, keys, SITES[np.minimum(rows // 50, 2)] if site else None, **more
    )


def run(of, **more):
    settings = {
        "num_clients": None,
        "partitioner": None,
        "val_fraction": 0.1,
        "client_val_fraction": 0.2,
        "test_fraction": 0.2,
        "seed": 0,
    }
    return divide(of, **{**settings, **more})


def everything(division):
    parts = [*division.train, *division.client_val, division.val, division.test]
    return np.concatenate(parts)


def test_sites_are_the_clients():
    of = table()
    division = run(of)
    assert division.names == ("north", "south", "west")
    for name, train, held in zip(division.names, division.train, division.client_val, strict=True):
        assert {*of.site[train], *of.site[held]} == {name}
    assert sorted(everything(division)) == list(range(300))
    assert division.idle == 0


def test_sites_are_divided_as_by_the_library() -> None:
    from flwr_datasets.partitioner import NaturalIdPartitioner

    ours, theirs = run(table()), run(table(), partitioner=NaturalIdPartitioner("site"))
    assert ours.names == theirs.names
    for a, b in zip(ours.train, theirs.train, strict=True):
        assert a.tolist() == b.tolist()


def test_each_site_and_class_gives_its_part():
    of = table()
    division = run(of)
    # 50, 50 and 200 rows: a fifth each is for testing, a tenth of the rest for validation.
    assert Counter(of.site[division.test].tolist()) == {"north": 10, "south": 10, "west": 40}
    assert Counter(of.site[division.val].tolist()) == {"north": 4, "south": 4, "west": 16}
    assert np.bincount(of.labels[division.test]).tolist() == [12] * 5


def test_without_sites_ten_clients():
    division = run(table(site=False))
    assert len(division.train) == 10
    assert division.names == ("",) * 10


def test_the_test_split_depends_on_the_keys_alone():
    of = table()
    first, other = run(of), run(of, seed=1)
    assert set(of.keys[first.test]) == set(of.keys[other.test])
    assert set(of.keys[first.val]) != set(of.keys[other.val])
    order = np.random.default_rng(3).permutation(300)
    turned = ImageTable(of.labels[order], of.split[order], of.keys[order], of.site[order])
    for a, b in zip(first.train, run(turned).train, strict=True):
        assert of.keys[a].tolist() == turned.keys[b].tolist()
    # Five more pictures move few of the others between training and testing.
    more = table(305)
    before, after = set(of.keys[first.test]), set(more.keys[run(more).test])
    assert len(before - after) <= 5


def test_a_test_split_of_the_source_is_used():
    of = table(test=True)
    assert sorted(run(of).test) == list(range(0, 300, 10))


def test_no_test_split_where_none_is_wanted():
    assert len(run(table(), test_fraction=0.0).test) == 0


def test_rare_classes_and_small_sites_stay_in_training():
    # One picture of a class, one of a site: neither is taken for testing or validation.
    labels = np.array([0] * 20 + [1] * 20 + [2] + [0])
    site = np.array(["a"] * 41 + ["b"])
    of = ImageTable(labels, np.full(42, "train"), np.arange(42), site)
    for seed in range(5):
        division = run(of, seed=seed, test_fraction=0.5, val_fraction=0.5)
        assert division.names == ("a", "b")
        assert 2 in of.labels[np.concatenate([*division.train, *division.client_val])]


def test_keep_each():
    labels = np.array([0, 0, 0, 0, 1])
    # Three of five rows; of class 1 none may go, so its share is not made up by others.
    assert stratified(labels, 0.6, keep_each=1).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("name", ["south", "site=south"])
def test_a_site_held_out(name):
    of = table(test=True)
    division = run(of, hold_out=[name])
    assert set(of.site[division.test]) == {"south"}
    assert len(division.test) == 50
    assert division.names == ("north", "west")
    # Test rows of the other sites are with nobody.
    assert len(everything(division)) == 300 - 5 - 20


def test_a_domain_held_out():
    scanner = np.array(["ge", "siemens"])[np.arange(300) % 2]
    of = table(columns={"scanner": scanner, "field": np.arange(300) % 3 + 0.5})
    assert set(of.columns["scanner"][run(of, hold_out=["scanner=ge"]).test]) == {"ge"}
    assert set(of.columns["field"][run(of, hold_out=["field=1.5"]).test]) == {1.5}


def test_a_site_whose_name_has_an_equals_sign():
    site = np.array(["scanner=ge", "x"] * 150)
    of = ImageTable(np.arange(300) % 5 % 2, np.full(300, "train"), np.arange(300), site)
    division = run(of, hold_out=["scanner=ge"], num_clients=1)
    assert set(of.site[division.test]) == {"scanner=ge"}


def test_few_shots():
    of = table()
    division = run(of, n_shots=2)
    for train in division.train:
        assert np.bincount(of.labels[train]).tolist() == [2] * 5
    # Validation parts are as without.
    full = run(of)
    for held, same in zip(division.client_val, full.client_val, strict=True):
        assert held.tolist() == same.tolist()
    assert division.idle == 300 - len(everything(division)) > 0
    # A class with fewer keeps what it has.
    assert [len(train) for train in run(of, n_shots=1000).train] == [len(t) for t in full.train]


def test_unusable_rows_are_nowhere():
    usable = np.ones(300, dtype=bool)
    usable[[3, 77, 200]] = False
    division = run(table(), usable=usable)
    assert sorted({3, 77, 200} & set(everything(division).tolist())) == []
    assert len(everything(division)) == 297


def test_any_column_divides():
    from flwr_datasets.partitioner import NaturalIdPartitioner

    scanner = np.array(["ge", "siemens", "philips", "ge"])[np.arange(300) % 4]
    of = table(columns={"scanner": scanner})
    division = run(of, partitioner=NaturalIdPartitioner("scanner"))
    assert division.names == ("ge", "philips", "siemens")
    for name, rows in zip(division.names, division.train, strict=True):
        assert set(scanner[rows]) == {name}


def by_name(name, *args, **kwargs):
    import flwr_datasets.partitioner

    return getattr(flwr_datasets.partitioner, name)(*args, **kwargs)


ROWS = 216  # of 300: without the test and validation parts
PARTITIONERS = [
    ("IidPartitioner", (4,), {}),
    ("LinearPartitioner", (4,), {}),
    ("SquarePartitioner", (4,), {}),
    ("ExponentialPartitioner", (4,), {}),
    ("SizePartitioner", ([100, 60, 56],), {}),
    ("IdToSizeFncPartitioner", (4, lambda i: i + 1), {}),
    ("DirichletPartitioner", (4, "label", 0.5), {"min_partition_size": 1}),
    ("InnerDirichletPartitioner", ([54] * 4, "label", 0.5), {}),
    ("PathologicalPartitioner", (5, "label", 2), {"class_assignment_mode": "deterministic"}),
    ("ShardPartitioner", (4, "label"), {"num_shards_per_partition": 2}),
    ("NaturalIdPartitioner", ("site",), {}),
    ("GroupedNaturalIdPartitioner", ("site", 2), {"mode": "allow-smaller"}),
    ("ContinuousPartitioner", (4, "dose", 0.5), {}),
    ("DistributionPartitioner", (np.ones((5, 2)), 5, 2, "label", 1), {}),
]


@pytest.mark.parametrize(("name", "args", "kwargs"), PARTITIONERS, ids=[p[0] for p in PARTITIONERS])
def test_every_partitioner_that_divides_rows(name, args, kwargs):
    of = table(columns={"dose": np.linspace(0, 1, 300)})
    division = run(of, partitioner=by_name(name, *args, **kwargs))
    rows = everything(division)
    assert len(set(rows.tolist())) == len(rows)
    assert len(division.train) >= 2
    assert len(rows) + division.idle == 300
    again = run(of, partitioner=by_name(name, *args, **kwargs))
    assert [r.tolist() for r in again.train] == [r.tolist() for r in division.train]


@pytest.mark.parametrize(
    "make",
    [
        lambda: by_name("VerticalEvenPartitioner", 2),
        lambda: by_name("VerticalSizePartitioner", [0.5, 0.5]),
    ],
)
def test_partitioners_of_columns_are_refused(make):
    with pytest.raises(ValueError, match=r"Vertical\w+ divides columns, not pictures"):
        run(table(), partitioner=make())


def test_rows_that_nobody_gets_are_counted():
    # Two classes for each of two clients: the fifth class is with nobody.
    partitioner = by_name(
        "PathologicalPartitioner", 2, "label", 2, class_assignment_mode="first-deterministic"
    )
    division = run(table(site=False), partitioner=partitioner, val_fraction=0.0)
    trained = set(table().labels[np.concatenate(division.train)])
    assert division.idle == 300 - len(everything(division)) >= 48
    assert len(trained) < 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_clients": 4}, "num_clients is 4 but the training pictures are of 3 sites. Leave"),
        ({"hold_out": ["nort"]}, "data.hold_out names 'nort' .* Did you mean 'north'"),
        ({"hold_out": ["scanner=x"]}, r"the sites north, south, west\. Name one of them"),
        ({"hold_out": ["north", "south", "west"]}, "data.hold_out names all pictures"),
        ({"hold_out": ["north", "south"]}, "all training pictures are of one site, 'west'"),
    ],
)
def test_what_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        run(table(), **settings)
    assert "\n" not in str(caught.value)


def test_a_class_that_nobody_can_learn():
    of = table(test=True, classes=3)
    labels = of.labels.copy()
    labels[[0, 10]] = 3  # test rows
    with pytest.raises(ValueError, match=r"class 'owl' is in the test split only \(2 pictures\)"):
        run(
            ImageTable(labels, of.split, of.keys, of.site),
            class_names=["cat", "dog", "cow", "owl"],
        )


def test_one_class():
    of = table(classes=1)
    with pytest.raises(ValueError, match="all training pictures are of one class, 0"):
        run(of)
