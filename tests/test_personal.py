from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedlora.errors import CheckpointError, FedloraError
from fedlora.personal import ClientStore, Kept
from fedlora.state import AdapterState


def kept(value, rank=2):
    return Kept(AdapterState(B={"fc1": torch.full((3, rank), float(value))}))


def values(state):
    return state.adapter.B["fc1"].unique().tolist()


@pytest.fixture
def store(tmp_path):
    return ClientStore(tmp_path / "clients")


def files(store):
    return sorted(str(p.relative_to(store.folder)) for p in store.folder.rglob("*") if p.is_file())


def test_a_client_without_a_state_has_an_empty_one(store):
    state = store.read(3, {})
    assert state == Kept()
    assert not state


def test_what_was_written_is_read(store):
    adapter = AdapterState(
        A={"fc1": torch.randn(2, 5).t().contiguous().t()},  # not contiguous
        B={"fc1": torch.randn(3, 2)},
        other={"head.weight/x": torch.randn(()), "half": torch.ones(2, dtype=torch.float16)},
    )
    own = AdapterState(A={"fc1": torch.randn(2, 5)})
    state = Kept(adapter, own, {"control/A/fc1": torch.randn(2, 5)})
    store.write(0, 1, state)
    assert store.path(0, 1).stat().st_size == state.nbytes()
    back = store.read(0, {0: 1})
    assert dict(back.tensors()).keys() == dict(state.tensors()).keys()
    for name, tensor in state.tensors():
        got = dict(back.tensors())[name]
        assert torch.equal(got, tensor), name
        assert got.dtype == tensor.dtype


def test_the_version_that_is_named_is_read(store):
    store.write(0, 1, kept(10))
    store.write(0, 2, kept(20))
    assert values(store.read(0, {0: 1})) == [10.0]
    assert values(store.read(0, {0: 2})) == [20.0]
    assert files(store) == ["0/1.safetensors", "0/2.safetensors"]


def test_a_round_that_is_played_again_reads_what_the_first_try_read(store):
    store.write(0, 1, kept(10))
    versions = store.take_noted()
    store.write(0, 2, kept(99))  # the process is killed before its checkpoint
    again = ClientStore(store.folder)
    assert values(again.read(0, versions)) == [10.0]
    again.write(0, 2, kept(20))
    assert {**versions, **again.take_noted()} == {0: 2}
    assert values(again.read(0, {0: 2})) == [20.0]


def test_versions_are_taken_once(store):
    store.write(0, 3, kept(1))
    store.write(2, 3, kept(1))
    before = {0: 1, 1: 2}
    assert {**before, **store.take_noted()} == {0: 3, 1: 2, 2: 3}
    assert before == {0: 1, 1: 2}
    assert {**before, **store.take_noted()} == before


def test_prune_keeps_exactly_what_is_named(store):
    for client in (0, 1):
        for version in (1, 2, 3, 4):
            store.write(client, version, kept(version))
    (store.folder / "0" / ".5.safetensors.123.tmp").write_bytes(b"left by a kill")
    store.prune([{0: 4, 1: 3}, {0: 2}])
    assert files(store) == ["0/2.safetensors", "0/4.safetensors", "1/3.safetensors"]
    assert values(store.read(0, {0: 2})) == [2.0]


def test_what_is_removed_is_gone_and_the_rest_stays(store):
    for client in (0, 1):
        for version in (1, 2):
            store.write(client, version, kept(version))
    store.remove({(0, 1), (1, 2), (7, 1)})
    assert files(store) == ["0/2.safetensors", "1/1.safetensors"]


def test_prune_of_nothing(store):
    store.prune([{0: 1}])
    assert not store.folder.exists()


def remove(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def spoil_header(path):
    content = bytearray(path.read_bytes())
    content[12] ^= 0xFF
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def another_file(path):
    save_file({"weight": torch.ones(2)}, path)


def another_part(path):
    save_file({"C/fc1": torch.ones(2)}, path)


@pytest.mark.parametrize("damage", [remove, cut, spoil_header, empty, another_file, another_part])
def test_a_damaged_file_is_one_clear_line(store, damage):
    store.write(4, 2, kept(1))
    path = store.folder / "4" / "2.safetensors"
    damage(path)
    with pytest.raises(CheckpointError, match="state of client 4 cannot be read from") as caught:
        store.read(4, {4: 2})
    assert str(path) in str(caught.value)
    assert "Restore that file, or start a new run." in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_failed_write_leaves_the_old_version(store, monkeypatch):
    store.write(0, 1, kept(10))
    store.take_noted()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FedloraError, match="No space left on device"):
        store.write(0, 1, kept(99))
    assert values(store.read(0, {0: 1})) == [10.0]
    assert files(store) == ["0/1.safetensors"]
    assert store.take_noted() == {}  # what was not written is not in force


def test_an_unwritable_folder_is_one_clear_line(store, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(FedloraError, match="Read-only file system"):
        store.write(0, 1, kept(1))
