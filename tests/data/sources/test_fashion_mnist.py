from __future__ import annotations

import gzip
import os
import pickle
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlora.data.sources import idx_file
from fedlora.data.sources.fashion_mnist import FashionMNIST
from fedlora.errors import FedloraError

# 3 pictures to train on and 2 to test with, 4 x 2 pixels, numbered through: picture i, in both
# files together, holds 8 i to 8 i + 7.
SHAPE = (4, 2)
FILES = {
    "train-images-idx3-ubyte": struct.pack(">4I", 0x803, 3, *SHAPE) + bytes(range(24)),
    "train-labels-idx1-ubyte": struct.pack(">2I", 0x801, 3) + bytes([9, 0, 2]),
    "t10k-images-idx3-ubyte": struct.pack(">4I", 0x803, 2, *SHAPE) + bytes(range(24, 40)),
    "t10k-labels-idx1-ubyte": struct.pack(">2I", 0x801, 2) + bytes([0, 1]),
}
IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = FILES
EXPECTED = torch.arange(40, dtype=torch.uint8).reshape(5, 1, *SHAPE)


def make(folder: Path, zipped: bool = True, **changed: bytes | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {**FILES, **{k.replace("_", "-"): v for k, v in changed.items()}}.items():
        if content is not None:
            path = folder / (f"{name}.gz" if zipped else name)
            path.write_bytes(gzip.compress(content) if zipped else content)
    return folder


def key(name: str) -> str:
    return name.replace("-", "_")


def refused(root: Path, message: str, **options: object) -> None:
    with pytest.raises(FedloraError, match=message) as raised:
        FashionMNIST(str(root), **options).prepare()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("below", ["", "raw", "FashionMNIST/raw"])
def test_four_files(tmp_path, zipped, below):
    make(tmp_path / below, zipped)
    source = FashionMNIST(str(tmp_path))
    source.prepare()
    table = source.load()
    assert table.labels.tolist() == [9, 0, 2, 0, 1]
    assert table.labels.dtype == np.int64
    assert table.split.tolist() == ["train"] * 3 + ["test"] * 2
    assert table.keys.tolist() == [
        *("train/00000", "train/00001", "train/00002"),
        *("test/00000", "test/00001"),
    ]
    assert table.site is None
    images = source.read(range(5))
    assert images.dtype == torch.uint8
    assert torch.equal(images, EXPECTED)
    assert torch.equal(source.read([4, 0]), EXPECTED[[4, 0]])
    assert source.read([]).shape == (0, 1, *SHAPE)
    assert source.place == str(tmp_path.resolve())


def test_any_order_of_calls(tmp_path):
    root = str(make(tmp_path))
    assert torch.equal(FashionMNIST(root).read([1]), EXPECTED[[1]])
    assert len(FashionMNIST(root).load()) == 5
    assert FashionMNIST("/nowhere").class_names[0] == "T-shirt/top"


def test_names_and_prompts():
    source = FashionMNIST("x")
    assert source.class_names == [
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ]
    assert any("clothing" in template for template in source.templates)
    digits = FashionMNIST("x", class_names=["zero", "one"])
    assert digits.class_names == ["zero", "one"]
    assert digits.templates == ["a photo of a {}."]
    assert FashionMNIST("x", templates=["{}"]).templates == ["{}"]


def test_stamps_are_of_the_files_of_pictures(tmp_path):
    make(tmp_path)
    os.utime(tmp_path / f"{IMAGES}.gz", ns=(0, 12))
    os.utime(tmp_path / f"{TEST_IMAGES}.gz", ns=(0, 34))
    files = [(tmp_path / f"{name}.gz").stat() for name in (IMAGES, TEST_IMAGES)]
    train, test = (f"{s.st_size}:{s.st_mtime_ns}:{s.st_ctime_ns}" for s in files)
    stamps = FashionMNIST(str(tmp_path)).load().stamps
    assert stamps.tolist() == [train] * 3 + [test] * 2


def test_an_unpacked_file_is_taken_first(tmp_path):
    make(tmp_path, zipped=False)
    (tmp_path / f"{IMAGES}.gz").write_bytes(b"broken")
    FashionMNIST(str(tmp_path)).read([0])


def test_the_content_says_whether_it_is_gzipped(tmp_path):
    # As browsers do it: unpacked under the old name.
    make(tmp_path, zipped=False)
    for name in FILES:
        (tmp_path / name).rename(tmp_path / f"{name}.gz")
    assert torch.equal(FashionMNIST(str(tmp_path)).read(range(5)), EXPECTED)


def test_pictures_are_unpacked_once_by_many_threads(tmp_path, monkeypatch):
    unpacked = []
    read_into = idx_file.IdxFile.read_into

    def counted(self, out):
        if len(self.shape) == 3:
            unpacked.append(self.path.name)
            threading.Event().wait(0.05)  # lets the others come in between
        read_into(self, out)

    monkeypatch.setattr(idx_file.IdxFile, "read_into", counted)
    source = FashionMNIST(str(make(tmp_path)))
    source.prepare()
    source.load()
    assert unpacked == []
    results = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: source.read([i % 5])}))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert unpacked == [f"{IMAGES}.gz", f"{TEST_IMAGES}.gz"]
    assert all(torch.equal(results[i], EXPECTED[[i % 5]]) for i in range(8))


def test_prepare_looks_again(tmp_path):
    source = FashionMNIST(str(make(tmp_path)))
    source.read([0])
    make(tmp_path, **{key(LABELS): FILES[LABELS][:-1] + b"\x07"})
    changed = FILES[IMAGES][:-1] + b"\xff"
    make(tmp_path, **{key(IMAGES): changed})
    source.prepare()
    assert source.read([2])[0, 0, -1, -1] == 255


def test_goes_to_another_process(tmp_path):
    source = FashionMNIST(str(make(tmp_path)))
    source.read([0])
    assert torch.equal(pickle.loads(pickle.dumps(source)).read([3]), EXPECTED[[3]])


# --- what is refused


def test_files_that_are_not_there(tmp_path):
    refused(tmp_path / "x", "data.source.root must be a folder, got .*does not exist")
    refused(tmp_path, r"a file train-images-idx3-ubyte or train-images-idx3-ubyte\.gz, there is")
    make(tmp_path / "raw", **{key(TEST_LABELS): None})
    refused(tmp_path, r"a file t10k-labels-idx1-ubyte or .* in .*raw \(nor in raw or Fashion")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, b"<html>", r"images-idx3-ubyte(\.gz)? is no idx file .* begins with 3c 68 74 6d"),
        (IMAGES, b"", "begins with nothing, not 00 00 08 03"),
        (IMAGES, FILES[LABELS], "begins with 00 00 08 01, not 00 00 08 03"),
        (LABELS, struct.pack(">2I", 0xD01, 3), "begins with 00 00 0d 01, not 00 00 08 01"),
        (IMAGES, FILES[IMAGES][:10], "is cut short within its header"),
        (LABELS, FILES[LABELS][:-1], "is cut short|has 10 bytes, its header tells of 11"),
        (LABELS, FILES[LABELS] + b"0", "has more content|has 12 bytes, its header tells of 11"),
        (
            IMAGES,
            struct.pack(">4I", 0x803, 3, 2**31, 2**31) + bytes(9),
            "is too small for|has 25 bytes",
        ),
        (TEST_LABELS, FILES[LABELS], "3 labels for 2 pictures of 4 x 2 pixels in t10k-images"),
        (TEST_LABELS, FILES[TEST_LABELS][:-1] + b"\x0a", "labels up to 10, and there are 10 class"),
        (
            TEST_IMAGES,
            struct.pack(">4I", 0x803, 2, 2, 2) + bytes(8),
            "must have one size, got 4 x 2 and 2 x 2 pixels",
        ),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_files_that_are_broken(tmp_path, zipped, name, content, message):
    refused(make(tmp_path, zipped, **{key(name): content}), message)


def test_a_plain_file_of_pictures_is_measured_before_it_is_read(tmp_path):
    root = make(tmp_path, zipped=False, **{key(IMAGES): FILES[IMAGES][:-1]})
    refused(root, "has 39 bytes, its header tells of 40. Download it again")


def test_no_pictures(tmp_path):
    empty = {
        key(IMAGES): struct.pack(">4I", 0x803, 0, *SHAPE),
        key(LABELS): struct.pack(">2I", 0x801, 0),
    }
    refused(make(tmp_path, **empty), "has 0 labels for 0 pictures")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda packed: packed[:-9], "is cut short. Download it again"),
        (lambda packed: packed[:-8] + b"12345678", "is a broken gzip file"),
        (lambda packed: packed[:10] + b"\xff" + packed[11:], "is a broken gzip file"),
    ],
)
def test_broken_gzip(tmp_path, change, message):
    noise = np.random.default_rng(0).integers(256, size=3 * 28 * 28, dtype=np.uint8).tobytes()
    size = {key(IMAGES): struct.pack(">4I", 0x803, 3, 28, 28) + noise}
    test = {key(TEST_IMAGES): struct.pack(">4I", 0x803, 2, 28, 28) + noise[: 2 * 28 * 28]}
    root = make(tmp_path, **size, **test)
    file = root / f"{IMAGES}.gz"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(FedloraError, match=rf"train-images-idx3-ubyte\.gz {message}"):
        FashionMNIST(str(root)).read([0])
    # So do the labels, which prepare() reads.
    labels = root / f"{LABELS}.gz"
    labels.write_bytes(labels.read_bytes()[:-9])
    refused(root, "cut short|broken")


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    make(tmp_path, zipped=False)
    opened = Path.open

    def closed(self, *arguments, **options):
        if self.name == TEST_LABELS:
            raise PermissionError(13, "Permission denied")
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", closed)
    refused(tmp_path, r"t10k-labels-idx1-ubyte cannot be read: Permission denied\.$")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": ""}, "data.source.root must be a folder, got an empty name"),
        ({"class_names": ["one"]}, "a list of two names or more"),
        ({"class_names": {"0": "zero", "1": "one"}}, "a list of two names or more"),
        ({"class_names": ["a", "a"]}, "class_names must be distinct"),
        ({"templates": ["no place"]}, "templates must have"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(FedloraError, match=message):
        FashionMNIST(**{"root": "/nowhere", **options})


def test_labels_without_a_name(tmp_path):
    refused(
        make(tmp_path),
        r"labels up to 9, and there are 3 class names, for 0 to 2. Give data.source.class_names",
        class_names=["a", "b", "c"],
    )


def test_digits_are_not_called_clothes(tmp_path):
    make(tmp_path / "MNIST" / "raw")
    for root in (tmp_path / "MNIST", tmp_path / "MNIST" / "raw"):
        with pytest.raises(FedloraError, match=r"holds MNIST, not Fashion-MNIST.*class_names"):
            FashionMNIST(str(root)).prepare()
    names = [f"digit {i}" for i in range(10)]
    assert FashionMNIST(str(tmp_path / "MNIST"), class_names=names).class_names == names
    FashionMNIST(str(tmp_path / "MNIST"), class_names=names).prepare()
