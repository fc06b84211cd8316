from __future__ import annotations

from itertools import chain

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, NaturalIdPartitioner
from jsonargparse import ArgumentError, ArgumentParser

import fedlora.data
from fedlora.data import (
    Augmentation,
    BadImageError,
    Digits,
    FederatedDataModule,
    ImagePreprocess,
    ImageSource,
    ImageTable,
)
from fedlora.data.partition import link_partitioner
from fedlora.state import Client, Round

PREPROCESS = ImagePreprocess(16, True, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def ready(**arguments):
    data = FederatedDataModule(**arguments)
    data.preprocess = PREPROCESS
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture(scope="module")
def digits():
    return ready(num_clients=5)


def indices(batches):
    return [i for batch in batches for i in batch["index"].tolist()]


class Hospitals(ImageSource):
    """60 pictures of unequal sizes, each of one grey level: its row; counts what is asked of it."""

    def __init__(self, labels=None):
        super().__init__(["a scan of {}."])
        self.labels = np.arange(60) % 2 if labels is None else labels
        self.asked = []

    @property
    def class_names(self):
        return ["nothing", "something"]

    def prepare(self):
        self.asked.append("prepare")

    def load(self):
        self.asked.append("load")
        split = np.array((["train"] * 5 + ["test"]) * 10)
        site = np.array(["north", "south", "west"] * 20)
        return ImageTable(self.labels, split, np.array([f"{i:02d}.png" for i in range(60)]), site)

    def read(self, rows):
        self.asked.extend(rows)
        return [torch.full((1 + 2 * (r % 2), 10 + r, 20), r, dtype=torch.uint8) for r in rows]


def test_every_row_in_one_part(digits):
    clients = digits.clients()
    assert [client.id for client in clients] == [0, 1, 2, 3, 4]
    parts = [indices(digits.client_batches(client, Round(0), 0)) for client in clients]
    held = [indices(digits.client_val_batches(client)) for client in clients]
    val, test = indices(digits.val_dataloader()), indices(digits.test_dataloader())
    assert sorted([*chain(*parts, *held), *val, *test]) == list(range(1797))
    assert [len(part) for part in parts] == [client.num_samples for client in clients]
    # 1797 - 359 for testing = 1438, a tenth of which is 144.
    assert (len(test), len(val)) == (359, 144)
    assert sorted(indices(digits.train_dataloader())) == sorted(chain(*parts))
    assert indices(digits.predict_dataloader()) == test


def test_a_batch_is_what_the_source_holds(digits):
    source = Digits()
    labels = torch.from_numpy(source.load().labels)
    batches = [
        *digits.client_batches(digits.clients()[1], Round(0), 0),
        *digits.train_dataloader(),
        *digits.test_dataloader(),
    ]
    for batch in batches:
        assert list(batch) == ["image", "label", "index"]
        assert [tensor.dtype for tensor in batch.values()] == [
            torch.uint8,
            torch.int64,
            torch.int64,
        ]
        assert torch.equal(batch["label"], labels[batch["index"]])
        assert torch.equal(batch["image"], PREPROCESS.resize(source.read(batch["index"].tolist())))


def test_sizes_of_batches(digits):
    for client in digits.clients():
        sizes = [len(b["label"]) for b in digits.client_batches(client, Round(0), 0)]
        assert len(sizes) == digits.num_batches(client) == -(-client.num_samples // 32)
        assert set(sizes[:-1]) <= {32}
        assert sum(sizes) == client.num_samples
    assert [len(batch["label"]) for batch in digits.test_dataloader()] == [256, 103]


def test_order_is_a_function_of_seed_round_client_and_epoch(digits):
    client = digits.clients()[0]
    calls = [(Round(0), 0), (Round(1), 0), (Round(0), 1), (Round(0, seed=1), 0)]
    orders = [tuple(indices(digits.client_batches(client, *call))) for call in calls]
    assert len(set(orders)) == 4
    assert len({tuple(sorted(order)) for order in orders}) == 1
    again = ready(num_clients=5)
    assert [tuple(indices(again.client_batches(client, *call))) for call in calls] == orders


def test_clients_of_one_size_have_orders_of_their_own():
    data = ready(partitioner=IidPartitioner(2), num_clients=2, client_val_fraction=0.0)
    moves = []
    for client in data.clients():
        first, second = (indices(data.client_batches(client, Round(0), epoch)) for epoch in (0, 1))
        moves.append([first.index(row) for row in second])
    assert len(moves[0]) == len(moves[1]) == 647
    assert moves[0] != moves[1]


def test_the_seed_of_the_data_counts(digits):
    other = ready(num_clients=5, seed=1)
    assert indices(other.val_dataloader()) != indices(digits.val_dataloader())
    assert sorted(indices(other.test_dataloader())) == sorted(indices(digits.test_dataloader()))


def test_validation_order_is_fixed(digits):
    client = digits.clients()[0]
    assert indices(digits.client_val_batches(client)) == indices(digits.client_val_batches(client))
    assert indices(digits.val_dataloader()) == indices(digits.val_dataloader())


def test_pool_is_reshuffled_each_epoch(digits):
    loader, other = digits.train_dataloader(), digits.train_dataloader()
    first, second = indices(loader), indices(loader)
    assert first != second
    assert sorted(first) == sorted(second)
    assert [indices(other), indices(other)] == [first, second]
    other.sampler.set_epoch(0)  # as Lightning does on resume
    assert indices(other) == first


def test_no_client_validation():
    data = ready(num_clients=5, client_val_fraction=0.0, val_fraction=0.0)
    assert all(not list(data.client_val_batches(client)) for client in data.clients())
    assert sum(client.num_samples for client in data.clients()) == 1797 - 359
    assert list(data.val_dataloader()) == []


def test_a_client_with_one_row_trains_on_it():
    data = ready(
        source=Hospitals(), partitioner=IidPartitioner(45), num_clients=45, client_val_fraction=0.9
    )
    assert {client.num_samples for client in data.clients()} == {1}


def test_sites_and_unequal_pictures():
    source = Hospitals()
    data = ready(source=source, partitioner=NaturalIdPartitioner("site"), num_clients=3)
    assert [client.name for client in data.clients()] == ["north", "south", "west"]
    for i, client in enumerate(data.clients()):
        batch = next(data.client_batches(client, Round(0), 0))
        assert set((batch["index"] % 3).tolist()) == {i}
        # A picture of one level stays so when resized and cut.
        expected = batch["index"].view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
        assert torch.equal(batch["image"].long(), expected)
    assert (data.class_names, data.num_classes) == (["nothing", "something"], 2)
    assert data.templates == ["a scan of {}."]


def test_setup_reads_once_per_preprocess():
    source = Hospitals()
    data = ready(source=source, partitioner=IidPartitioner(2))
    assert source.asked == ["prepare", "load", *range(60)]
    data.setup("fit")
    data.setup("test")
    assert len(source.asked) == 62
    data.preprocess = ImagePreprocess(8, True, (0.5,) * 3, (0.5,) * 3)
    data.setup("fit")
    assert next(iter(data.test_dataloader()))["image"].shape == (10, 3, 8, 8)


def test_the_constructor_touches_nothing():
    source = Hospitals()
    data = FederatedDataModule(source=source, num_clients=2)
    assert source.asked == []
    assert isinstance(FederatedDataModule().source, Digits)
    with pytest.raises(RuntimeError, match=r"Call prepare_data\(\) and setup\(\) first"):
        data.clients()
    with pytest.raises(RuntimeError, match=r"Call prepare_data\(\) and setup\(\) first"):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_clients": 0}, "num_clients must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eval_batch_size": -1}, "eval_batch_size must be at least 1, got -1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"val_fraction": 1.0}, "val_fraction must be at least 0 and less than 1, got 1.0"),
        ({"client_val_fraction": -0.1}, "client_val_fraction must be at least 0 .* got -0.1"),
        ({"client_test_fraction": 1.0}, "client_test_fraction must be at least 0 .* got 1.0"),
        ({"test_fraction": 1.5}, "test_fraction must be at least 0 and less than 1, got 1.5"),
        ({"n_shots": 0}, "n_shots must be at least 1, got 0"),
        ({"cache_gb": -1.0}, "cache_gb must be at least 0, got -1.0"),
        ({"cache_gb": float("nan")}, "cache_gb must be at least 0, got nan"),
        (
            {"partitioner": IidPartitioner(4), "num_clients": 5},
            r"num_clients is 5 but IidPartitioner makes 4 partitions \(num_partitions=4\)",
        ),
        (
            {"partitioner": DirichletPartitioner(4, "label", 0.3), "num_clients": 10},
            "num_clients is 10 but DirichletPartitioner makes 4",
        ),
    ],
)
def test_constructor_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        FederatedDataModule(**arguments)


def test_without_preprocess():
    with pytest.raises(ValueError, match="preprocess must be an ImagePreprocess, got None"):
        FederatedDataModule().setup()


@pytest.mark.parametrize("wrong", [2, -1])
def test_labels_out_of_range(wrong):
    labels = np.arange(60) % 2
    labels[7] = wrong
    with pytest.raises(ValueError, match=r"labels must be between 0 and 1 \(there are 2 class"):
        ready(source=Hospitals(labels), num_clients=2)


def test_public_names():
    for name in fedlora.data.__all__:
        assert getattr(fedlora.data, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Folders'"):
        _ = fedlora.data.Folders


class Spy(pl.LightningModule):
    preprocess = PREPROCESS

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 16 * 16, 10)
        self.seen = {"train": [], "val": [], "test": [], "predict": []}

    def _step(self, batch, stage):
        self.seen[stage].append(batch["index"].tolist())
        logits = self.layer(self.preprocess.normalise(batch["image"]).flatten(1))
        return torch.nn.functional.cross_entropy(logits, batch["label"])

    def training_step(self, batch):
        return self._step(batch, "train")

    def validation_step(self, batch):
        self._step(batch, "val")

    def test_step(self, batch):
        self._step(batch, "test")

    def predict_step(self, batch):
        return self._step(batch, "predict")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_plain_lightning_trainer_takes_it():
    data, spy = FederatedDataModule(num_clients=5), Spy()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(spy, datamodule=data)
    trainer.test(spy, datamodule=data, verbose=False)
    trainer.predict(spy, datamodule=data)
    flat = {stage: list(chain(*batches)) for stage, batches in spy.seen.items()}
    total = sum(client.num_samples for client in data.clients())
    first, second = flat["train"][:total], flat["train"][total:]
    assert len(set(first)) == len(first) == total
    assert sorted(first) == sorted(second)
    assert first != second
    assert {len(batch) for batch in spy.seen["train"][:-1]} == {32, total % 32}
    assert flat["val"] == indices(data.val_dataloader()) * 2
    assert flat["test"] == flat["predict"] == indices(data.test_dataloader())


NUM = ("data.num_clients", "data.partitioner.init_args.num_partitions")
SEED = ("data.seed", "data.partitioner.init_args.seed")


def parse(*arguments, links=(NUM, SEED)):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FederatedDataModule, "data")
    for link in links:
        parser.link_arguments(*link)
    config = parser.parse_args([f"--data.{argument}" for argument in arguments])
    # LightningCLI still calls the old name.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    return instantiate(config).data


@pytest.mark.parametrize("key", ["num_partitions", "init_args.num_partitions"])
@pytest.mark.parametrize("name", ["IidPartitioner", "flwr_datasets.partitioner.IidPartitioner"])
@pytest.mark.parametrize("class_path", ["", ".class_path"])
def test_partitioner_by_class_path(class_path, name, key):
    data = parse(
        f"partitioner{class_path}={name}", f"partitioner.{key}=4", "num_clients=4", links=()
    )
    assert isinstance(data.partitioner, IidPartitioner)
    assert data.partitioner.num_partitions == 4


DIRICHLET = ("DirichletPartitioner", "partition_by=label", "alpha=0.3")


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("DirichletPartitioner", ["partition_by=label", "alpha=0.3"], {"_seed": 5}),
        ("IidPartitioner", [], {}),
        ("ShardPartitioner", ["partition_by=label", "num_shards_per_partition=2"], {"_seed": 5}),
    ],
)
def test_links_reach_the_partitioner(name, arguments, expected):
    given = [f"partitioner.{argument}" for argument in arguments]
    data = parse(f"partitioner={name}", *given, "num_clients=7", "seed=5")
    assert (data.num_clients, data.seed) == (7, 5)
    found = vars(data.partitioner)
    assert {key: found[key] for key in ("_num_partitions", *expected)} == {
        "_num_partitions": 7,
        **expected,
    }


def test_links_pass_by_a_partitioner_without_such_arguments():
    data = parse("partitioner=NaturalIdPartitioner", "partitioner.partition_by=site", "seed=5")
    assert isinstance(data.partitioner, NaturalIdPartitioner)
    assert parse("num_clients=7").partitioner is None


def test_a_link_wins_over_what_was_typed():
    data = parse("partitioner=IidPartitioner", "partitioner.num_partitions=3", "num_clients=7")
    assert data.partitioner.num_partitions == 7


def test_without_the_link_the_number_is_asked_for_or_compared():
    with pytest.raises(ArgumentError, match="arguments are required: num_partitions"):
        parse("partitioner=IidPartitioner", links=())
    with pytest.raises(ValueError, match="num_clients is 10 but IidPartitioner makes 3"):
        parse(
            "partitioner=IidPartitioner",
            "partitioner.num_partitions=3",
            "num_clients=10",
            links=(),
        )


def test_source_by_short_name():
    data = parse("source=Digits", "source.test_fraction=0.3", "source.templates=['a {}.']")
    assert (data.source.test_fraction, data.templates) == (0.3, ["a {}."])


def test_without_a_number_there_are_as_many_as_sites_or_ten_or_the_partitioner_makes():
    assert [client.name for client in ready(source=Hospitals()).clients()] == [
        "north",
        "south",
        "west",
    ]
    assert len(ready().clients()) == 10
    assert len(ready(partitioner=IidPartitioner(4)).clients()) == 4


def test_links_without_a_number_of_clients():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--seed_everything", type=int, default=7)
    parser.add_class_arguments(FederatedDataModule, "data")
    link_partitioner(parser)
    config = parser.parse_args(["--data.partitioner=IidPartitioner"])
    data = parser.instantiate(config).data
    assert (data.partitioner.num_partitions, data.num_clients, data.seed) == (10, None, 7)


def test_what_a_batch_is_called(digits):
    batch = next(digits.test_dataloader().__iter__())
    assert digits.keys(batch["index"]) == [str(i) for i in batch["index"].tolist()]
    data = ready(source=Hospitals())
    assert data.keys(torch.tensor([3, 0])) == ["03.png", "00.png"]


def test_class_counts_are_those_of_the_training_rows(digits):
    labels = torch.cat([batch["label"] for batch in digits.train_dataloader()])
    assert digits.class_counts() == torch.bincount(labels).tolist()


class Broken(Hospitals):
    """Rows 4 and 30 cannot be read."""

    def read(self, rows):
        images = super().read(rows)
        return [
            BadImageError("it is torn") if r in (4, 30) else i
            for r, i in zip(rows, images, strict=True)
        ]


def test_a_picture_that_cannot_be_read():
    with pytest.raises(
        ValueError, match=r"picture 04.png and 1 more: it is torn\. Mend or remove it, or set"
    ):
        ready(source=Broken())
    data = ready(source=Broken(), on_bad_image="skip")
    assert data.holdings.skipped == {"04.png": "it is torn", "30.png": "it is torn"}
    rows = [*indices(data.train_dataloader()), *indices(data.test_dataloader())]
    rows += indices(data.val_dataloader())
    rows += [i for c in data.clients() for i in indices(data.client_val_batches(c))]
    assert sorted(rows) == [i for i in range(60) if i not in (4, 30)]
    assert "2 unreadable, left out" in data.holdings.summary()


def test_who_gets_what_without_pictures():
    source = Broken()
    data = FederatedDataModule(source=source)
    data.prepare_data()
    _, division = data.divide()
    assert source.asked == ["prepare", "load"]
    parts = [*division.train, *division.client_val, division.val, division.test]
    assert sum(map(len, parts)) == 60
    skipping = FederatedDataModule(source=Broken(), on_bad_image="skip")
    skipping.preprocess = PREPROCESS
    _, division = skipping.divide()
    assert not {4, 30} & set(np.concatenate([*division.train, division.val]).tolist())


def test_held_out_and_few():
    data = ready(source=Hospitals(), hold_out="south", n_shots=3)
    assert {i % 3 for i in indices(data.test_dataloader())} == {1}
    assert len(indices(data.test_dataloader())) == 20
    # West's training rows are all of one class.
    assert [client.num_samples for client in data.clients()] == [6, 3]


def test_training_pictures_are_changed_and_others_not():
    plain, data = ready(), ready(augment=Augmentation(flip=1, crop_scale=None))
    client = data.clients()[0]
    for batches in ("client_batches", "train_dataloader"):
        args = (client, Round(0), 0) if batches == "client_batches" else ()
        first = next(iter(getattr(plain, batches)(*args)))
        flipped = next(iter(getattr(data, batches)(*args)))
        assert torch.equal(first["index"], flipped["index"])
        assert torch.equal(first["image"].flip(-1), flipped["image"])
    for batches in ("test_dataloader", "val_dataloader"):
        pairs = zip(getattr(plain, batches)(), getattr(data, batches)(), strict=True)
        assert all(torch.equal(a["image"], b["image"]) for a, b in pairs)
    held = zip(plain.client_val_batches(client), data.client_val_batches(client), strict=True)
    assert all(torch.equal(a["image"], b["image"]) for a, b in held)


def pictures(batches):
    """Row -> its pixels."""
    return {
        int(i): image
        for batch in batches
        for i, image in zip(batch["index"], batch["image"], strict=True)
    }


def differ(one, other):
    return sum(not torch.equal(one[row], other[row]) for row in one) > len(one) // 2


def test_changes_are_a_function_of_seed_round_client_and_epoch():
    data = ready(augment=Augmentation())
    client = data.clients()[0]
    first = pictures(data.client_batches(client, Round(0), 0))
    for call in ((Round(1), 0), (Round(0), 1), (Round(0, seed=1), 0)):
        assert differ(first, pictures(data.client_batches(client, *call)))
    # Whatever the size of a batch.
    again = ready(augment=Augmentation(), batch_size=7)
    same = pictures(again.client_batches(client, Round(0), 0))
    assert all(torch.equal(first[row], same[row]) for row in first)


def test_the_pool_changes_from_epoch_to_epoch():
    data = ready(augment=Augmentation())
    loader = data.train_dataloader()
    first, second = pictures(loader), pictures(loader)
    assert differ(first, second)
    loader.sampler.set_epoch(0)
    again = pictures(loader)
    assert all(torch.equal(first[row], again[row]) for row in first)


def test_client_is_plain_data(digits):
    assert digits.clients()[0] == Client(0, digits.clients()[0].num_samples)
