from __future__ import annotations

import os
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlora.data import BadImageError
from fedlora.data.sources import files_on_disk as disk
from fedlora.data.sources.image_folder import ImageFolder
from fedlora.errors import FedloraError

# 2 x 1 pixels, grey: 7 and 200. PGM, which any name may hide.
PICTURE = b"P5 2 1 255\n" + bytes([7, 200])


def make(root: Path, *paths: str) -> str:
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(PICTURE)
    return str(root)


def found(root, **options):
    """key -> (class, split, site)."""
    source = ImageFolder(str(root), **options)
    table, names = source.load(), source.class_names
    sites = [None] * len(table) if table.site is None else table.site.tolist()
    rows = zip(table.keys.tolist(), table.labels, table.split.tolist(), sites, strict=True)
    return {key: (names[label], split, site) for key, label, split, site in rows}


def refused(root, message, **options):
    with pytest.raises(FedloraError, match=message) as raised:
        ImageFolder(str(root), **options).prepare()
    assert "\n" not in str(raised.value)


# --- layouts


def test_class(tmp_path):
    root = make(tmp_path, "dog/b.png", "cat/c.jpg", "dog/a.PNG")
    source = ImageFolder(root)
    source.prepare()
    assert source.class_names == ["cat", "dog"]
    table = source.load()
    assert table.keys.tolist() == ["cat/c.jpg", "dog/a.PNG", "dog/b.png"]
    assert table.labels.tolist() == [0, 1, 1]
    assert table.labels.dtype == np.int64
    assert table.split.tolist() == ["train"] * 3
    assert table.site is None
    assert dict(table.columns) == {}
    assert found(root, layout="class") == found(root)


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [("train", "val", "test"), ("Training", "VALID", "testing"), ("TRAIN", "validation", "Test")],
)
def test_split_class(tmp_path, train, val, test):
    root = make(tmp_path, *(f"{split}/{c}/x.png" for split in (train, val, test) for c in "ab"))
    expected = {
        f"{name}/{c}/x.png": (c, split, None)
        for name, split in [(train, "train"), (val, "val"), (test, "test")]
        for c in "ab"
    }
    assert found(root) == found(root, layout="split/class") == expected


def test_dev_is_val(tmp_path):
    root = make(tmp_path, "train/a/x.png", "train/b/x.png", "dev/a/x.png")
    assert found(root)["dev/a/x.png"] == ("a", "val", None)


def test_site_class(tmp_path):
    root = make(tmp_path, "paris/cat/1.png", "paris/dog/1.png", "rome/cat/1.png", "rome/cat/2.png")
    expected = {
        "paris/cat/1.png": ("cat", "train", "paris"),
        "paris/dog/1.png": ("dog", "train", "paris"),
        "rome/cat/1.png": ("cat", "train", "rome"),
        "rome/cat/2.png": ("cat", "train", "rome"),
    }
    assert found(root) == found(root, layout="site/class") == expected


def test_site_split_class_and_split_site_class(tmp_path):
    kinds = [(site, split, c) for site in ("p", "r") for split in ("train", "test") for c in "ab"]
    first = make(tmp_path / "1", *(f"{site}/{split}/{c}/x.png" for site, split, c in kinds))
    second = make(tmp_path / "2", *(f"{split}/{site}/{c}/x.png" for site, split, c in kinds))
    assert found(first) == found(first, layout="site/split/class")
    assert found(first) == {f"{s}/{split}/{c}/x.png": (c, split, s) for s, split, c in kinds}
    assert found(second) == found(second, layout="split/site/class")
    assert found(second) == {f"{split}/{s}/{c}/x.png": (c, split, s) for s, split, c in kinds}


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["x.png", "y.png"], r"holds pictures itself \('x.png'\), not in folders"),
        (
            ["a/x.png", "b/deep/y.png", "c/x.png"],
            "unequal depths below data.source.root: 'c/x.png' but 'b/deep/y.png'. Set "
            "data.source.layout",
        ),
        (["cover.png", "a/x.png", "b/x.png"], "unequal depths.*'cover.png' but 'b/x.png'"),
        (
            ["train/a/x.png", "test/a/x.png", "unlabelled/a/x.png"],
            "'test/a/x.png' are: 'test', 'train' would be splits, 'unlabelled' not. Set",
        ),
        (["p/q/a/x.png", "p/q/b/x.png"], "'p/q/a/x.png' are: no level, or more than one, holds"),
        (["train/test/a/x.png"], "no level, or more than one, holds only splits"),
        (["p/train/a/x.png", "q/a/a/x.png"], "no level, or more than one, holds only splits"),
        (["p/q/r/a/x.png"], "cannot tell what the folders of 'p/q/r/a/x.png' are. Set"),
        (["train/x.png", "test/x.png"], "'test', 'train' would be the classes, which are splits"),
        (["cat/train/x.png", "dog/train/x.png", "dog/test/x.png"], "'test', 'train' would be the"),
        (
            ["mel/p1/x.png", "nv/p2/x.png", "nv/p3/x.png"],
            "whether 'mel/p1/x.png' is site/class: no class would occur in two sites. Set "
            "data.source.layout to class if 'mel', 'nv' are the classes, or to site/class if",
        ),
        (
            ["train/mel/p1/x.png", "train/nv/p2/x.png", "test/nv/p3/x.png"],
            "is split/site/class: .* to split/class if 'mel', 'nv' are the classes, or to",
        ),
        (
            ["mel/train/p1/x.png", "nv/train/p2/x.png"],
            "is site/split/class: .*layout to site/split/class if every site",
        ),
    ],
)
def test_auto_does_not_guess(tmp_path, paths, message):
    refused(make(tmp_path, *paths), message)


def test_set_layouts_settle_it(tmp_path):
    root = make(tmp_path, "mel/p1/x.png", "nv/p2/y.png", "nv/z.png", "nv/p3/old/x.png")
    classes = {key: row[0] for key, row in found(root, layout="class").items()}
    assert classes == {
        "mel/p1/x.png": "mel",
        "nv/p2/y.png": "nv",
        "nv/z.png": "nv",
        "nv/p3/old/x.png": "nv",
    }
    (tmp_path / "nv/z.png").unlink()
    assert found(root, layout="site/class")["nv/p3/old/x.png"] == ("p3", "train", "nv")


def test_one_site_is_no_reason_to_stop(tmp_path):
    assert found(make(tmp_path, "p/a/x.png", "p/b/x.png"))["p/a/x.png"] == ("a", "train", "p")


@pytest.mark.parametrize(
    ("layout", "paths", "message"),
    [
        ("class", ["x.png", "a/x.png"], "layout=class needs .* at least 1 .*, got 'x.png'"),
        ("site/class", ["p/a/x.png", "p/x.png"], "at least 2 folder.*, got 'p/x.png'"),
        (
            "split/class",
            ["trian/a/x.png", "test/a/x.png"],
            "must be called train, training, val, .* got 'trian' in 'trian/a/x.png'. "
            "Did you mean 'train'",
        ),
        ("site/split/class", ["p/nurses/a/x.png"], "got 'nurses' .* Rename it"),
        ("class", ["train/a/x.png", "test/a/x.png"], "would be the classes, which are splits"),
    ],
)
def test_a_set_layout_is_kept(tmp_path, layout, paths, message):
    refused(make(tmp_path, *paths), message, layout=layout)


def test_a_class_may_be_called_like_a_split(tmp_path):
    assert ImageFolder(make(tmp_path, "train/x.png", "bus/x.png")).class_names == ["bus", "train"]


# --- class names


def test_class_names(tmp_path):
    root = make(tmp_path, "n1/x.png", "n2/x.png", "n10/x.png", "n10/y.png")
    assert ImageFolder(root, class_names=["n2", "n10", "n1"]).class_names == ["n2", "n10", "n1"]
    source = ImageFolder(root, class_names={"n10": "tench", "n2": "cat", "n1": "dog"})
    assert source.class_names == ["tench", "cat", "dog"]
    assert source.load().labels.tolist() == [2, 0, 0, 1]  # n1, n10, n10, n2
    refused(root, "must list every class folder with pictures, 'n10' is", class_names=["n1", "n2"])


def test_numbers_are_sorted_as_such(tmp_path):
    assert ImageFolder(make(tmp_path, "10/x.png", "9/x.png")).class_names == ["9", "10"]


def test_an_empty_class_folder_counts_only_when_asked_for(tmp_path):
    root = make(tmp_path, "a/x.png", "b/x.png")
    (tmp_path / "c").mkdir()
    assert ImageFolder(root).class_names == ["a", "b"]
    refused(root, "lists 'c' but there is no class folder with pictures", class_names=list("abc"))


def test_one_class_is_none(tmp_path):
    refused(make(tmp_path, "a/x.png"), "one class only, 'a'")


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems make no difference")
def test_forms_of_unicode_are_one_class_and_one_site(tmp_path):
    forms = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    root = make(tmp_path, *(f"{form}/{form}/x.png" for form in forms), f"{forms[0]}/b/x.png")
    table = ImageFolder(root, layout="site/class").load()
    assert ImageFolder(root, layout="site/class").class_names == ["b", forms[0]]
    assert set(table.site.tolist()) == {forms[0]}
    # Keys as the file system has them: two files.
    assert {f"{form}/{form}/x.png" for form in forms} < set(table.keys.tolist())


def test_long_names(tmp_path):
    name = "x" * 251 + ".png"
    assert f"a/{name}" in found(make(tmp_path, f"a/{name}", "b/x.png"))


@pytest.mark.skipif(os.name == "nt", reason="names are bytes on POSIX only")
def test_bytes_that_are_no_utf8(tmp_path):
    bad = os.fsdecode(b"caf\xe9")
    try:
        root = make(tmp_path / "1", f"{bad}/a/{bad}.png", f"{bad}/b/x.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    source = ImageFolder(root)
    table = source.load()
    for text in (*table.keys.tolist(), *table.site.tolist(), source.summary()):
        text.encode()
    assert source.read([0])[0].tolist() == [[[7, 200]]]
    refused(make(tmp_path / "2", f"{bad}/x.png", "b/x.png"), "is not valid Unicode")
    ImageFolder(make(tmp_path / bad, "a/x.png", "b/x.png")).place.encode()


# --- what counts as a picture


@pytest.mark.parametrize(
    "ending",
    [
        *("png", "JPG", "jpeg", "JPE", "jfif", "webp", "bmp", "gif"),
        *("tif", "tiff", "ppm", "pgm", "pbm", "jp2", "avif", "mpo"),
    ],
)
def test_endings(tmp_path, ending):
    assert len(found(make(tmp_path, f"a/x.{ending}", f"b/y.y.{ending}"))) == 2


def test_what_is_passed_over(tmp_path):
    root = make(
        tmp_path,
        *("a/x.png", "b/x.png", "a/._x.png", ".git/a/x.png", "__MACOSX/a/x.png", "a/notes.txt"),
        *("a/Thumbs.db", "README", "a/png", "b/@eaDir/x.png", "labels.csv", "a/x.png.part"),
    )
    (tmp_path / "empty.png").mkdir()
    os.mkfifo(tmp_path / "a/pipe.png")  # would block its reader
    assert list(found(root)) == ["a/x.png", "b/x.png"]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "has no pictures in it: .* has no files at all. Name"),
        (
            ["a/1.dcm", "a/2.dcm", "README"],
            r"other kinds only \(2 \.dcm, 1 without an ending\)",
        ),
        (["data.zip"], r"files of other kinds only \(1 \.zip\).* png, jpg, .*mpo\.$"),
    ],
)
def test_no_pictures(tmp_path, paths, message):
    refused(make(tmp_path, *paths), message)


# --- the disk


def test_root_that_is_none(tmp_path):
    refused(tmp_path / "x", r"data.source.root must be a folder, got .*x, which does not exist")
    file = tmp_path / "a.zip"
    file.write_bytes(b"")
    refused(file, r"must be a folder, got the file .*a\.zip.*unpack an archive")
    refused(file / "b", "which does not exist")
    refused(tmp_path / ("n" * 300), "cannot be read: File name too long")
    refused("~nobody_of_this_name/x", "there is no home folder for")
    refused("a\0b", "must be a path, got")


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make(tmp_path / "data", "a/x.png", "b/x.png")
    source = ImageFolder("~/data")
    assert len(source.load()) == 2
    assert source.place == str((tmp_path / "data").resolve())


@pytest.mark.parametrize("options", [{"root": " "}, {"root": "x", "layout": "site/clas"}])
def test_arguments(options):
    with pytest.raises(FedloraError, match=r"root must be a folder|mean 'site/class'\?"):
        ImageFolder(**options)
    with pytest.raises(FedloraError, match="class_names must be distinct"):
        ImageFolder("x", class_names=["a", "a"])
    with pytest.raises(FedloraError, match="templates must have"):
        ImageFolder("x", templates=["no place"])


def test_the_constructor_touches_no_disk(monkeypatch):
    monkeypatch.setattr(Path, "stat", None)
    monkeypatch.setattr(os, "stat", None)
    monkeypatch.setattr(os, "scandir", None)
    assert ImageFolder("/nowhere").templates == ["a photo of a {}."]


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    root = make(tmp_path, "a/x.png", "b/x.png")
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(disk.os, "scandir", closed)
    refused(root, r"the folder .*b cannot be read: Permission denied")


def test_the_disk_is_looked_through_once_and_again_by_prepare(tmp_path, monkeypatch):
    root = make(tmp_path, "a/x.png", "b/x.png")
    looked = []
    scandir = os.scandir
    monkeypatch.setattr(disk.os, "scandir", lambda path: looked.append(path) or scandir(path))
    source = ImageFolder(root)
    assert source.class_names == ["a", "b"]
    assert len(source.load()) == 2
    source.read([0])
    assert len(looked) == 3
    make(tmp_path, "c/x.png")
    source.prepare()
    assert source.class_names == ["a", "b", "c"]


def test_circles_of_links_end(tmp_path):
    root = make(tmp_path, "a/x.png", "b/x.png")
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "a/self").symlink_to("self")
    (tmp_path / "b/self.png").symlink_to("self.png")
    (tmp_path / "b/here").symlink_to(".")
    table = ImageFolder(root).load()
    assert table.keys.tolist() == ["a/x.png", "b/self.png", "b/x.png"]
    assert table.stamps[1] == "missing"


def test_links_are_followed_and_may_be_shared(tmp_path):
    make(tmp_path / "store", "x.png")
    root = make(tmp_path / "root", "p/b/x.png", "q/b/x.png")
    for site in "pq":
        (tmp_path / "root" / site / "a").symlink_to(tmp_path / "store")
        (tmp_path / "root" / site / "b/l.png").symlink_to(tmp_path / "store/x.png")
    assert [key for key, row in found(root).items() if row[0] == "a"] == ["p/a/x.png", "q/a/x.png"]
    assert len(found(root)) == 6


def test_stamps(tmp_path):
    root = make(tmp_path, "a/x.png", "b/x.png")
    store = tmp_path / "store.bin"
    store.write_bytes(PICTURE + b"more")
    (tmp_path / "b/link.png").symlink_to(store)
    (tmp_path / "b/broken.png").symlink_to("nowhere.png")
    for file in (tmp_path / "a/x.png", tmp_path / "b/x.png", store):
        os.utime(file, ns=(5, 1_700_000_000_123_456_789))
    size = len(PICTURE)
    table = ImageFolder(root).load()
    assert dict(zip(table.keys.tolist(), table.stamps.tolist(), strict=True)) == {
        "a/x.png": f"{size}:1700000000123456789:{changed(tmp_path / 'a/x.png')}",
        "b/broken.png": "missing",
        "b/link.png": f"{size + 4}:1700000000123456789:{changed(store)}",
        "b/x.png": f"{size}:1700000000123456789:{changed(tmp_path / 'b/x.png')}",
    }
    os.utime(tmp_path / "a/x.png", ns=(5, 1_700_000_000_123_456_790))
    assert ImageFolder(root).load().stamps[0].startswith(f"{size}:1700000000123456790:")


def changed(path):
    return path.stat().st_ctime_ns


def test_a_file_moved_to_the_place_of_another_has_another_stamp(tmp_path):
    root = make(tmp_path, "a/x.png", "b/y.png")
    first, second = (tmp_path / name for name in ("a/x.png", "b/y.png"))
    for file in (first, second):
        os.utime(file, ns=(7, 7))
    before = ImageFolder(root).load().stamps.tolist()
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    after = ImageFolder(root).load().stamps.tolist()
    # Each file as large and as old as the other.
    assert [stamp.split(":")[:2] for stamp in before] == [stamp.split(":")[:2] for stamp in after]
    assert not set(before) & set(after)


def test_stamps_of_paths(tmp_path):
    file = tmp_path / "x.png"
    file.write_bytes(b"123")
    os.utime(file, ns=(0, 7))
    assert disk.stamps([file, str(tmp_path / "no"), tmp_path]).tolist() == [
        *(f"3:7:{changed(file)}", "missing", "missing")
    ]
    assert disk.stamp(tmp_path) is None
    assert disk.stamp("a\0b") == "missing"
    assert disk.stamps([]).shape == (0,)


# --- pixels


def test_read(tmp_path):
    root = make(tmp_path, "a/x.png", "b/x.png")
    (tmp_path / "a/bad.png").write_bytes(b"no picture")
    (tmp_path / "b/broken.png").symlink_to("nowhere.png")
    source = ImageFolder(root)
    keys = source.load().keys.tolist()
    assert keys == ["a/bad.png", "a/x.png", "b/broken.png", "b/x.png"]
    bad, good, broken = source.read([0, 1, 2])
    assert isinstance(bad, BadImageError)
    assert isinstance(broken, BadImageError)
    assert torch.equal(good, torch.tensor([[[7, 200]]], dtype=torch.uint8))
    (tmp_path / "b/x.png").unlink()
    assert isinstance(source.read([3])[0], BadImageError)


# --- what it says


def test_summary(tmp_path):
    one = make(tmp_path / "1", "p/a/x.png", "p/b/x.png", "q/a/x.png")
    where = tmp_path.resolve()
    assert ImageFolder(one).summary() == (
        f"3 pictures in {where}/1, layout site/class: 2 sites, 2 classes"
    )
    two = make(tmp_path / "2", "train/a/x.png", "train/b/x.png", "test/a/x.png")
    assert ImageFolder(two).summary() == (
        f"3 pictures in {where}/2, layout split/class: 2 classes, train 2, test 1"
    )
