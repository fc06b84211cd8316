"""Clients with models of their own: what never travels, what a kill leaves, what is served."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from fedlora import (
    AdapterAveraging,
    FederatedTrainer,
    LoRAConfig,
    RoundCheckpoint,
    artefacts,
    files,
    identity,
)
from fedlora.aggregation import (
    Aggregator,
    FedAdam,
    FedAvg,
    FedSALoRA,
    Local,
    LocalHead,
    LocalNorm,
    LocalOnly,
    RoLoRA,
)
from fedlora.callbacks.base import FederatedCallback
from fedlora.callbacks.ditto import Ditto
from fedlora.callbacks.scaffold import SCAFFOLD
from fedlora.checkpoint import load
from fedlora.data import Digits
from fedlora.distributed.world import World
from fedlora.modules.loading import load_clip
from fedlora.personal import ClientStore, Kept, Storage
from fedlora.rounds import Rounds
from fedlora.run_folder import CHECKPOINTS, RunFolder
from fedlora.sampling import derive_seed
from fedlora.state import AdapterState, ServerState
from tests.runs import (
    KillAtClient,
    Killed,
    assert_same_bits,
    fingerprint,
    make_data,
    make_model,
    make_trainer,
    rows,
)

SGD = partial(torch.optim.SGD, lr=0.05)
ADAMW = partial(torch.optim.AdamW, lr=5e-3)
QUICK = {
    "source": Digits(test_fraction=0.02),
    "batch_size": 8,
    "val_fraction": 0.02,
    "client_val_fraction": 0.05,
    "client_test_fraction": 0.05,
}
# Of 6 clients: 2 4, 0 4, 0 3, 2 3. So 2 sits out twice and comes back, 1 and 5 never play.
UNSEEN = (1, 5)


@dataclass(frozen=True)
class Method:
    """A personal method, and which names stay with a client under it."""

    rule: Callable[[], Aggregator]
    stays: Callable[[str], bool]
    callbacks: tuple[type[Any], ...] = ()
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: Any = ADAMW
    extra: int = 0  # bytes beside the payload in units of it
    own: bool = True  # whether each client is served a model of its own


LAYER = "vision_model.encoder.layers.0.mlp.fc1"
NORM = {"lora": LoRAConfig(r=4, lora_alpha=8, train_norm=True)}
METHODS = {
    "FedSALoRA": Method(FedSALoRA, lambda name: name.startswith("B/")),
    "LocalHead": Method(LocalHead, lambda name: name.startswith("other/classifier.")),
    "Local": Method(
        lambda: Local(FedAvg(), [f"[AB]/{LAYER}", "other/*bias"]),
        lambda name: name.endswith((LAYER, "bias")),
    ),
    "LocalNorm": Method(LocalNorm, lambda name: "norm" in name, model=NORM),
    "LocalOnly": Method(LocalOnly, lambda name: True),
    "Ditto": Method(FedAvg, lambda name: False, (Ditto,)),
    "SCAFFOLD": Method(FedAvg, lambda name: False, (SCAFFOLD,), optimizer=SGD, extra=1, own=False),
    "FedAdam": Method(lambda: FedAdam(FedSALoRA()), lambda name: name.startswith("B/")),
}
OWN = [name for name, method in METHODS.items() if method.own]


class Watch(FederatedCallback):
    """What leaves each client, and what is loaded where it starts and kept where it ends."""

    def __init__(self) -> None:
        self.updates: list[tuple[int, Any]] = []
        self.starts: dict[tuple[int, int, bool], dict[str, Tensor]] = {}
        self.ends: dict[tuple[int, int], dict[str, Tensor]] = {}
        self.announced: Any = None
        self.first: AdapterState

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.announced, self.first = trainer.rounds.storage(), trainer.server.adapter

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        lane = trainer.lane
        if lane.step == 0:  # its first batch: no step was taken yet
            key = trainer.server.round_idx, lane.client.id, lane.own
            found = {name: p.detach().clone() for name, p in lane.parameters.items()}
            if not lane.own:
                found |= {f"memory/{name}": value for name, value in lane.memory.items()}
            self.starts[key] = found

    def on_client_end(self, trainer: Any, pl_module: Any, update: Any) -> None:
        self.updates.append((trainer.server.round_idx, update))
        # The last that it trained is still in the model.
        ended = dict(pl_module.lora.state().tensors())
        own = bool(trainer.rounds.engine.own_objectives)
        found = {f"own/{name}" if own else name: value for name, value in ended.items()}
        found |= {f"memory/{name}": value for name, value in trainer.lane.memory.items()}
        self.ends[trainer.server.round_idx, update.client.id] = found


def make(
    root: Path, name: str, *callbacks: Any, **settings: Any
) -> tuple[FederatedTrainer, Any, Any]:
    method = METHODS[name]
    usual: dict[str, Any] = {
        "max_rounds": 4,
        "clients_per_round": 2,
        "limit_train_batches": 2,
        "callbacks": [*(each() for each in method.callbacks), *callbacks],
    }
    trainer = make_trainer(root, method.rule(), **(usual | settings))
    model = make_model(**method.model)
    model.optimizer = method.optimizer
    return trainer, model, make_data(num_clients=6, **QUICK)


def play(
    root: Path, name: str, *callbacks: Any, ckpt_path: str | None = None, **settings: Any
) -> FederatedTrainer:
    trainer, model, data = make(root, name, *callbacks, **settings)
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return trainer


Runs = Callable[[str], tuple[FederatedTrainer, Watch]]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    found: dict[str, tuple[FederatedTrainer, Watch]] = {}

    def get(name: str) -> tuple[FederatedTrainer, Watch]:
        if name not in found:
            watch = Watch()
            found[name] = play(tmp_path_factory.mktemp(name), name, watch), watch
        return found[name]

    return get


def kept_of(trainer: FederatedTrainer, id_: int) -> dict[str, Tensor]:
    return load_file(trainer.run.clients / str(id_) / f"{trainer.server.versions[id_]}.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[name]) for name, value in one.items())


# What never travels, and what stays.


@pytest.mark.parametrize("name", METHODS)
def test_what_stays_never_travels(played: Runs, name: str) -> None:
    trainer, watch = played(name)
    stays = METHODS[name].stays
    everything = dict(trainer.server.adapter.tensors())
    shared = {each for each in everything if not stays(each)}
    assert (shared < everything.keys()) == any(map(stays, everything))
    nbytes = sum(everything[each].nbytes for each in shared)
    assert len(watch.updates) == 8
    for _, update in watch.updates:
        assert {each for each, _ in update.payload.tensors()} == shared
        assert update.payload.nbytes == nbytes
        extra = METHODS[name].extra
        assert set(update.extra) == ({f"control/{each}" for each in shared} if extra else set())
        assert update.nbytes == nbytes * (1 + extra)
        assert not update.payload.residual
        assert not update.payload.added
        # What the server knows of the client has nothing of its own either.
        for each, value in update.sent.tensors():
            if stays(each):
                assert torch.equal(value, dict(watch.first.tensors())[each])
    for row in rows(trainer.run.clients_csv):
        assert int(row["up_bytes"]) == nbytes * (1 + extra)
    for each, value in everything.items():
        assert torch.equal(value, dict(watch.first.tensors())[each]) is stays(each), each


@pytest.mark.parametrize("name", METHODS)
def test_a_client_that_sat_out_finds_what_it_left(played: Runs, name: str) -> None:
    trainer, watch = played(name)
    last: dict[int, int] = {}
    gaps = set()
    for idx, update in watch.updates:
        id_ = update.client.id
        if id_ in last:
            gaps.add(idx - last[id_])
            before = watch.ends[last[id_], id_]
            starts = watch.starts[idx, id_, False]
            starts = starts | {
                f"own/{each}": value
                for each, value in watch.starts.get((idx, id_, True), {}).items()
            }
            found = {
                each
                for each in starts
                if each.startswith(("own/", "memory/")) or METHODS[name].stays(each)
            }
            assert found
            for each in found:
                assert torch.equal(starts[each], before[each]), each
        last[id_] = idx
    assert gaps == {1, 3}  # one that came back at once, one that sat out twice
    assert trainer.server.versions == {id_: idx + 1 for id_, idx in last.items()}
    for id_, idx in last.items():  # what is on disk is what it ended with
        kept, ended = kept_of(trainer, id_), watch.ends[idx, id_]
        assert {each for each in kept if not each.startswith(("own/", "memory/"))} == {
            each for each in ended if METHODS[name].stays(each)
        }
        assert same(kept, {each: ended[each] for each in kept})


# What a client that never played is served.


def loaded(trainer: FederatedTrainer, id_: int) -> dict[str, Tensor]:
    rounds = trainer.rounds
    rnd = rounds.round(trainer.server.round_idx)
    rounds.engine.load_own(rounds.clients[id_], rnd, trainer.server, rounds.rule)
    return dict(rounds.engine.lora.state().tensors())


@pytest.mark.parametrize("name", METHODS)
def test_a_client_that_never_played_is_served_the_common_model(played: Runs, name: str) -> None:
    trainer, watch = played(name)
    common, first = (dict(each.tensors()) for each in (trainer.server.adapter, watch.first))
    for id_ in UNSEEN:
        theirs = loaded(trainer, id_)
        assert same(theirs, common)
        for each, value in theirs.items():
            if METHODS[name].stays(each):
                assert torch.equal(value, first[each]), each
    seen = trainer.server.versions.keys()
    assert seen == {0, 2, 3, 4}
    for id_ in seen:
        assert same(loaded(trainer, id_), common) is not METHODS[name].own
    folder = trainer.run.path / "adapters"
    names = {path.name for path in folder.glob("*")}
    assert names == ({str(id_) for id_ in seen} if METHODS[name].own else set())
    assert not any((trainer.run.clients / str(id_)).exists() for id_ in UNSEEN)


def pixels_of(trainer: FederatedTrainer) -> Tensor:
    batch = next(iter(trainer.datamodule.test_dataloader()))["image"]
    return trainer.lightning_module.model.preprocess.normalise(batch)


def test_without_b_it_is_the_base_model_under_the_common_head(played: Runs) -> None:
    trainer, _ = played("FedSALoRA")
    theirs = loaded(trainer, UNSEEN[0])
    assert not any(value.any() for name, value in theirs.items() if name.startswith("B/"))
    pixels, model = pixels_of(trainer), trainer.lightning_module.model.eval()
    features = load_clip("tiny-clip").get_image_features(pixel_values=pixels).pooler_output
    features = torch.nn.functional.normalize(features, dim=-1)
    head = (theirs[f"other/classifier.{name}"] for name in ("weight", "bias"))
    want = torch.nn.functional.linear(features, *head)
    with torch.no_grad():
        assert (model(pixels) - want).abs().max() < 1e-5


# A kill in the middle of the second round.


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {
            k: v for key, each in value.items() for k, v in flat(each, f"{prefix}/{key}").items()
        }
    return {prefix: value}


@pytest.mark.parametrize("name", ["Ditto", "SCAFFOLD", "LocalHead", "FedAdam"])
def test_killed_and_resumed_to_the_same_bits(tmp_path: Path, played: Runs, name: str) -> None:
    whole, _ = played(name)
    with pytest.raises(Killed):
        play(tmp_path, name, KillAtClient(3))
    resumed = play(tmp_path, name, ckpt_path="last")
    one, other = whole.run, resumed.run
    assert_same_bits(fingerprint(one.path), fingerprint(other.path))
    assert sizes(one) == sizes(other)
    for file in sizes(one):
        assert (one.clients / file).read_bytes() == (other.clients / file).read_bytes()
    saved, again = (load(run.checkpoint("last")) for run in (one, other))
    assert saved.server.versions == again.server.versions
    assert saved.server.received == again.server.received
    assert saved.identity == again.identity
    for first, second in ((saved.rule, again.rule), (saved.callbacks, again.callbacks)):
        assert_same_bits(flat(first), flat(second))
    state = flat(saved.rule) if name == "FedAdam" else flat(saved.callbacks)
    tensors = sum(isinstance(value, Tensor) for value in state.values())
    assert (tensors > 0) is (name in ("FedAdam", "SCAFFOLD"))
    for path in sorted((one.path / "adapters").glob("*/*.safetensors")):
        there = other.path / path.relative_to(one.path)
        assert path.read_bytes() == there.read_bytes()


# What is exported, and how it is judged.


@pytest.mark.parametrize("name", ["Ditto", "LocalHead", "FedSALoRA"])
def test_peft_serves_each_client_its_own(played: Runs, name: str) -> None:
    trainer, _ = played(name)
    pixels, found = pixels_of(trainer), []
    for id_ in sorted(trainer.server.versions):
        state = loaded(trainer, id_)
        with torch.no_grad():
            served = trainer.lightning_module.model.eval()(pixels)
        folder = trainer.run.path / "adapters" / str(id_)
        peft = PeftModel.from_pretrained(load_clip("tiny-clip"), str(folder)).eval()
        with torch.no_grad():
            features = peft.get_image_features(pixel_values=pixels).pooler_output
        head = load_file(folder / "classifier.safetensors")
        assert torch.equal(head["weight"], state["other/classifier.weight"])
        assert torch.equal(head["bias"], state["other/classifier.bias"])
        features = torch.nn.functional.normalize(features, dim=-1)
        want = torch.nn.functional.linear(features, head["weight"], head["bias"])
        assert (served - want).abs().max() < 1e-5
        found.append(served)
    assert all((one - two).abs().max() > 1e-3 for one, two in pairwise(found))
    # The common one is under adapter/, with the head of the start where that is not shared.
    head = load_file(trainer.run.adapter / "classifier.safetensors")
    assert torch.equal(head["weight"], trainer.server.adapter.other["classifier.weight"])


def test_no_personal_export_where_none_is_wanted(tmp_path: Path) -> None:
    averaging = AdapterAveraging(LocalHead(), export_personal=False)
    settings: dict[str, Any] = {"max_rounds": 1, "limit_train_batches": 1}
    trainer = play(tmp_path, "LocalHead", averaging=averaging, **settings)
    assert not (trainer.run.path / "adapters").exists()
    assert (trainer.run.adapter / "adapter_config.json").exists()
    assert set(trainer.server.versions) == {2, 4}


@torch.no_grad()
def accuracies(trainer: FederatedTrainer, server: Any) -> dict[int, tuple[int, float]]:
    """Of each client's test rows, with the model that it has under ``server``, by hand."""
    engine, rule = trainer.rounds.engine, trainer.rounds.rule
    rnd = trainer.rounds.round(server.round_idx)
    module, found = trainer.lightning_module.eval(), {}
    for client in trainer.rounds.clients:
        engine.load_own(client, rnd, server, rule)
        hits = []
        for batch in trainer.datamodule.client_test_batches(client):
            hits += (module(batch["image"]).argmax(1) == batch["label"]).tolist()
        found[client.id] = len(hits), sum(hits) / len(hits)
    engine.lora.load(trainer.server.adapter)
    return found


def test_the_best_checkpoint_has_each_clients_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Best is the second of four rounds: clients have played on since.
    best = RoundCheckpoint("train/loss")
    monkeypatch.setattr(best, "consider", lambda row, _: setattr(best, "best_round", 2))
    trainer = play(tmp_path, "Ditto", best)
    saved = load(trainer.run.checkpoint("best")).server
    assert saved.round_idx == 2
    assert saved.versions != trainer.server.versions
    want = accuracies(trainer, saved)
    assert want != accuracies(trainer, trainer.server)

    again, model, data = make(tmp_path, "Ditto")
    figures = again.test(model, data, "best")
    table = rows(trainer.run.client_test)
    assert [(int(row["id"]), int(row["test_rows"])) for row in table] == [
        (id_, count) for id_, (count, _) in want.items()
    ]
    for row in table:
        assert float(row["acc"]) == pytest.approx(want[int(row["id"])][1], abs=1e-6)
        assert (row["played"] == "True") is (int(row["id"]) in saved.received)
    each = [acc for _, acc in want.values()]
    assert figures["test/clients_acc_mean"] == pytest.approx(sum(each) / 6, abs=1e-6)
    assert figures["test/clients_acc_min"] == pytest.approx(min(each), abs=1e-6)
    rounds = again.rounds
    theirs = rounds.evaluate_clients(rounds.clients, saved, "test")
    assert [score.acc for score in theirs.values()] == [float(row["acc"]) for row in table]
    # The common model is in the model again.
    assert same(dict(model.lora.state().tensors()), dict(saved.adapter.tensors()))


@pytest.mark.parametrize("name", ["FedSALoRA", "LocalHead", "Ditto", "SCAFFOLD"])
def test_the_best_round_is_that_of_what_clients_use(played: Runs, name: str) -> None:
    trainer, _ = played(name)
    column, other = "clients/acc_mean", "val/acc"
    if not METHODS[name].own:
        column, other = other, column
    values = [row[column] for row in trainer.server.history]
    saved = load(trainer.run.checkpoint("best")).server
    assert saved.round_idx == values.index(max(values))
    best = RoundCheckpoint()
    for number, value in enumerate((0.1, 0.9, 0.5)):
        row = {"round": number, column: value, other: 1 - value}
        best.on_round_evaluated(trainer, None, row)  # type: ignore[arg-type]
    assert (best.best_round, best.best_value) == (1, 0.9)


def test_the_table_of_clients_is_of_their_own_models(played: Runs) -> None:
    trainer, _ = played("LocalHead")
    table = rows(trainer.run.client_test)
    found = {int(row["id"]): (int(row["test_rows"]), float(row["acc"])) for row in table}
    want = accuracies(trainer, trainer.server)
    assert found.keys() == want.keys()
    for id_, (count, acc) in want.items():
        assert found[id_] == (count, pytest.approx(acc, abs=1e-6))
    assert {int(row["id"]) for row in table if row["played"] == "False"} == set(UNSEEN)
    for row, client in zip(table, trainer.rounds.clients, strict=True):
        assert (row["name"], int(row["samples"])) == (client.name, client.num_samples)


# The disk.


def sizes(run: RunFolder) -> dict[str, int]:
    return {
        str(path.relative_to(run.clients)): path.stat().st_size
        for path in run.clients.glob("*/*")
        if path.is_file()
    }


def named(run: RunFolder) -> set[str]:
    """The files that a checkpoint on disk names."""
    saved = [load(path) for name in CHECKPOINTS if (path := run.checkpoint(name)).exists()]
    pairs = {pair for each in saved for pair in each.server.versions.items()}
    return {f"{id_}/{version}.safetensors" for id_, version in pairs}


@pytest.mark.parametrize("name", ["FedSALoRA", "Ditto", "SCAFFOLD", "LocalNorm", "LocalOnly"])
def test_the_announced_size_is_that_of_the_files(played: Runs, name: str) -> None:
    trainer, watch = played(name)
    announced = watch.announced
    assert set(sizes(trainer.run).values()) == {announced.each}
    assert (announced.clients, announced.cohort) == (6, 2)
    assert announced.all == 6 * announced.each
    assert announced.most == 2 * 8 * announced.each
    assert not announced.lacking


def test_the_announced_size_where_the_factors_take_turns(tmp_path: Path) -> None:
    watch = Watch()
    averaging = AdapterAveraging(RoLoRA())
    settings: dict[str, Any] = {"max_rounds": 2, "clients_per_round": None}
    trainer = play(tmp_path, "Ditto", watch, averaging=averaging, **settings)
    found = sizes(trainer.run)
    assert {size for file, size in found.items() if "/2." in file} == {watch.announced.each}
    assert len(found) == 12


class Disk(FederatedCallback):
    """What is there when a round is over, and once what nobody needs is deleted."""

    def __init__(self) -> None:
        self.nbytes: list[int] = []
        self.left_over: dict[int, set[str]] = defaultdict(set)
        self.lacking: dict[int, set[str]] = defaultdict(set)

    def on_round_end(self, trainer: Any, pl_module: Any, row: Any) -> None:
        self.nbytes.append(sum(sizes(trainer.run).values()))

    def look(self, trainer: Any) -> None:
        there, needed = set(sizes(trainer.run)), named(trainer.run)
        self.left_over[trainer.server.round_idx] = there - needed
        self.lacking[trainer.server.round_idx] = needed - there

    def on_round_start(self, trainer: Any, *args: Any) -> None:
        self.look(trainer)

    def on_train_end(self, trainer: Any, *args: Any) -> None:
        self.look(trainer)


def test_the_disk_has_what_a_checkpoint_names_and_never_more_than_announced(
    tmp_path: Path,
) -> None:
    disk, watch = Disk(), Watch()
    settings: dict[str, Any] = {"max_rounds": 8, "limit_train_batches": 1, "clients_per_round": 1}
    trainer = play(tmp_path, "LocalHead", disk, watch, **settings)
    assert len(disk.nbytes) == 9
    assert max(disk.nbytes) <= watch.announced.most
    assert set(disk.lacking) == set(range(9))
    assert not set().union(*disk.lacking.values())
    assert {idx: files for idx, files in disk.left_over.items() if files} == {}
    assert set(sizes(trainer.run)) == named(trainer.run)


def test_a_long_run_never_takes_more_than_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight clients, one a round; the best round is the tenth and later the thirtieth."""
    monkeypatch.setattr(artefacts, "export", lambda *_: None)
    monkeypatch.setattr(files.os, "fsync", lambda *_: None)
    run, kept = RunFolder.create(tmp_path), Kept(AdapterState(B={"x": torch.ones(4, 1)}))
    monkeypatch.setattr(identity, "of", lambda *_: {})
    trainer = MagicMock(config=None, should_stop=False)
    trainer.hooks.state_dict.return_value = {}
    trainer.averaging.aggregator.state_dict.return_value = {}
    store = ClientStore(run.clients)
    engine: Any = SimpleNamespace(store=store, lora=MagicMock(), world=World())
    rounds = Rounds(trainer, run, engine, [])
    storage = Storage(kept.nbytes(), 8, 1, 10**9)
    server, nbytes = ServerState(AdapterState()), []
    for number in range(1, 61):
        client = derive_seed(number) % 8
        engine.store.write(client, number, kept)
        nbytes.append(sum(sizes(run).values()))
        versions = {**server.versions, **engine.store.take_noted()}
        server = replace(server, versions=versions, round_idx=number)
        best = number in (10, 30)
        trainer.call = lambda hook, *_, best=best: (
            rounds.saves.keep_as_best() if hook == "on_round_end" and best else None
        )
        rounds._commit(server, {"round": float(number)})
        assert set(sizes(run)) == named(run)
    assert max(nbytes) <= storage.most
    assert len(server.versions) == 8
