from __future__ import annotations

import errno
import hashlib
import io
import os
import pickle
import re
import resource
import struct
from dataclasses import replace

import pytest
import torch

from fedlora import checkpoint
from fedlora.checkpoint import Checkpoint, differences, keep_as, load, save
from fedlora.errors import CheckpointError, FedloraError
from fedlora.state import AdapterState, Residual, ServerState


def content(round_idx=2):
    adapter = AdapterState(
        A={"fc1": torch.arange(1000.0).reshape(2, 500)},
        B={"fc1": torch.full((3, 2), float(round_idx))},
        other={"scale": torch.tensor(3.0)},
        scaling={"fc1": 2.0},
        residual={
            "fc1": Residual(torch.ones(3, 1), torch.ones(1, 500)),
            "fc2": Residual(torch.eye(4)),
        },
    )
    history = ({"round": 0, "val/acc": None}, {"round": 1, "val/acc": 0.5})
    return Checkpoint(
        ServerState(adapter, round_idx, {0: 1, 7: 2}, {0: 3}, history, "early"),
        rule={"class_path": "x.Rule", "state": {"momentum": {"fc1": torch.ones(2)}, "beta": 0.9}},
        callbacks={"Best": {"best_value": 0.5, "best_round": 1}},
        identity={"seed": 3, "class_names": ["a", "b"], "shapes": {"A/fc1": [2, 500]}},
        config={"data": {"num_clients": 5}, "trainer": {"max_rounds": 2}},
    )


def flat(value):
    """Any nesting of what a checkpoint holds, as something that compares."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, tuple(value.shape), value.tolist())
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    return value


def plain(given):
    server = given.server
    adapter = flat(server.adapter.to_dict())
    adapter["residual"] = {
        name: [flat(U), flat(V)] for name, (U, V) in server.adapter.to_dict()["residual"].items()
    }
    rest = [given.rule, given.callbacks, given.identity, given.config, server.versions]
    return [adapter, *map(flat, rest), server.round_idx, server.history, server.finished]


@pytest.fixture
def last(tmp_path):
    return tmp_path / "last.ckpt"


def entries(path):
    return sorted(item.name for item in path.parent.iterdir())


# Saving.


def test_what_is_saved_is_loaded(last):
    save(last, content())
    assert plain(load(last)) == plain(content())


def test_a_run_made_from_python_has_no_config(last):
    save(last, replace(content(), config=None))
    assert load(last).config is None


def test_what_the_file_holds(last):
    save(last, content())
    raw = torch.load(last, weights_only=True)
    assert raw["format"] == 2
    assert raw["round_idx"] == 2
    assert raw["client_versions"] == {0: 1, 7: 2}
    assert {"python", "fedlora", "torch", "lightning", "peft"} <= raw["versions"].keys()


def test_the_one_before_is_kept(last):
    for round_idx in (1, 2, 3):
        save(last, content(round_idx))
    assert load(last).server.round_idx == 3
    assert load(last.with_name("previous.ckpt")).server.round_idx == 2
    assert entries(last) == ["last.ckpt", "previous.ckpt"]


def test_only_last_has_one_before(tmp_path):
    for round_idx in (1, 2):
        save(tmp_path / "other.ckpt", content(round_idx))
    assert entries(tmp_path / "other.ckpt") == ["other.ckpt"]


def test_a_disk_that_ends_leaves_a_whole_checkpoint(last):
    save(last, content(1))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limit[1]))
        with pytest.raises(FedloraError, match=f"cannot write {last}") as caught:
            save(last, content(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "\n" not in str(caught.value)
    assert load(last).server.round_idx == 1
    assert entries(last) == ["last.ckpt"]


def test_an_unwritable_folder_is_one_line(last, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "fsync", read_only)
    with pytest.raises(FedloraError, match="Read-only file system"):
        save(last, content())
    assert entries(last) == []


# A second name.


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_a_second_name_outlives_the_first(last, monkeypatch, links):
    if not links:

        def refuse(*_):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", refuse)
    best = last.with_name("best.ckpt")
    save(last, content(1))
    keep_as(last, best)
    save(last, content(2))
    save(last, content(3))
    assert load(best).server.round_idx == 1
    keep_as(last, best)
    assert load(best).server.round_idx == 3
    assert entries(last) == ["best.ckpt", "last.ckpt", "previous.ckpt"]


def test_giving_the_name_twice_leaves_nothing_behind(last):
    # Renaming one hard link onto another of the same file does nothing: the first stays.
    save(last, content())
    for _ in range(2):
        keep_as(last, last.with_name("best.ckpt"))
    assert entries(last) == ["best.ckpt", "last.ckpt"]


def test_a_name_that_cannot_be_given_is_one_line(last):
    save(last, content())
    with pytest.raises(FedloraError, match=r"cannot write .*best\.ckpt: No such file or directory"):
        keep_as(last, last.parent / "gone" / "best.ckpt")
    assert entries(last) == ["last.ckpt"]


# What cannot be read.


def seal(path):
    """Give a file the checksum at its end that a checkpoint has."""
    content = path.read_bytes()
    if content.startswith(b"PK"):  # a zip file says at its end how long the comment behind it is
        content = content[:-2] + bytes([64, 0])
    path.write_bytes(content + hashlib.sha256(content).hexdigest().encode())


def refused(path, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_checkpoint(last):
    refused(last, "there is no checkpoint")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_cut_checkpoint(last, share):
    save(last, content())
    whole = last.read_bytes()
    last.write_bytes(whole[: int(share * len(whole))])
    refused(last, "is damaged or no checkpoint")


def test_one_changed_bit_of_a_tensor_is_noticed(last):
    # torch.load alone reads 500.00003 without a word.
    save(last, content())
    damaged = bytearray(last.read_bytes())
    damaged[damaged.find(struct.pack("<f", 500.0))] ^= 1
    last.write_bytes(damaged)
    assert torch.load(last, weights_only=True)["adapter"]["A"]["fc1"][1, 0] != 500
    refused(last, "is damaged .*SHA-256")


def test_every_changed_byte_is_noticed(last):
    save(last, content())
    whole = last.read_bytes()
    for position in [*range(0, len(whole), 41), *range(len(whole) - 66, len(whole))]:
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        last.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is damaged"):
            load(last)


def test_a_longer_file_is_noticed(last):
    save(last, content())
    with last.open("ab") as file:
        file.write(b"x")
    refused(last, "is damaged")


@pytest.mark.parametrize("value", [[1, 2], {"weight": torch.ones(2)}, {"format": 2}])
def test_another_file_of_torch(last, value):
    torch.save(value, last)
    refused(last, "is damaged or no checkpoint")
    seal(last)
    refused(last, "is damaged or no checkpoint")


def test_a_file_of_something_else(last):
    last.write_text("round: 3\n")
    refused(last, "is damaged or no checkpoint")


def test_another_format_names_the_version_that_wrote_it(last, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 99)
        patch.setattr(checkpoint, "versions", lambda: {"fedlora": "9.8.7"})
        save(last, content())
    refused(last, r"has format 99, this version reads 2\. Use the version of fedlora .*9\.8\.7")


class Bomb:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_nothing_in_a_checkpoint_is_executed(last, tmp_path, new):
    bomb = Bomb(tmp_path / "executed")
    torch.save({"format": 2, "x": bomb}, last, _use_new_zipfile_serialization=new)
    seal(last)
    refused(last, "is damaged or no checkpoint")
    last.write_bytes(pickle.dumps(bomb, protocol=2))
    seal(last)
    refused(last, "is damaged or no checkpoint")
    assert entries(last) == ["last.ckpt"]
    pickle.load(io.BytesIO(last.read_bytes()))  # it does explode where it is executed
    assert entries(last) == ["executed", "last.ckpt"]


# What may differ.


def test_equal_settings_do_not_differ():
    config = {"data": {"num_clients": 5}, "seed": 1, "empty": {}}
    assert differences(config, {**config}) == []
    assert differences(None, config) == differences(config, None) == []


def test_every_difference_is_named():
    saved = {"data": {"num_clients": 5, "source": {"init_args": {"n": 1}}}, "seed": 1}
    now = {"data": {"num_clients": 6, "source": {"init_args": {"n": 2}}}, "seed": 2}
    assert differences(saved, now) == [
        "data.num_clients: 5 -> 6",
        "data.source.init_args.n: 1 -> 2",
        "seed: 1 -> 2",
    ]


def test_a_setting_on_one_side_only():
    assert differences({"a": {"b": None}}, {"a": {"c": 1}}) == [
        "a.b: None -> 'absent'",
        "a.c: 'absent' -> 1",
    ]
    assert differences({"a": {}}, {"a": {"b": 1}}) == ["a: {} -> 'absent'", "a.b: 'absent' -> 1"]


@pytest.mark.parametrize("free", checkpoint.FREE)
def test_what_changes_no_number_is_free(free):
    def config(value):
        for key in reversed(free.split(".")):
            value = {key: value}
        return value

    assert differences(config(1), config(2)) == []
    assert differences(config(None), config({"init_args": {"x": 1}})) == []


@pytest.mark.parametrize("key", ["max_rounds_x", "devicesx", "local_epochs", "seed"])
def test_a_name_that_only_begins_like_a_free_one_is_not(key):
    assert differences({"trainer": {key: 1}}, {"trainer": {key: 2}}) == [f"trainer.{key}: 1 -> 2"]


def test_the_design_says_what_is_free():
    # design.md, section 4: max_rounds, devices, strategy, lanes, threads, loggers, progress.
    named = ["max_rounds", "devices", "strategy", "lanes", "threads", "logger", "progress"]
    assert {f"trainer.{name}" for name in named} <= set(checkpoint.FREE)
    # And the adapter that a run started from: its checkpoint holds what became of it; where decoded
    # pictures are kept; and what files are derived from the checkpoint.
    derived = {f"trainer.averaging.init_args.export_{what}" for what in ("rank", "personal")}
    apart = {"model.adapter", "data.cache_dir", "data.cache_gb"}
    free = set(checkpoint.FREE) - apart - derived
    assert not [name for name in free if re.match("data|model|trainer.(aver|loc)", name)]
