from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fedlora.data import Augmentation, FederatedDataModule, ImageTable
from fedlora.data.holdings import Holdings
from fedlora.data.partition import partition
from tests.data.test_datamodule import Hospitals, indices, ready
from tests.data.test_division import SITES, by_name, everything, run, table


def iid(count):
    return by_name("IidPartitioner", count)


def own(division):
    """What was taken out of each client's rows."""
    return [np.setdiff1d(rows, division.test) for rows in division.client_test]


def digest(of, division):
    return Holdings(None, of, division).fingerprint()


def nearest(number):
    return int(number + 0.5)


def test_the_default_division_is_the_one_it_always_was():
    data = FederatedDataModule()
    data.prepare_data()
    assert digest(*data.divide()) == (
        "298ddc431bb128e69118b340e8c4a68b2b5851881c4f5826acb21a8e9011f712"
    )


@pytest.mark.parametrize("partitioner", [iid(4), None], ids=["iid", "sites"])
def test_a_part_of_each_clients_rows(partitioner):
    of = table()
    before = run(of, partitioner=partitioner)
    division = run(of, partitioner=partitioner, client_test_fraction=0.25)
    assert division.test.tolist() == before.test.tolist()
    assert division.val.tolist() == before.val.tolist()
    for i, tested in enumerate(own(division)):
        mine = np.concatenate([before.train[i], before.client_val[i]])
        rest = np.concatenate([division.train[i], division.client_val[i]])
        assert sorted([*tested, *rest]) == sorted(mine)
        assert len(tested) == nearest(0.25 * len(mine))
        assert len(division.client_val[i]) == nearest(0.2 * len(rest))
        exact = 0.25 * np.bincount(of.labels[mine], minlength=5)
        assert (abs(np.bincount(of.labels[tested], minlength=5) - exact) < 1).all()
    assert division.idle == 0


def test_it_is_drawn_anew_for_each_seed_and_client(monkeypatch):
    given = []

    def watched(*args):
        given[:] = partition(*args)
        return given

    monkeypatch.setattr("fedlora.data.division.partition", watched)
    # Three sites of 45 pictures of one class each: what they draw is by position alone.
    third = np.arange(135) // 45
    of = ImageTable(third // 2, np.full(135, "train"), np.arange(135), SITES[third])
    drawn = set()
    for seed in (0, 1):
        settings = {"seed": seed, "val_fraction": 0.0, "test_fraction": 0.0}
        tested = run(of, **settings, client_test_fraction=0.2).client_test
        for rows, mine in zip(tested, given, strict=True):
            drawn.add(tuple(np.flatnonzero(np.isin(mine, rows))))
        # Before the validation part: its size does not matter.
        other = run(of, **settings, client_test_fraction=0.2, client_val_fraction=0.6).client_test
        assert [rows.tolist() for rows in other] == [rows.tolist() for rows in tested]
        # With the seed of the validation part it would be the same rows.
        validated = run(of, **settings, client_val_fraction=0.2).client_val
        assert all(set(a) != set(b) for a, b in zip(validated, tested, strict=True))
    assert len(drawn) == 6


def test_the_order_of_the_source_has_no_say():
    of = table()
    order = np.random.default_rng(3).permutation(300)
    turned = dataclasses.replace(
        of, **{name: getattr(of, name)[order] for name in ("labels", "split", "keys", "site")}
    )
    first, second = run(of, client_test_fraction=0.2), run(turned, client_test_fraction=0.2)
    for a, b in zip(first.client_test, second.client_test, strict=True):
        assert of.keys[a].tolist() == turned.keys[b].tolist()


def test_a_client_keeps_a_row_to_train_on():
    division = run(
        table(n=30, test=True),
        partitioner=iid(10),
        val_fraction=0.0,
        client_test_fraction=0.99,
        client_val_fraction=0.9,
    )
    assert [len(rows) for rows in division.train] == [1] * 10
    assert {len(rows) for rows in division.client_test} == {1, 2}  # of 2 or 3
    assert {len(rows) for rows in division.client_val} == {0}


@pytest.mark.parametrize("test", [True, False], ids=["split of the source", "made by a fraction"])
@pytest.mark.parametrize(
    "partitioner", [None, by_name("NaturalIdPartitioner", "site")], ids=["sites", "natural ids"]
)
def test_a_site_tests_on_its_rows_of_the_test_split(test, partitioner):
    of = table(test=test)
    division = run(of, partitioner=partitioner)
    for name, rows in zip(division.names, division.client_test, strict=True):
        assert rows.tolist() == [row for row in division.test if of.site[row] == name]
        assert len(rows)
    assert division.shared_test() == len(division.test)
    assert division.idle == 300 - len(everything(division)) == 0


def test_the_fraction_is_added_to_the_rows_of_the_site():
    of = table()
    alone, division = run(of), run(of, client_test_fraction=0.25)
    for shared, tested, mine in zip(
        alone.client_test, division.client_test, own(division), strict=True
    ):
        assert set(shared) | set(mine) == set(tested)
        assert len(shared) + len(mine) == len(tested)
        assert len(mine)
    assert division.shared_test() == len(division.test)
    assert division.idle == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"hold_out": ["scanner=ge"]},  # each site has pictures of it
        {"hold_out": ["south"]},
        {"partitioner": iid(3)},
        {"partitioner": by_name("NaturalIdPartitioner", "scanner")},
        {"test_fraction": 0.0},
    ],
    ids=["a domain held out", "a site held out", "iid", "by another column", "no test split"],
)
def test_where_there_is_nothing_of_the_site_a_client_has_no_test_rows(settings):
    scanner = np.array(["ge", "siemens"])[np.arange(300) // 5 % 2]
    division = run(table(columns={"scanner": scanner}), **settings)
    assert [len(rows) for rows in division.client_test] == [0] * len(division.train)
    # With a fraction they have, of their own.
    division = run(table(columns={"scanner": scanner}), client_test_fraction=0.2, **settings)
    assert min(len(rows) for rows in division.client_test) > 0
    assert division.shared_test() == 0


def test_sites_that_are_for_testing_only_are_nobodys():
    of = table(test=True)
    split = np.where(of.site == "west", "test", of.split)
    split = np.where(of.site == "south", "train", split)
    division = run(dataclasses.replace(of, split=split))
    assert division.names == ("north", "south")
    assert [len(rows) for rows in division.client_test] == [5, 0]


def test_few_shots_and_unusable_rows():
    usable = np.ones(300, dtype=bool)
    usable[::7] = False
    division = run(table(), usable=usable, n_shots=2, client_test_fraction=0.25)
    tested = np.concatenate(own(division))
    assert usable[np.concatenate(division.client_test)].all()
    assert division.idle == usable.sum() - len(everything(division)) - len(tested) > 0
    full = run(table(), usable=usable, client_test_fraction=0.25)
    for rows, same in zip(division.client_test, full.client_test, strict=True):
        assert rows.tolist() == same.tolist()


def test_the_fingerprint_covers_what_was_taken_out():
    of = table()
    division = run(of, client_test_fraction=0.25)
    none = (division.test[:0],) * 3
    turned = dataclasses.replace(division, client_test=division.client_test[::-1])
    digests = [
        digest(of, other)
        for other in (division, dataclasses.replace(division, client_test=none), turned)
    ]
    assert len(set(digests)) == 3


def test_the_fingerprint_passes_by_what_is_in_the_test_split():
    of = table()
    division = run(of)
    bare = dataclasses.replace(division, client_test=(division.test[:0],) * 3)
    assert division.shared_test()
    assert digest(of, division) == digest(of, bare)


def test_batches():
    data = ready(
        partitioner=iid(3),
        client_test_fraction=0.2,
        eval_batch_size=50,
        augment=Augmentation(flip=1, crop_scale=None),
    )
    labels, pixels = data.holdings.table.labels, data.holdings.images
    for client in data.clients():
        batches = list(data.client_test_batches(client))
        rows = data.holdings.division.client_test[client.id]
        # A third of 1,294 rows, a fifth of it: 86.
        assert [len(batch["label"]) for batch in batches] == [50, 36]
        assert indices(batches) == rows.tolist() == indices(data.client_test_batches(client))
        for batch in batches:
            assert batch["label"].tolist() == labels[batch["index"]].tolist()
            assert torch.equal(batch["image"], pixels[batch["index"]])


def test_no_batches_where_there_are_no_rows():
    data = ready(num_clients=3)
    assert [list(data.client_test_batches(client)) for client in data.clients()] == [[]] * 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "10 to test, 10 test at the clients (10 of them at the server, too)"),
        ({"client_test_fraction": 0.2, "hold_out": "north"}, "20 to test, 6 test at the clients;"),
        ({"partitioner": iid(2)}, "10 to test"),
    ],
    ids=["shared", "held out", "none"],
)
def test_the_summary(settings, words):
    summary = ready(source=Hospitals(), **settings).holdings.summary()
    assert words in summary
    assert ("test at the clients" in summary) == ("test at the clients" in words)
