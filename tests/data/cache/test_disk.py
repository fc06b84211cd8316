from __future__ import annotations

import os
import pickle
import re
import shutil
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fedlora.data import BadImageError, ImagePreprocess, ImageTable
from fedlora.data.batches import LabelledRows
from fedlora.data.cache.base import MemoryPictures
from fedlora.data.cache.disk import DiskPictures, open_pictures
from fedlora.errors import FedloraError
from tests.data.scans import (
    PREPROCESS,
    SLOT,
    Scans,
    Told,
    gb,
    in_child,
    lasting,
    opened,
    set_folder,
    until,
    wait,
)


@pytest.fixture
def source(tmp_path):
    return Scans(tmp_path / "log")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "deep" / "cache"


@pytest.fixture
def commit_always(monkeypatch):
    monkeypatch.setattr("fedlora.data.cache.store._COMMIT_SECONDS", 0.0)


# Read once.


def test_without_stamps_in_memory(source, folder):
    table = source.load()
    table = ImageTable(table.labels, table.split, table.keys)
    pictures = open_pictures(source, table, PREPROCESS, folder=folder, limit_gb=1.0)
    assert isinstance(pictures, MemoryPictures)
    assert source.right(pictures)
    assert not folder.exists()


def test_read_once_for_all_runs(source, folder):
    pictures = opened(source, folder)
    assert isinstance(pictures, DiskPictures)
    assert sorted(source.asked()) == source.names
    assert source.right(pictures)
    again = opened(source, folder)
    rows = torch.tensor([39, 0, 7, 7])
    batch = again[rows]
    assert (batch.dtype, batch.shape) == (torch.uint8, (4, 3, 8, 8))
    assert torch.equal(batch, torch.stack([PREPROCESS.resize(source.image(r)) for r in rows]))
    assert again[torch.tensor([], dtype=torch.int64)].shape == (0, 3, 8, 8)
    batch.zero_()  # a copy
    assert source.right(again)
    assert source.right(pictures)
    assert (source.asked(), again.bad) == ([], {})


def test_only_what_is_new_or_changed_is_read(source, folder):
    first = opened(source, folder)
    source.asked()
    old = source.image(5)
    source.versions["005.png"] = 1
    source.names = [*source.names[1:], "777.png"]
    second = opened(source, folder)
    assert sorted(source.asked()) == ["005.png", "777.png"]
    assert source.right(second)
    assert torch.equal(first[torch.tensor([5])][0], PREPROCESS.resize(old))
    del source.versions["005.png"]  # as it was before
    assert source.right(opened(source, folder))
    assert source.asked() == []


def test_rows_in_another_order(source, folder):
    opened(source, folder)
    source.asked()
    source.names.reverse()
    assert source.right(opened(source, folder))
    assert source.asked() == []


def test_one_set_per_place_and_size(source, folder):
    opened(source, folder)
    opened(Scans(source.log, place="/other/scans"), folder)
    opened(source, folder, preprocess=ImagePreprocess(8, False, (0.5,) * 3, (0.5,) * 3))
    opened(source, folder, preprocess=ImagePreprocess(9, True, (0.5,) * 3, (0.5,) * 3))
    opened(source, folder, preprocess=ImagePreprocess(8, True, (0.5,) * 3, (0.5,) * 3, "bilinear"))
    assert Counter(source.asked()) == dict.fromkeys(source.names, 5)
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 5
    # Scaling changes no stored pixel.
    other = ImagePreprocess(8, True, (0.1,) * 3, (0.2,) * 3)
    assert opened(source, folder, preprocess=other).preprocess == other
    assert source.asked() == []


class Negatives(Scans):
    def read(self, rows):
        return [255 - picture for picture in super().read(rows)]


def test_a_subclass_that_reads_otherwise_has_a_set_of_its_own(source, folder):
    whole = opened(source, folder)
    negatives = opened(Negatives(source.log), folder)
    rows = torch.arange(40)
    assert not torch.equal(negatives[rows], whole[rows])
    assert torch.equal(opened(source, folder)[rows], whole[rows])


def test_names_that_are_no_text(tmp_path, folder):
    source = Scans(tmp_path / "log", n=3, place="/data/caf\udce9 \n x")
    table = source.load()
    keys = np.array(["a\udce9", "a", "ä"])
    table = ImageTable(table.labels, table.split, keys, stamps=np.array(["\udce9", "", "1"]))
    for expected in (3, 0):
        open_pictures(source, table, PREPROCESS, folder=folder, limit_gb=1.0)
        assert len(source.asked()) == expected


def test_numbers_and_text_are_different_keys(source, folder):
    table = source.load()
    for keys in (np.arange(40), np.array([str(i) for i in range(40)])):
        found = ImageTable(table.labels, table.split, keys, stamps=table.stamps)
        open_pictures(source, found, PREPROCESS, folder=folder, limit_gb=1.0)
        assert len(source.asked()) == 40


# Bad pictures.


def test_bad_pictures_are_remembered_until_they_change(source, folder):
    source.bad = {"003.png": BadImageError("truncated"), "030.png": BadImageError("é\n")}
    for expected in (40, 0):
        pictures = opened(source, folder)
        assert pictures.bad == {3: "truncated", 30: "é\n"}
        assert len(source.asked()) == expected
        assert source.right(pictures)
    with pytest.raises(FedloraError, match=r"cannot read the picture 003.png: truncated"):
        pictures[torch.tensor([2, 3])]
    source.asked()
    del source.bad["003.png"]
    source.versions["003.png"] = 1
    pictures = opened(source, folder)
    assert (source.asked(), pictures.bad) == (["003.png"], {30: "é\n"})
    assert source.right(pictures)


def test_what_can_pass_is_not_remembered(source, folder):
    source.bad = {"003.png": lasting("no permission", False), "004.png": lasting("empty", True)}
    for expected in (40, 1):
        assert opened(source, folder).bad == {3: "no permission", 4: "empty"}
        assert len(source.asked()) == expected
    source.bad = {}  # mended, without a change of the stamp
    assert opened(source, folder).bad == {4: "empty"}


# The limit.


def test_what_does_not_fit_is_decoded_on_demand(source, folder):
    source.bad = {"001.png": BadImageError("truncated")}
    told = Told()
    pictures = opened(source, folder, gb(10), told)
    assert sorted(source.asked()) == source.names
    assert set_folder(folder).joinpath("pixels-1.u8").stat().st_size == 10 * SLOT
    left = (
        "29 of 40 pictures are beyond data.cache_gb=2.016e-06 and are decoded each time they are "
    )
    assert told.lines[1:] == [f"{left}needed"]
    assert pictures.bad == {1: "truncated"}
    assert source.right(pictures)
    again = opened(source, folder, gb(10), told)
    assert (source.asked(), len(told.lines), len(told.tracked)) == ([], 3, 1)
    again[torch.tensor([0, 39, 20])]
    assert sorted(set(source.asked())) >= ["020.png", "039.png"]
    assert source.right(again)
    # More room.
    more = opened(source, folder, gb(25))
    assert len(source.asked()) == 15
    assert source.right(more)
    every = opened(source, folder)
    assert len(source.asked()) == 14
    assert source.right(every)
    opened(source, folder)
    # Less room: what is there is used.
    assert source.right(opened(source, folder, 0.0))
    assert source.asked() == []


def test_limit_zero_keeps_nothing(source, folder):
    source.bad = {"001.png": BadImageError("truncated")}
    for expected in (40, 0):
        pictures = opened(source, folder, 0.0)
        assert len(source.asked()) == expected
        assert pictures.bad == {1: "truncated"}
        assert source.right(pictures)
    assert set_folder(folder).joinpath("pixels-1.u8").stat().st_size == 0


def test_a_picture_that_vanishes_on_demand(source, folder):
    pictures = opened(source, folder, 0.0)
    source.bad = {"007.png": BadImageError("no such file")}
    with pytest.raises(FedloraError, match=r"cannot read the picture 007\.png: no such file") as e:
        pictures[torch.arange(10)]
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("limit", [-1.0, float("nan")])
def test_a_limit_that_is_none(source, folder, limit):
    with pytest.raises(FedloraError, match=r"data\.cache_gb must be at least 0 .*got"):
        opened(source, folder, limit)
    assert not folder.exists()


def test_no_limit(source, folder):
    assert source.right(opened(source, folder, float("inf")))


@pytest.mark.parametrize("limit", [1.0, 0.0])
def test_where_nothing_is_to_read_nobody_waits(source, folder, monkeypatch, limit):
    opened(source, folder, limit)
    monkeypatch.setattr("fedlora.data.cache.disk.working", lambda *_: pytest.fail("waits"))
    assert source.right(opened(source, folder, limit))


# Threads.


def test_read_by_several_threads_in_small_chunks(source, folder, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    source.names = [f"{i:03d}.png" for i in range(200)]
    together, busy, most, chunks = threading.Barrier(3), [], [0], []
    read = source.read

    def spy(rows):
        busy.append(1)
        most[0] = max(most[0], len(busy))
        chunks.append((len(rows), torch.get_num_threads(), threading.current_thread().name))
        if len(chunks) <= 3:
            together.wait(10)  # breaks unless three are here at once
        found = read(rows)
        busy.pop()
        return found

    monkeypatch.setattr(source, "read", spy)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        pictures = opened(source, folder)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert source.right(pictures)
    assert most == [3]
    assert max(size for size, _, _ in chunks) == 15
    assert {threads for _, threads, _ in chunks} == {1}
    assert threading.current_thread().name not in {name for *_, name in chunks}


def test_large_pictures_do_not_pile_up(source, folder, monkeypatch):
    # Every other one is in colour: 12 x 9 to 13 bytes, three times that.
    monkeypatch.setattr("fedlora.data.cache.base._PIECE_BYTES", 3 * 12 * 13)
    source.names = [f"{i:03d}.png" for i in range(100)]
    chunks = []
    read = source.read
    monkeypatch.setattr(source, "read", lambda rows: chunks.append(list(rows)) or read(rows))
    assert source.right(opened(source, folder))
    # Of each 16 the first one alone, as nobody knows how large they are.
    assert {rows[0] for rows in chunks if len(rows) == 1} >= set(range(0, 100, 16))
    assert max(len(rows) for rows in chunks) == 4
    chunks.clear()
    large = opened(source, folder / "none", 0.0)
    chunks.clear()
    large[torch.arange(1, 9, 2)]
    assert sorted(chunks) == [[1], [3], [5], [7]]


def test_reading_does_not_run_far_ahead_of_writing(source, folder, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr("fedlora.data.cache.build._AHEAD", 3)
    monkeypatch.setattr("fedlora.data.cache.build._CHUNK", 1)
    told = Told(lambda _: time.sleep(0.003))  # a slow disk
    read, ahead, count = source.read, [], [0]

    def spy(rows):
        count[0] += 1
        ahead.append(count[0] - len(told.steps))
        return read(rows)

    monkeypatch.setattr(source, "read", spy)
    opened(source, folder, reporter=told)
    assert 3 <= max(ahead) <= 3 + 2


def test_where_nobody_knows_which_cpus_are_for_a_process(source, folder, monkeypatch):
    monkeypatch.delattr("os.sched_getaffinity")  # macOS
    assert source.right(opened(source, folder, gb(10)))


def test_on_demand_in_threads_too(source, folder, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    pictures = opened(source, folder, 0.0)
    together = threading.Barrier(2)
    read = source.read
    monkeypatch.setattr(source, "read", lambda rows: (together.wait(10), read(rows))[1])
    assert pictures[torch.arange(2)].shape == (2, 3, 8, 8)


def test_an_error_of_a_thread_arrives(source, folder, monkeypatch, commit_always):
    read = source.read

    def broken(rows):
        if 20 in rows:
            raise KeyError("a bug")
        return read(rows)

    before = torch.get_num_threads()
    monkeypatch.setattr(source, "read", broken)
    with pytest.raises(KeyError, match="a bug"):
        opened(source, folder)
    assert torch.get_num_threads() == before
    monkeypatch.undo()
    done = set(source.asked())
    assert source.right(opened(source, folder))
    assert 20 <= len(source.asked()) < 40
    assert "000.png" in done


def test_an_interrupt_keeps_what_is_done(source, folder, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    source.names = [f"{i:03d}.png" for i in range(400)]
    source.pause = 0.001

    def stop(steps):
        if steps >= 100:
            raise KeyboardInterrupt

    told = Told(stop)
    with pytest.raises(KeyboardInterrupt):
        opened(source, folder, reporter=told)
    # Of what was in the queue only that is read to its end which had begun.
    assert 100 <= len(source.asked()) < 300
    assert source.right(opened(source, folder))
    assert len(source.asked()) == 400 - sum(told.steps)
    assert told.lines == []


# What is said.


def test_what_the_user_sees(source, folder):
    told = Told()
    opened(source, folder, reporter=told)
    assert (told.tracked, sum(told.steps)) == ([("reading pictures", 40)], 40)
    (line,) = told.lines
    pattern = rf"read 40 pictures in \d+\.\d s \([\d,]+ a second\) into {set_folder(folder)}"
    assert re.fullmatch(pattern, line)
    opened(source, folder, reporter=told)
    assert (len(told.tracked), len(told.lines)) == (1, 1)


def test_a_cache_folder_whose_name_is_no_text(source, tmp_path):
    folder = tmp_path / "caf\udce9"
    told = Told()
    opened(source, folder, reporter=told)
    assert "caf\\udce9/scans-" in told.lines[0]
    told.lines[0].encode()


# Other processes.


def test_two_processes_read_each_picture_once(source, folder):
    source.pause = 0.01
    told = Told()
    other = in_child(lambda: _check(source, opened(source, folder)))
    until(source.log.exists)
    mine = opened(source, folder, reporter=told)
    assert wait(other) == 0
    assert sorted(source.asked()) == source.names
    assert told.lines == [
        f"waiting for another process that reads the pictures in {set_folder(folder)}"
    ]
    assert told.tracked == []
    assert source.right(mine)


def test_five_processes_at_once(source, folder):
    children = [in_child(lambda: _check(source, opened(source, folder))) for _ in range(5)]
    assert [wait(child) for child in children] == [0] * 5
    assert sorted(source.asked()) == source.names


def _check(source, pictures):
    assert source.right(pictures)


def test_killed_while_reading(source, folder, commit_always):
    source.pause, source.stuck = 0.01, source.names[-1]  # killed before the last picture
    for least in (5, 15, 30):
        child = in_child(lambda: opened(source, folder))
        until(lambda least=least: len(_recorded(folder)) >= least)
        os.kill(child, 9)
        assert wait(child) == -9
    recorded = len(_recorded(folder))
    assert recorded >= 30
    source.stuck = ""
    source.asked()
    assert source.right(opened(source, folder))
    assert len(source.asked()) == 40 - recorded


def _recorded(folder):
    from fedlora.data.cache.index import read_index

    found = [path for path in folder.glob("scans-*") if path.is_dir()]
    index = read_index(found[0] / "index", found[0].name) if found else None
    return {} if index is None else index.slots


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("limit", [1.0, gb(10)])
def test_in_workers_of_a_loader(source, folder, limit):
    pictures = opened(source, folder, limit)
    rows = LabelledRows(pictures, torch.arange(40), torch.arange(40))
    loader = DataLoader(rows, batch_size=16, num_workers=2, collate_fn=lambda batch: batch)
    batches = list(loader)
    expected = torch.stack([PREPROCESS.resize(source.image(row)) for row in range(40)])
    assert torch.equal(torch.cat([batch["image"] for batch in batches]), expected)


def test_pickled(source, folder):
    pictures = opened(source, folder, gb(10))
    copy = pickle.loads(pickle.dumps(pictures))
    del pictures
    assert source.right(copy)


def test_the_set_may_be_deleted_while_it_is_open(source, folder):
    pictures = opened(source, folder)
    shutil.rmtree(folder)
    assert source.right(pictures)
    source.asked()
    assert source.right(opened(source, folder))
    assert len(source.asked()) == 40
