from __future__ import annotations

import errno
import fcntl
import gc
import os
import re
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest

from fedlora.data import BadImageError, ImagePreprocess
from fedlora.data.cache.folder import SetFolder, hold
from fedlora.errors import FedloraError
from tests.data.scans import (
    PREPROCESS,
    SLOT,
    Scans,
    Told,
    gb,
    in_child,
    opened,
    set_folder,
    until,
    wait,
)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def make(tmp_path):
    return lambda name, n=10: Scans(tmp_path / f"{name}.log", n, place=f"/data/{name}")


def used(folder, name, seconds):
    """As if the set had been used so many seconds ago."""
    lock = set_folder(folder, name).with_name(set_folder(folder, name).name + ".lock")
    os.utime(lock, (1e9 - seconds, 1e9 - seconds))


def sets(folder):
    return sorted(path.name.split("-")[0] for path in folder.iterdir() if path.is_dir())


def total(folder):
    return sum(path.stat().st_size for path in folder.glob("*/pixels-*"))


# Names.


def test_the_name_of_a_set(tmp_path):
    names = {
        "/data/ISIC 2019/": "ISIC-2019-8px-",
        "hub/beans@main": "beans-main-8px-",
        "/": "pictures-8px-",
        "/x/..": "pictures-8px-",
        "a" * 500: "a" * 40 + "-8px-",
    }
    for place, start in names.items():
        folder = SetFolder.of(tmp_path, Scans(tmp_path, place=place), PREPROCESS)
        assert re.fullmatch(re.escape(start) + "[0-9a-f]{16}", folder.name)


def test_what_people_can_read(make, folder):
    opened(make("scans"), folder)
    text = set_folder(folder).joinpath("about.json").read_text()
    assert '"place": "/data/scans"' in text
    assert '"size": 8' in text


# The limit over all sets.


def test_sets_not_used_for_longest_make_room(make, folder):
    for i, name in enumerate("abc"):
        opened(make(name), folder)
        used(folder, name, seconds=[20, 30, 10][i])
    new = make("new")
    pictures = opened(new, folder, gb(30))
    assert (sets(folder), total(folder)) == (["a", "c", "new"], 30 * SLOT)
    assert new.right(pictures)
    # What was cleared away is read anew.
    b = make("b")
    b.asked()
    assert b.right(opened(b, folder))
    assert len(b.asked()) == 10


def test_opening_is_a_use(make, folder):
    for name, seconds in (("a", 20), ("b", 10)):
        opened(make(name), folder)
        used(folder, name, seconds)
    opened(make("a"), folder)
    opened(make("new"), folder, gb(20))
    assert sets(folder) == ["a", "new"]


def test_what_is_in_use_stays(make, folder):
    a, new = make("a"), make("new", 30)
    of_a = opened(a, folder)
    used(folder, "a", 100)
    pictures = opened(new, folder, gb(25))
    assert (sets(folder), total(folder)) == (["a", "new"], 25 * SLOT)
    assert a.right(of_a)
    assert new.right(pictures)
    del of_a
    gc.collect()
    new.asked()
    more = opened(new, folder, gb(25))
    assert (sets(folder), total(folder)) == (["new"], 25 * SLOT)
    assert len(new.asked()) == 10
    assert new.right(more)


def test_what_another_process_uses_stays(make, folder, tmp_path):
    a, ready, stop = make("a"), tmp_path / "ready", tmp_path / "stop"

    def use():
        pictures = opened(a, folder)
        ready.touch()
        until(stop.exists)
        assert a.right(pictures)

    child = in_child(use)
    until(ready.exists)
    opened(make("new"), folder, gb(10))
    assert (sets(folder), total(folder)) == (["a", "new"], 10 * SLOT)
    stop.touch()
    assert wait(child) == 0
    opened(make("new"), folder, gb(10))
    assert (sets(folder), total(folder)) == (["new"], 10 * SLOT)


def test_a_fork_keeps_it_in_use_and_does_not_end_that(make, folder, tmp_path):
    a, stop = make("a"), tmp_path / "stop"
    pictures = opened(a, folder)
    assert wait(in_child(lambda: None)) == 0
    opened(make("new"), folder, gb(10))
    assert sets(folder) == ["a", "new"]  # the child's end is not ours
    child = in_child(lambda: until(stop.exists))
    del pictures
    gc.collect()
    opened(make("new"), folder, gb(10))
    assert sets(folder) == ["a", "new"]  # the child has it
    stop.touch()
    assert wait(child) == 0
    opened(make("new"), folder, gb(10))
    assert sets(folder) == ["new"]


def test_a_program_started_in_between_does_not_keep_it_in_use(make, folder):
    pictures = opened(make("a"), folder)
    program = subprocess.Popen([shutil.which("sleep"), "20"], close_fds=False)
    try:
        del pictures
        gc.collect()
        opened(make("new"), folder, gb(10))
        assert sets(folder) == ["new"]
    finally:
        program.kill()
        program.wait()


def test_nothing_is_removed_without_a_need(make, folder):
    opened(make("a"), folder)
    opened(make("b", 40), folder)
    for limit in (0.0, gb(5), gb(40)):
        opened(make("a"), folder, limit)
        opened(make("c"), folder, 0.0)
    # b has more than the limit by itself: clearing others away would not help.
    big = make("b", 50)
    opened(big, folder, gb(35))
    assert sets(folder) == ["a", "b", "c"]


def test_nothing_is_removed_for_less_than_a_picture(make, folder):
    big = make("big", 20)
    opened(big, folder, gb(10))
    opened(make("other"), folder, gb(30))
    opened(big, folder, gb(10))
    assert sets(folder) == ["big", "other"]


def test_only_as_much_is_removed_as_is_needed(make, folder):
    for name, seconds in (("a", 30), ("b", 20), ("c", 10)):
        opened(make(name), folder)
        used(folder, name, seconds)
    opened(make("new", 5), folder, gb(30))
    assert sets(folder) == ["b", "c", "new"]


def test_files_of_others_are_never_touched(make, folder):
    mine = [folder / "photos-0123456789abcdef" / "x.jpg", folder / "index", folder / "a" / "index"]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    opened(make("a"), folder)
    (set_folder(folder, "a") / "notes.txt").write_text("mine")
    opened(make("new"), folder, gb(10))
    assert total(folder) == 10 * SLOT
    assert {path.read_text() for path in [*mine, set_folder(folder, "a") / "notes.txt"]} == {"mine"}
    a = make("a")
    a.asked()
    assert a.right(opened(a, folder))


def test_what_another_process_is_about_to_write_counts(make, folder, tmp_path):
    slow, new = make("slow", 20), make("new", 20)
    slow.pause = 0.02
    child = in_child(lambda: opened(slow, folder, gb(25)))
    until(lambda: list(folder.glob("slow-*/plan")) and slow.log.exists())
    pictures = opened(new, folder, gb(25))
    assert wait(child) == 0
    assert total(folder) == 25 * SLOT
    assert new.right(pictures)
    assert not list(folder.glob("*/plan"))


def test_a_plan_that_a_kill_left_counts_until_the_set_is_opened_or_removed(make, folder):
    opened(make("a"), folder)
    (set_folder(folder, "a") / "plan").write_text(str(30 * SLOT))
    opened(make("new"), folder, gb(30))
    assert sets(folder) == ["new"]


def test_bad_pictures_take_no_room(make, folder):
    source = make("a", 20)
    source.bad = dict.fromkeys(source.names[:10], BadImageError("truncated"))
    pictures = opened(source, folder, gb(10))
    assert total(folder) == 10 * SLOT
    source.asked()
    assert source.right(pictures)
    opened(source, folder, gb(10))
    assert source.asked() == []


# The disk.

Usage = namedtuple("Usage", "total used free")


def test_a_disk_without_room(make, folder, monkeypatch):
    source = make("a")
    opened(make("other", 2), folder)
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(0, 0, 10 * SLOT - 1))
    with pytest.raises(FedloraError) as caught:
        opened(source, folder)
    assert str(caught.value) == (
        f"data.cache_dir: keeping 10 pictures in {set_folder(folder, 'a')} takes 0.0 MB, 0.0 MB "
        "are free. Free space, choose another folder with data.cache_dir=FOLDER, or keep fewer "
        "with data.cache_gb=0 (the others are decoded when needed)."
    )
    assert source.asked() == []
    assert source.right(opened(source, folder, 0.0))
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(0, 0, 10 * SLOT))
    assert source.right(opened(source, folder))


def test_the_limit_that_is_named_fits(make, folder, monkeypatch):
    from fedlora.data.cache import room as cache_room

    own = SetFolder.of(folder, make("a"), PREPROCESS)
    opened(make("a"), folder)
    monkeypatch.setattr(SetFolder, "kept_bytes", lambda self: 1_000_000_000)
    opened(make("b"), folder)
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(0, 0, 3_210_000_000))
    with pytest.raises(FedloraError) as caught:
        cache_room.check_free(own, 10_500_000_000, 70_000)
    # 1 GB each of two sets and 3.21 GB free, less a twentieth: 4.94.
    for text in ("keeping 70,000 pictures", "takes 10.5 GB, 3.2 GB are free", "cache_gb=4.9 "):
        assert text in str(caught.value)


def test_what_was_only_planned_takes_no_room(make, folder, monkeypatch):
    # 1,000 pictures of 3 MB, 1 GB free, nothing kept yet: a twentieth less than that fits.
    preprocess = ImagePreprocess(1000, True, (0.5,) * 3, (0.5,) * 3)
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(0, 0, 1_000_000_000))
    with pytest.raises(
        FedloraError, match=r"takes 3\.0 GB, 1\.0 GB are free.* data\.cache_gb=0\.9 "
    ):
        opened(make("a", 1000), folder, 5.0, preprocess=preprocess)


def test_a_copy_that_the_disk_has_no_room_for_is_not_made(make, folder, monkeypatch):
    source = make("a")
    opened(source, folder)
    source.names[5:] = [f"1{i:02d}.png" for i in range(5)]
    source.asked()
    disk = 14 * SLOT
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(0, 0, disk - total(folder)))
    # A copy of the five that are needed would be one too many.
    assert source.right(opened(source, folder, gb(10)))
    assert (len(source.asked()), set_folder(folder, "a").joinpath("pixels-1.u8").exists()) == (5, 1)
    disk = 15 * SLOT
    assert source.right(opened(source, folder, gb(10)))
    assert (len(source.asked()), total(folder)) == (5, 10 * SLOT)
    opened(source, folder, gb(10))
    assert source.asked() == []


# Locks.


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(make, folder, monkeypatch, code):
    def none(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.raises(FedloraError, match="this file system has no file locks") as caught:
        opened(make("a"), folder)
    assert str(folder) in str(caught.value)
    assert "data.cache_dir=FOLDER" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_locks_are_given_back(make, folder):
    def descriptors():
        gc.collect()
        found = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
        return [path for path in found if str(folder) in path]

    pictures = [opened(make("a"), folder) for _ in range(3)]
    # The lock, and the file behind the map.
    assert len(descriptors()) == 6
    for one in pictures:
        assert one is not None
    del pictures, one
    assert descriptors() == []
    source = make("b")
    source.read = lambda rows: 1 / 0
    with pytest.raises(ZeroDivisionError):
        opened(source, folder)
    assert descriptors() == []


def test_the_lock_of_a_set_is_shared(tmp_path):
    own = SetFolder(tmp_path, "x-0123456789abcdef")
    with hold(own) as one, hold(own) as two, (tmp_path / f"{own.name}.lock").open() as third:
        assert one.fileno() != two.fileno()
        with pytest.raises(BlockingIOError):
            fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (tmp_path / f"{own.name}.lock").open() as third:
        fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_child_of_a_kill_lets_others_work(make, folder):
    # The lock for reading is released even where a fork still has its descriptor.
    source, forked = make("a"), []

    def fork(steps):
        if not forked:
            forked.append(in_child(lambda: until(lambda: False, 1.0)))

    opened(source, folder, reporter=Told(fork))
    source.names.append("100.png")
    told = Told()
    assert source.right(opened(source, folder, reporter=told))
    assert [line[:4] for line in told.lines] == ["read"]
    os.kill(forked[0], 9)
    wait(forked[0])
