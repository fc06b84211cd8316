from __future__ import annotations

import errno
import os
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch

from fedlora.data import BadImageError
from fedlora.data.cache.index import BAD, NO_PIXELS, header, keys_of, read_index, records
from fedlora.errors import FedloraError
from tests.data.scans import PREPROCESS, SLOT, Scans, gb, opened, set_folder


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """A block per chunk, a chunk per few pictures."""
    monkeypatch.setattr("fedlora.data.cache.store._COMMIT_SECONDS", 0.0)
    monkeypatch.setattr("fedlora.data.cache.build._CHUNK", 3)


@pytest.fixture
def source(tmp_path):
    found = Scans(tmp_path / "log", n=10)
    found.bad = {"004.png": BadImageError("truncated")}
    return found


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def pixels(folder):
    (found,) = set_folder(folder).glob("pixels-*")
    return found


# The index.


def test_the_format(tmp_path):
    keys = keys_of(np.array(["a", "b", "c"]), np.array(["1", "2", "3"], np.str_))
    path = tmp_path / "index"
    assert read_index(path, "set") is None
    path.write_bytes(
        header("set", "pixels-2.u8")
        + records({keys[0]: 0, keys[1]: BAD}, {keys[1]: "why"})
        + records({keys[2]: NO_PIXELS, keys[1]: 7}, {})
    )
    found = read_index(path, "set")
    assert (found.pixels, found.end) == ("pixels-2.u8", path.stat().st_size)
    assert found.find([keys[1], keys[0], keys[2], b"?" * 24]).tolist() == [7, 0, -1, -3]
    assert found.reasons == {}
    assert read_index(path, "another") is None
    assert {len(key) for key in keys} == {24}
    other = keys_of(np.array(["a"]), np.array(["2"], np.str_))[0]
    assert (other[:16], other[16:]) == (keys[0][:16], keys[1][16:])


@pytest.mark.parametrize("name", ["../../etc/passwd", "pixels-1.u8/..", 3, None])
def test_a_header_that_names_something_else(tmp_path, name):
    (tmp_path / "index").write_bytes(header("set", name))
    assert read_index(tmp_path / "index", "set") is None


# Torn and damaged files.


def damage(source, folder, path, contents):
    """Whatever a file is turned into: right pictures, no more read than need be, then whole."""
    whole = {file: file.read_bytes() for file in set_folder(folder).iterdir() if file.is_file()}
    counts = []
    for content in contents:
        shutil.rmtree(set_folder(folder))
        set_folder_path = path.parent
        set_folder_path.mkdir()
        for file, data in whole.items():
            file.write_bytes(data)
        path.write_bytes(content)
        pictures = opened(source, folder)
        counts.append(len(source.asked()))
        assert source.right(pictures)
        assert pictures.bad == {4: "truncated"}
        assert source.right(opened(source, folder))
        assert source.asked() == []
    return counts


def test_an_index_cut_off_anywhere(source, folder):
    opened(source, folder)
    source.asked()
    path = set_folder(folder) / "index"
    data = path.read_bytes()
    counts = damage(source, folder, path, [data[:end] for end in range(0, len(data) + 1, 31)])
    assert (counts[0], counts[-1] <= 3) == (10, True)
    assert all(after <= before for before, after in pairwise(counts))
    assert len(set(counts)) >= 4  # block by block


def test_a_byte_of_the_index_turned_anywhere(source, folder):
    opened(source, folder)
    source.asked()
    path = set_folder(folder) / "index"
    data = path.read_bytes()
    turned = [data[:i] + bytes([data[i] ^ 0x41]) + data[i + 1 :] for i in range(0, len(data), 29)]
    assert min(damage(source, folder, path, turned)) >= 1


@pytest.mark.parametrize("content", [b"", b"FLPX", b"\0" * 5000, b"{}", os.urandom(999)])
def test_an_index_that_is_none(source, folder, content):
    opened(source, folder)
    source.asked()
    assert damage(source, folder, set_folder(folder) / "index", [content]) == [10]


def test_garbage_behind_the_index(source, folder):
    opened(source, folder)
    source.asked()
    path = set_folder(folder) / "index"
    garbage = [b"\0" * 100, b"FLPX", b"FLPX" + b"\xff" * 8, os.urandom(333)]
    assert damage(source, folder, path, [path.read_bytes() + end for end in garbage]) == [0] * 4
    path.write_bytes(path.read_bytes() + b"\0" * 5000)
    source.versions["000.png"] = 1
    opened(source, folder)
    assert source.asked() == ["000.png"]
    assert read_index(path, path.parent.name).end == path.stat().st_size
    assert source.right(opened(source, folder))
    assert source.asked() == []


def test_pixels_cut_off(source, folder):
    opened(source, folder)
    source.asked()
    path = pixels(folder)
    data = path.read_bytes()
    cut = [data[:end] for end in (0, 1, SLOT, 5 * SLOT - 1, 5 * SLOT, 9 * SLOT - 1)]
    assert damage(source, folder, path, cut) == [9, 9, 8, 5, 4, 1]
    assert damage(source, folder, path, [data + b"12"]) == [0]


def test_what_comes_after_cut_off_pixels_is_not_taken_for_them(source, folder):
    opened(source, folder)
    source.asked()
    os.truncate(pixels(folder), 5 * SLOT)
    source.names = source.names[:5] + [f"1{i:02d}.png" for i in range(5)]
    assert source.right(opened(source, folder))
    source.names = [f"{i:03d}.png" for i in range(10)]
    assert source.right(opened(source, folder))


@pytest.mark.parametrize("name", ["pixels-1.u8", "index", "about.json", "in-work.lock"])
def test_a_file_that_is_gone(source, folder, name):
    opened(source, folder)
    source.asked()
    (set_folder(folder) / name).unlink()
    assert source.right(opened(source, folder))
    assert len(source.asked()) == {"pixels-1.u8": 9, "index": 10}.get(name, 0)


def test_the_files_of_another_set(source, folder, tmp_path):
    opened(source, folder)
    other = Scans(tmp_path / "log", n=10, place="/elsewhere/others")
    other.versions = dict.fromkeys(other.names, 0)
    opened(other, folder)
    source.asked()
    for file in set_folder(folder).iterdir():
        shutil.copy(file, set_folder(folder, "others") / file.name)
    other.bad = {}
    assert other.right(opened(other, folder))
    assert len(other.asked()) == 10


def test_what_a_kill_leaves(source, folder):
    opened(source, folder)
    source.asked()
    where = set_folder(folder)
    for name in ("pixels-7.u8", ".index.123.tmp", "plan"):
        (where / name).write_bytes(b"x" * 1000)
    with (where / "pixels-1.u8").open("ab") as file:
        file.write(b"y" * (2 * SLOT + 5))  # pixels whose record was never written
    source.names.append("100.png")
    assert source.right(opened(source, folder))
    assert source.asked() == ["100.png"]
    names = {path.name for path in where.iterdir()}
    assert names == {"pixels-1.u8", "index", "about.json", "in-work.lock"}
    assert source.right(opened(source, folder))


def test_a_slot_never_changes(source, folder):
    # Even where the index lost records: a process that read them before is still reading.
    early = opened(source, folder)
    index = set_folder(folder) / "index"
    os.truncate(index, len(header(set_folder(folder).name, "pixels-1.u8")))
    source.names = [f"1{i:02d}.png" for i in range(10)]
    opened(source, folder)
    source.names = [f"{i:03d}.png" for i in range(10)]
    assert source.right(early)


def test_pixels_are_on_the_disk_before_the_index_names_them(source, folder, monkeypatch):
    events, pwrite, fsync = [], os.pwrite, os.fsync

    def name(descriptor):
        return os.path.realpath(f"/proc/self/fd/{descriptor}").rpartition("/")[2]

    def write(descriptor, *rest):
        events.append(("write", name(descriptor)))
        return pwrite(descriptor, *rest)

    def flush(descriptor):
        events.append(("flush", name(descriptor)))
        fsync(descriptor)

    monkeypatch.setattr("fedlora.data.cache.store.os.pwrite", write)
    monkeypatch.setattr("fedlora.data.cache.store.os.fsync", flush)
    source.bad = {}
    opened(source, folder)
    named = [i for i, event in enumerate(events) if event == ("write", "index")]
    assert len(named) >= 4
    for i in named:
        assert events[i - 2 : i] == [("write", "pixels-1.u8"), ("flush", "pixels-1.u8")]


# No room, no permission.


def failing(monkeypatch, name, code, after):
    """The nth call of a function of os fails."""
    real, left = getattr(os, name), [after]

    def call(*args):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(code, os.strerror(code))
        return real(*args)

    monkeypatch.setattr(f"fedlora.data.cache.store.os.{name}", call)


@pytest.mark.parametrize("name", ["pwrite", "fsync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("after", [1, 2, 3, 4, 5])
def test_a_disk_that_fills_up_on_the_way(source, folder, monkeypatch, name, code, after):
    failing(monkeypatch, name, code, after)
    with pytest.raises(FedloraError, match=os.strerror(code)) as caught:
        opened(source, folder)
    text = str(caught.value)
    assert text.startswith(f"data.cache_dir: cannot keep pictures in {set_folder(folder)}: ")
    assert "\n" not in text
    assert ("data.cache_gb=X" in text) == (code != errno.EIO)
    assert "data.cache_dir=FOLDER" in text
    monkeypatch.undo()
    source.asked()
    index = read_index(set_folder(folder) / "index", set_folder(folder).name)
    recorded = 0 if index is None else len(index.slots)
    assert (recorded > 0) == (after > {"pwrite": 1, "fsync": 3}[name])
    assert source.right(opened(source, folder))
    assert len(source.asked()) == 10 - recorded


def test_room_for_pixels_ends_before_that_for_the_index(source, folder, monkeypatch):
    real, room = os.pwrite, [5 * SLOT + 50]

    def pwrite(descriptor, data, at):
        if not os.path.realpath(f"/proc/self/fd/{descriptor}").endswith("pixels-1.u8"):
            return real(descriptor, data, at)
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(descriptor, data[: room[0]], at)
        room[0] -= written
        return written

    monkeypatch.setattr("fedlora.data.cache.store.os.pwrite", pwrite)
    monkeypatch.setattr("fedlora.data.cache.store._COMMIT_SECONDS", 1e9)
    with pytest.raises(FedloraError, match="No space left on device"):
        opened(source, folder)
    monkeypatch.undo()
    # What is only a part of a picture gives its room back.
    assert pixels(folder).stat().st_size == 5 * SLOT
    done = len(set(source.names)) - len(set(source.bad)) - 5
    source.asked()
    assert source.right(opened(source, folder))
    assert len(source.asked()) == done


def test_a_nearly_full_disk_takes_a_part(source, folder, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(
        "fedlora.data.cache.store.os.pwrite", lambda d, data, at: real(d, data[:50], at)
    )
    assert source.right(opened(source, folder))
    assert source.right(opened(source, folder))


def test_a_flush_that_failed_is_not_tried_again(source, folder, monkeypatch):
    # Linux says once that pixels were lost; after that it says that all is well.
    real, calls = os.fsync, []

    def once(descriptor):
        calls.append(descriptor)
        if len(calls) == 4:
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    monkeypatch.setattr("fedlora.data.cache.store.os.fsync", once)
    with pytest.raises(FedloraError, match="Input/output error"):
        opened(source, folder)
    # The three files made at the start, and the first chunk.
    assert len(calls) == 4
    slots = read_index(set_folder(folder) / "index", set_folder(folder).name).slots
    assert slots == {}


@pytest.mark.parametrize("where", ["mkdir", "open", "about"])
def test_a_folder_that_cannot_be_written(source, folder, monkeypatch, where):
    if where == "mkdir":
        folder.write_text("a file")
        message = "File exists|Not a directory"
    elif where == "open":
        failing(monkeypatch, "open", errno.EROFS, 0)
        message = "Read-only file system"
    else:
        folder.mkdir()
        monkeypatch.setattr(
            "fedlora.files._write_text", lambda *_: (_ for _ in ()).throw(OSError(13, "No way"))
        )
        message = "No way. Another folder: data.cache_dir=FOLDER"
    with pytest.raises(FedloraError, match=message) as caught:
        opened(source, folder)
    assert "default_root_dir" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("limit", [1.0, gb(5)])
def test_what_another_user_keeps_can_be_used(source, folder, monkeypatch, limit):
    opened(source, folder, limit)
    source.asked()
    real = os.open

    def guarded(path, flags, *args):
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise OSError(errno.EACCES, "Permission denied")
        return real(path, flags, *args)

    monkeypatch.setattr("fedlora.data.cache.folder.os.open", guarded)
    monkeypatch.setattr("os.access", lambda *_: False)
    assert source.right(opened(source, folder))
    source.names.append("100.png")
    with pytest.raises(FedloraError, match="Permission denied"):
        opened(source, folder)
    with pytest.raises(FedloraError, match="Permission denied"):  # a set that is not there
        opened(Scans(source.log, place="/elsewhere"), folder)


# Copied together.


def changed(source, version):
    source.versions = dict.fromkeys(source.names, version)


def test_pixels_of_former_versions_are_left_out(source, folder, monkeypatch):
    monkeypatch.setattr("fedlora.data.cache.build._WASTE_BYTES", 0)
    source.bad = {}
    first = opened(source, folder)
    before = torch.stack([PREPROCESS.resize(source.image(row)) for row in range(10)])
    changed(source, 1)
    second = opened(source, folder)
    assert pixels(folder).stat().st_size == 20 * SLOT  # as much as is needed: worth keeping
    source.asked()
    changed(source, 2)
    del source.versions["003.png"]
    third = opened(source, folder)
    assert sorted(source.asked()) == [name for name in source.names if name != "003.png"]
    assert pixels(folder).name == "pixels-2.u8"
    assert pixels(folder).stat().st_size == 10 * SLOT
    assert source.right(third)
    assert torch.equal(first[torch.arange(10)], before)
    changed(source, 1)
    assert source.right(second)


def test_a_part_of_the_pictures_leaves_the_others_alone(source, folder, monkeypatch):
    monkeypatch.setattr("fedlora.data.cache.build._WASTE_BYTES", 0)
    opened(source, folder)
    names, source.names = source.names, ["100.png", "001.png"]
    opened(source, folder)
    source.names = names
    source.asked()
    assert source.right(opened(source, folder))
    assert source.asked() == []


def test_where_room_is_short_what_is_not_used_makes_way(source, folder):
    source.bad = {}
    opened(source, folder, gb(10))
    names, source.names = source.names, ["100.png", "001.png", "101.png"]
    source.asked()
    pictures = opened(source, folder, gb(11))
    assert len(source.asked()) == 2
    assert source.right(pictures)
    # One fitted, for the other the oldest made way.
    assert pixels(folder).stat().st_size == 11 * SLOT
    source.names = names
    assert source.right(opened(source, folder, gb(12)))
    assert source.asked() == ["000.png"]


@pytest.mark.parametrize("limit", [0.0, gb(3), gb(9)])
def test_a_limit_below_what_is_there_removes_nothing(source, folder, limit):
    source.bad = {}
    opened(source, folder)
    names, source.names = source.names, ["100.png", *source.names[:5]]
    assert source.right(opened(source, folder, limit))
    assert (pixels(folder).name, pixels(folder).stat().st_size) == ("pixels-1.u8", 10 * SLOT)
    source.names = names
    source.asked()
    opened(source, folder, limit)
    assert source.asked() == []


def test_pixels_without_a_record_make_way(source, folder):
    source.bad = {}
    opened(source, folder)
    source.asked()
    with pixels(folder).open("ab") as file:
        file.write(b"y" * (5 * SLOT))
    source.names.append("100.png")
    assert source.right(opened(source, folder, gb(11)))
    assert source.asked() == ["100.png"]
    assert pixels(folder).stat().st_size == 11 * SLOT


def test_a_copy_that_fails_leaves_all_as_it_was(source, folder, monkeypatch):
    monkeypatch.setattr("fedlora.data.cache.build._WASTE_BYTES", 0)
    source.bad = {}
    first = opened(source, folder)
    for version in (1, 2):
        changed(source, version)
        if version == 2:
            failing(monkeypatch, "fsync", errno.ENOSPC, 0)
            with pytest.raises(FedloraError, match="No space left"):
                opened(source, folder)
            monkeypatch.undo()
        else:
            opened(source, folder)
    source.versions = {}
    source.asked()
    assert [path.name for path in set_folder(folder).glob("pixels*")] == ["pixels-1.u8"]
    assert source.right(first)
    assert source.right(opened(source, folder))
    assert source.asked() == []
