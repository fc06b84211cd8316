from __future__ import annotations

import io
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import httpx
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image

from fedlora.data.decode import BadImageError
from fedlora.data.sources.hugging_face import HuggingFaceImages
from fedlora.data.sources.parquet_shards import ParquetShards
from fedlora.errors import FedloraError

NAMES = ["airplane", "automobile", "bird"]
CIFAR = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})


@pytest.fixture(autouse=True)
def _no_network_and_no_home(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OfflineModeIsEnabled("offline")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)


def png(value):
    """A picture of 2 x 3 pixels that are all of one value."""
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (value % 256, value // 256, 0)).save(file, "PNG")
    return file.getvalue()


def values_of(pictures):
    return [int(picture[0, 0, 0]) + 256 * int(picture[1, 0, 0]) for picture in pictures]


def cifar(start, count, **columns):
    """A data set with CIFAR-10's columns; the picture of row i has the value start + i."""
    rows = {
        "img": [{"bytes": png(start + i), "path": None} for i in range(count)],
        "label": [(start + i) % 3 for i in range(count)],
    }
    features = datasets.Features({**CIFAR, **{name: kind for name, (kind, _) in columns.items()}})
    rows |= {name: values for name, (_, values) in columns.items()}
    return datasets.Dataset.from_dict(rows, features=features)


def hub_folder(path, **splits):
    """The layout of the hub: parquet files in data/."""
    (path / "data").mkdir(parents=True)
    for split, rows in splits.items():
        rows.to_parquet(path / "data" / f"{split}-00000-of-00001.parquet")
    return str(path)


def message(source):
    with pytest.raises(FedloraError) as error:
        source.prepare()
    assert "\n" not in str(error.value)
    return str(error.value)


# Where it is


def saved_dict(path):
    datasets.DatasetDict(train=cifar(0, 5), test=cifar(300, 3)).save_to_disk(path)


def in_the_hubs_layout(path):
    hub_folder(path, train=cifar(0, 5), test=cifar(300, 3))


def without_a_data_folder(path):
    path.mkdir()
    cifar(0, 5).to_parquet(path / "train.parquet")
    cifar(300, 3).to_parquet(path / "test.parquet")


def arrow_files(path):
    saved_dict(path.with_name("saved"))
    path.mkdir()
    for split in ("train", "test"):
        (found,) = (path.with_name("saved") / split).glob("*.arrow")
        shutil.copy(found, path / f"{split}.arrow")


@pytest.mark.parametrize(
    "make", [saved_dict, in_the_hubs_layout, without_a_data_folder, arrow_files]
)
def test_a_folder(tmp_path, make):
    make(tmp_path / "set")
    source = HuggingFaceImages(str(tmp_path / "set"))
    source.prepare()
    table = source.load()
    assert source.class_names == NAMES
    assert table.labels.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert table.split.tolist() == ["train"] * 5 + ["test"] * 3
    assert table.keys.tolist() == [f"train/{i:08d}" for i in range(5)] + [
        f"test/{i:08d}" for i in range(3)
    ]
    assert table.site is None
    assert table.columns == {}
    pictures = source.read(range(8))
    assert all(picture.shape == (3, 2, 3) for picture in pictures)
    assert pictures[0].dtype == torch.uint8
    assert values_of(pictures) == [0, 1, 2, 3, 4, 300, 301, 302]
    assert values_of(source.read([7, 0, 5, 0])) == [302, 0, 300, 0]
    assert source.read([]) == []
    # Nothing is copied.
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def one_parquet(path):
    path = path.with_suffix(".parquet")
    cifar(0, 5).to_parquet(path)
    return path


def one_arrow(path):
    cifar(0, 5).save_to_disk(path)
    return next(path.glob("*.arrow"))


def arrow_file_format(path):
    path = path.with_suffix(".arrow")
    table = cifar(0, 5).data.table
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return path


def saved(path):
    cifar(0, 5).save_to_disk(path)
    return path


@pytest.mark.parametrize("make", [one_parquet, one_arrow, arrow_file_format, saved])
def test_a_single_table_is_for_training(tmp_path, make):
    source = HuggingFaceImages(str(make(tmp_path / "set")))
    assert source.class_names == NAMES
    assert source.load().split.tolist() == ["train"] * 5
    assert values_of(source.read(range(5))) == [0, 1, 2, 3, 4]


def test_a_folder_of_pictures_in_the_hubs_layout(tmp_path):
    for split, name, value in (("train", "cat", 1), ("train", "dog", 2), ("test", "dog", 3)):
        folder = tmp_path / "set" / split / name
        folder.mkdir(parents=True)
        (folder / "x.png").write_bytes(png(value))
    source = HuggingFaceImages(str(tmp_path / "set"))
    assert source.class_names == ["cat", "dog"]
    assert source.load().labels.tolist() == [0, 1, 1]
    assert values_of(source.read([2, 1, 0])) == [3, 2, 1]
    before = source.load().stamps.tolist()
    os.utime(tmp_path / "set" / "test" / "dog" / "x.png", ns=(1, 1))
    after = HuggingFaceImages(str(tmp_path / "set")).load().stamps.tolist()
    assert before[2] != after[2]


def test_several_shards_and_row_groups(tmp_path):
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for i in range(3):
        path = folder / f"train-{i:05d}-of-00003.parquet"
        pq.write_table(cifar(i * 7, 7).data.table, path, row_group_size=2)
    source = HuggingFaceImages(str(tmp_path / "set"))
    table = source.load()
    assert table.labels.tolist() == [i % 3 for i in range(21)]
    assert len(set(table.stamps.tolist())) == 3
    assert (table.stamps[:7] == table.stamps[0]).all()
    order = np.random.default_rng(0).permutation(21).tolist()
    assert values_of(source.read(order)) == order
    with ThreadPoolExecutor(8) as pool:
        chunks = [order[i : i + 4] for i in range(0, 21, 4)] * 20
        found = list(pool.map(source.read, chunks))
    assert [values_of(pictures) for pictures in found] == chunks


def test_arrow_in_threads(tmp_path):
    cifar(0, 50).save_to_disk(tmp_path / "set", num_shards=4)
    source = HuggingFaceImages(str(tmp_path / "set"))
    order = np.random.default_rng(0).permutation(50).tolist()
    source.prepare()
    with ThreadPoolExecutor(8) as pool:
        chunks = [order[i : i + 6] for i in range(0, 50, 6)] * 20
        found = list(pool.map(source.read, chunks))
    assert [values_of(pictures) for pictures in found] == chunks


def test_configs(tmp_path):
    for name, start in (("small", 0), ("large", 100)):
        hub_folder(tmp_path / "set" / name, train=cifar(start, 3))
    readme = "".join(
        f"- config_name: {name}\n  data_files: {name}/data/*\n" for name in ("small", "large")
    )
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{readme}---\n# Set\n")
    folder = str(tmp_path / "set")
    source = HuggingFaceImages(folder, config="large")
    assert values_of(source.read([0])) == [100]
    assert source.place != HuggingFaceImages(folder, config="small").place
    found = message(HuggingFaceImages(folder))
    assert found.startswith(f"data.source.config of {folder}: Config name is missing.")
    assert "['small', 'large']" in found
    found = message(HuggingFaceImages(folder, config="huge"))
    assert "(got 'huge')" in found
    assert "['small', 'large']" in found


def readme(rows):
    return (
        "---\ndataset_info:\n  features:\n  - name: img\n    dtype: image\n  - name: label\n"
        "    dtype:\n      class_label:\n        names:\n          '0': ant\n"
        "          '1': bee\n          '2': cow\n"
        f"  splits:\n  - name: train\n    num_examples: {rows}\n---\n"
    )


def test_the_readme_names_the_classes(tmp_path):
    folder = tmp_path / "set"
    plain = cifar(0, 3).data.table.replace_schema_metadata(None)
    (folder / "data").mkdir(parents=True)
    pq.write_table(plain, folder / "data" / "train-00000-of-00001.parquet")
    assert HuggingFaceImages(str(folder)).class_names == ["0", "1", "2"]
    (folder / "README.md").write_text(readme(3))
    assert HuggingFaceImages(str(folder)).class_names == ["ant", "bee", "cow"]


@pytest.mark.parametrize(
    ("kind", "labels", "expected"),
    [
        (pa.uint8(), [2, 0, 1], [2, 0, 1]),
        (pa.float64(), [2.0, 0.0, 1.0], [2, 0, 1]),
        (pa.string(), ["cow", "ant", "bee"], [2, 0, 1]),
        (pa.dictionary(pa.int8(), pa.string()), ["cow", "ant", "bee"], [2, 0, 1]),
        (pa.uint8(), [2, None, 1], "rows without a label (row 1, column 'label': -1)"),
        (pa.float64(), [2.0, 0.0, float("nan")], "rows without a label (row 2"),
        (pa.string(), ["cow", "ant", "emu"], "rows without a label (row 2"),
    ],
)
def test_classes_of_the_readme_in_columns_of_other_types(tmp_path, kind, labels, expected):
    (tmp_path / "README.md").write_text(readme(3))
    table = pa.table(
        {"img": [{"bytes": png(0), "path": None}] * 3, "label": pa.array(labels, kind)}
    )
    pq.write_table(table, tmp_path / "train.parquet")
    source = HuggingFaceImages(str(tmp_path))
    if isinstance(expected, str):
        assert expected in message(source)
    else:
        assert source.load().labels.tolist() == expected
        assert source.class_names == ["ant", "bee", "cow"]


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_numbers_mean_the_same_classes_in_all_files(tmp_path, ending):
    names = (["cat", "dog"], ["dog", "cat"])
    for i, found in enumerate(names):
        features = datasets.Features({**CIFAR, "label": datasets.ClassLabel(names=found)})
        rows = {"img": [{"bytes": png(0), "path": None}], "label": [0]}
        part = datasets.Dataset.from_dict(rows, features=features)
        path = tmp_path / "set" / f"train-{i}.{ending}"
        path.parent.mkdir(exist_ok=True)
        if ending == "parquet":
            part.to_parquet(path)
        else:
            part.save_to_disk(tmp_path / f"saved{i}")
            shutil.copy(next((tmp_path / f"saved{i}").glob("*.arrow")), path)
    found = message(HuggingFaceImages(str(tmp_path / "set")))
    assert f"train-1.{ending}: column 'label' has the classes 'dog', 'cat', other files" in found


def test_two_columns_of_one_name(tmp_path):
    columns = [pa.array([png(0)]), pa.array(["x"]), pa.array(["y"])]
    table = pa.Table.from_arrays(columns, ["img", "label", "label"])
    pq.write_table(table, tmp_path / "set.parquet")
    found = message(HuggingFaceImages(str(tmp_path / "set.parquet")))
    assert "set.parquet has 2 columns called 'label'" in found


def test_sites_in_folders_are_not_lost(tmp_path):
    for site in ("paris", "rome"):
        for name in ("cat", "dog"):
            folder = tmp_path / "data" / site / "train" / name
            folder.mkdir(parents=True)
            (folder / "x.png").write_bytes(png(0))
    assert "Use ImageFolder for these" in message(HuggingFaceImages(str(tmp_path)))


def test_a_folder_whose_name_is_a_pattern(tmp_path):
    folder = hub_folder(tmp_path / "set[1]", train=cifar(0, 3))
    assert "It reads [ in a path as a pattern: rename" in message(HuggingFaceImages(folder))


def test_a_download_that_was_broken_off(tmp_path):
    folder = Path(hub_folder(tmp_path / "set", train=cifar(0, 3)))
    (folder / "README.md").write_text(readme(50_000))
    found = message(HuggingFaceImages(str(folder)))
    assert "split 'train' has 3 rows but its README.md says 50,000. Download it again" in found


# Another run, another process


@pytest.mark.parametrize("make", [saved_dict, in_the_hubs_layout])
def test_stamps_follow_the_files(tmp_path, make):
    make(tmp_path / "set")
    folder = str(tmp_path / "set")
    before = HuggingFaceImages(folder).load().stamps
    assert HuggingFaceImages(folder).load().stamps.tolist() == before.tolist()
    (path,) = {*(tmp_path / "set").rglob("test-*"), *(tmp_path / "set" / "test").glob("*.arrow")}
    os.utime(path, ns=(1, 1))
    after = HuggingFaceImages(folder).load().stamps
    assert (before == after).tolist() == [True] * 5 + [False] * 3


def test_stamps_follow_a_row_to_another_number(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    cifar(0, 2).to_parquet(folder / "train-0.parquet")
    cifar(9, 5).to_parquet(folder / "train-2.parquet")
    before = HuggingFaceImages(str(folder)).load()
    cifar(5, 2).to_parquet(folder / "train-1.parquet")
    source = HuggingFaceImages(str(folder))
    assert values_of(source.read([4])) == [9]  # it was row 2
    kept = source.load().keys[:7] == before.keys
    assert kept.all()
    assert (source.load().stamps[:7] == before.stamps).tolist() == [True] * 2 + [False] * 5


def test_place(tmp_path, monkeypatch):
    folder = hub_folder(tmp_path / "set", train=cifar(0, 3))
    monkeypatch.chdir(tmp_path)
    assert HuggingFaceImages(folder).place == HuggingFaceImages("set").place
    hub = HuggingFaceImages("me/set")
    assert hub.place == "hf://datasets/me/set@main"
    places = [hub.place, HuggingFaceImages("me/set", revision="v1").place]
    places += [HuggingFaceImages("me/set", config="c").place]
    places += [HuggingFaceImages("me/set", image_column="c").place]
    assert len(set(places)) == 4


def test_a_prepared_source_can_be_sent_to_another_process(tmp_path):
    source = HuggingFaceImages(hub_folder(tmp_path / "set", train=cifar(0, 3)))
    source.prepare()
    other = pickle.loads(pickle.dumps(source))
    assert values_of(other.read([2])) == [2]


def test_the_constructor_looks_at_nothing():
    HuggingFaceImages("/nowhere")
    with pytest.raises(FedloraError, match=r"data\.source\.name must be a data set"):
        HuggingFaceImages("")
    with pytest.raises(FedloraError, match=r"data\.source\.splits must map train"):
        HuggingFaceImages("a/b", splits={"test": "test"})
    with pytest.raises(FedloraError, match=r"data\.source\.splits must map train"):
        HuggingFaceImages("a/b", splits={"train": "train", "tset": "test"})
    with pytest.raises(FedloraError, match=r"data\.source\.splits must name different splits"):
        HuggingFaceImages("a/b", splits={"train": "train", "test": "train"})


# Columns


def table_of(path, **columns):
    pq.write_table(pa.table(columns), path / "set.parquet")
    return str(path / "set.parquet")


STRUCTS = [{"bytes": png(i), "path": None} for i in range(3)]


@pytest.mark.parametrize(
    ("name", "pictures"),
    [
        ("img", STRUCTS),
        ("anything", STRUCTS),
        ("anything", [{"bytes": png(i)} for i in range(3)]),
        ("anything", pa.array([png(i) for i in range(3)])),
        ("anything", pa.array([png(i) for i in range(3)], pa.large_binary())),
    ],
)
def test_pictures_in_a_plain_column(tmp_path, name, pictures):
    path = table_of(tmp_path, **{name: pictures, "label": ["b", "a", "b"]})
    source = HuggingFaceImages(path)
    assert source.class_names == ["a", "b"]
    assert source.load().labels.tolist() == [1, 0, 1]
    assert values_of(source.read(range(3))) == [0, 1, 2]
    assert len(set(source.load().stamps.tolist())) == 1


@pytest.mark.parametrize(
    "pictures",
    [
        [{"bytes": png(1), "path": "x"}, {"bytes": None, "path": "p/2.png"}, None],
        [{"bytes": png(1), "path": "x"}, {"bytes": None, "path": "p/2.png"}, {"bytes": None}],
        ["p/1.png", "p/2.png", None],
    ],
)
@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_paths_instead_of_bytes(tmp_path, pictures, ending):
    (tmp_path / "p").mkdir()
    for i in (1, 2):
        (tmp_path / "p" / f"{i}.png").write_bytes(png(i))
    path = table_of(tmp_path, image=pictures, label=["a", "b", "a"])
    if ending == "arrow":
        datasets.Dataset.from_parquet(path, cache_dir=tmp_path / "c").save_to_disk(tmp_path / "s")
        shutil.move(next((tmp_path / "s").glob("*.arrow")), tmp_path / "set.arrow")
        path = str(tmp_path / "set.arrow")
    source = HuggingFaceImages(path)
    first, second, third = source.read(range(3))
    assert values_of([first, second]) == [1, 2]
    assert isinstance(third, BadImageError)
    assert "no picture" in str(third)
    before = source.load().stamps
    os.utime(tmp_path / "p" / "2.png", ns=(1, 1))
    after = HuggingFaceImages(path).load().stamps
    assert (before == after).tolist() == [True, False, True]


def test_a_broken_picture(tmp_path):
    path = table_of(tmp_path, image=[png(0), b"no picture", b""], label=["a", "b", "a"])
    good, bad, empty = HuggingFaceImages(path).read(range(3))
    assert values_of([good]) == [0]
    assert isinstance(bad, BadImageError)
    assert isinstance(empty, BadImageError)


def test_a_broken_file(tmp_path):
    path = Path(
        table_of(tmp_path, label=["a", "b"] * 50, image=[os.urandom(99) * 9 for _ in range(100)])
    )
    content = bytearray(path.read_bytes())
    content[4000:8000] = bytes(4000)
    path.write_bytes(content)
    found = HuggingFaceImages(str(path)).read([0, 99])
    assert "the data set cannot be read here" in str(found[0])
    assert all(isinstance(picture, BadImageError) for picture in found)
    path.write_bytes(b"PAR1 and so on")
    assert "cannot be opened" in message(HuggingFaceImages(str(path)))
    path.write_bytes(b"something else")
    assert "which is neither" in message(HuggingFaceImages(str(path)))


def test_row_groups_that_do_not_fit_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("fedlora.data.sources.parquet_shards._LARGEST_GROUP", 100)
    found = message(HuggingFaceImages(table_of(tmp_path, image=STRUCTS, label=["a", "b", "a"])))
    assert "GB of pictures in one row group" in found
    assert "row_group_size=1000" in found


def test_row_groups_in_memory_are_few(tmp_path):
    path = tmp_path / "set.parquet"
    pq.write_table(cifar(0, 20).data.table, path, row_group_size=2)
    source = HuggingFaceImages(str(path))
    assert values_of(source.read(range(20))) == list(range(20))
    (part,) = source._found.rows.parts.values()
    assert isinstance(part, ParquetShards)
    assert len(part._newest) == 2


def test_which_column_is_which(tmp_path):
    path = table_of(
        tmp_path,
        image=STRUCTS,
        mask=STRUCTS,
        fine_label=[0, 1, 2],
        coarse=pa.array(["x", "y", "x"]).dictionary_encode(),
        site=[1, 2, 1],
        age=[30.0, 31.5, 7],
        male=[True, False, True],
        note=["n" * 101, "", ""],
        boxes=[[1], [2], [3]],
    )
    source = HuggingFaceImages(path)
    table = source.load()
    assert table.labels.tolist() == [0, 1, 2]
    assert table.site.tolist() == ["1", "2", "1"]
    assert {name: column.tolist() for name, column in table.columns.items()} == {
        "coarse": ["x", "y", "x"],
        "age": [30, 31.5, 7],
        "male": ["true", "false", "true"],
    }
    other = HuggingFaceImages(path, image_column="mask", label_column="coarse", site_column="age")
    assert other.class_names == ["x", "y"]
    assert other.load().site.tolist() == ["30", "31.5", "7"]
    assert other.load().columns["fine_label"].tolist() == [0, 1, 2]


def test_several_classlabels(tmp_path):
    coarse = datasets.ClassLabel(names=["machine", "animal"])
    rows = cifar(0, 3, coarse_label=(coarse, [0, 0, 1])).rename_column("label", "fine_label")
    folder = hub_folder(tmp_path / "set", train=rows)
    source = HuggingFaceImages(folder)
    assert source.class_names == NAMES
    assert source.load().columns["coarse_label"].tolist() == ["machine", "machine", "animal"]
    other = HuggingFaceImages(folder, label_column="coarse_label")
    assert other.class_names == ["machine", "animal"]
    assert other.load().labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("columns", "options", "expected"),
    [
        (
            {"left": STRUCTS, "right": STRUCTS, "label": ["a", "b", "a"]},
            {},
            "several columns may hold the pictures: 'left', 'right'. Set data.source.image_column",
        ),
        (
            {"label": ["a", "b", "a"]},
            {},
            "no column can be told to hold the pictures among 'label'. Set data.source.image_c",
        ),
        (
            {"image": STRUCTS, "label": ["a", "b", "a"], "target": [1, 2, 3]},
            {},
            "several columns may hold the labels: 'label', 'target'. Set data.source.label_column",
        ),
        (
            {"image": STRUCTS, "kind": ["a", "b", "a"]},
            {},
            "no column can be told to hold the labels among 'image', 'kind'. Set data.source.label",
        ),
        (
            {"image": STRUCTS, "label": ["a", "b", "a"]},
            {"image_column": "imgae"},
            "no column 'imgae', only 'image', 'label'. Set data.source.image_column. Did you mean",
        ),
        (
            {"image": STRUCTS, "label": ["a", "b", "a"]},
            {"label_column": "lable"},
            "Set data.source.label_column. Did you mean 'label'?",
        ),
        (
            {"image": STRUCTS, "label": ["a", "b", "a"]},
            {"site_column": "lable"},
            "Set data.source.site_column. Did you mean 'label'?",
        ),
        (
            {"image": STRUCTS, "label": [1, 2, 3]},
            {"image_column": "label"},
            "column 'label' holds no pictures but Value('int64')",
        ),
        (
            {"image": STRUCTS, "label": [["a"], ["b", "c"], []]},
            {},
            "column 'label' holds lists instead of single values. One label per picture: fedlora",
        ),
        (
            {"image": STRUCTS, "label": ["a", None, "b"]},
            {},
            "split 'train' row 1, column 'label': empty, but every picture needs a label",
        ),
        (
            {"image": STRUCTS, "label": [0, 5, 1]},
            {"class_names": ["a", "b"]},
            "row 1, column 'label': the label must be between 0 and 1",
        ),
        (
            {"image": STRUCTS, "label": ["a", "b", "a"], "site": ["s", "", "s"]},
            {},
            "split 'train' row 1, column 'site': empty, but every picture needs a site",
        ),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.string())}, {}, "no rows"),
    ],
)
def test_columns_that_cannot_be_used(tmp_path, columns, options, expected):
    assert expected in message(HuggingFaceImages(table_of(tmp_path, **columns), **options))


def test_shards_with_other_columns(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    both = pa.table({"image": STRUCTS, "label": ["a", "b", "a"]})
    pq.write_table(both, folder / "train-0.parquet")
    pq.write_table(pa.table({"image": STRUCTS}), folder / "train-1.parquet")
    found = message(HuggingFaceImages(str(folder)))
    assert "train-1.parquet has no column 'label'" in found


# Classes


@pytest.mark.parametrize(
    ("given", "labels", "names"),
    [
        (None, [0, 1, 0], NAMES),  # no row is a bird
        (["plane", "car", "bird"], [0, 1, 0], ["plane", "car", "bird"]),
        (["bird", "automobile", "airplane"], [2, 1, 2], ["bird", "automobile", "airplane"]),
        (
            {"automobile": "car", "airplane": "plane", "bird": "bird"},
            [1, 0, 1],
            ["car", "plane", "bird"],
        ),
    ],
)
def test_class_names(tmp_path, given, labels, names):
    rows = cifar(0, 4).select([0, 1, 3])
    source = HuggingFaceImages(hub_folder(tmp_path / "set", train=rows), class_names=given)
    assert source.class_names == names
    assert source.load().labels.tolist() == labels


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a", "b"], "must be one name for each of the 3 classes of the data set, in their order"),
        (
            ["automobile", "airplane", "dog"],
            "renames class 0, 'airplane', to 'automobile', which is class 1 of the data set",
        ),
        ({"airplane": "a", "bird": "b"}, "must list every class of column 'label', 'automobile'"),
        ({"airplane": "a", "bird": "b", "car": "c"}, "lists 'car' but there is no class of column"),
    ],
)
def test_class_names_that_do_not_fit(tmp_path, given, expected):
    folder = hub_folder(tmp_path / "set", train=cifar(0, 3))
    assert expected in message(HuggingFaceImages(folder, class_names=given))


def test_one_class_only(tmp_path):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(1)})
    rows = datasets.Dataset.from_dict({"img": STRUCTS, "label": [0, 0, 0]}, features=features)
    found = message(HuggingFaceImages(hub_folder(tmp_path / "set", train=rows)))
    assert "there is one class only" in found


def test_splits_with_other_classes(tmp_path):
    turned = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=NAMES[::-1])}
    )
    rows = datasets.Dataset.from_dict({"img": STRUCTS, "label": [0, 1, 2]}, features=turned)
    datasets.DatasetDict(train=cifar(0, 3), test=rows).save_to_disk(tmp_path / "set")
    found = message(HuggingFaceImages(str(tmp_path / "set")))
    assert "column 'label' has other classes in split 'test' than in 'train'" in found


@pytest.mark.parametrize("missing", [-1, None])
def test_a_split_without_labels(tmp_path, missing):
    rows = datasets.Dataset.from_dict({"img": STRUCTS, "label": [missing] * 3}, features=CIFAR)
    folder = hub_folder(tmp_path / "set", train=cifar(0, 3), test=rows)
    assert message(HuggingFaceImages(folder)) == (
        f"{folder}: split 'test' has rows without a label (row 0, column 'label': -1). Leave it "
        "out: data.source.splits={train: train}."
    )
    source = HuggingFaceImages(folder, splits={"train": "train"})
    assert source.load().split.tolist() == ["train"] * 3


# Splits


def test_splits_by_name(tmp_path):
    datasets.DatasetDict(training=cifar(0, 2), dev=cifar(9, 1), Testing=cifar(5, 2)).save_to_disk(
        tmp_path / "set"
    )
    folder = str(tmp_path / "set")
    assert HuggingFaceImages(folder).load().split.tolist() == ["train"] * 2 + ["val"] + ["test"] * 2
    chosen = HuggingFaceImages(folder, splits={"validation": "Testing", "train": "dev"})
    assert chosen.load().split.tolist() == ["val", "val", "train"]
    assert chosen.load().keys.tolist() == ["Testing/00000000", "Testing/00000001", "dev/00000000"]
    assert values_of(chosen.read([2, 0])) == [9, 5]
    found = message(HuggingFaceImages(folder, splits={"train": "trainning"}))
    assert "names 'trainning' but" in found
    assert "'training', 'dev', 'Testing'. Did you mean 'training'?" in found


def test_unknown_splits(tmp_path):
    datasets.DatasetDict(train=cifar(0, 2), extra=cifar(9, 1)).save_to_disk(tmp_path / "set")
    found = message(HuggingFaceImages(str(tmp_path / "set")))
    assert "has the splits 'train', 'extra', 'extra' unknown" in found
    assert "data.source.splits={train: train}" in found


def test_nothing_to_train_on(tmp_path):
    found = message(HuggingFaceImages(hub_folder(tmp_path / "set", test=cifar(0, 2))))
    assert "has the splits 'test', none of them is for training" in found
    assert "data.source.splits={train: test}" in found


# The hub


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


def answer(kind, status, text=""):
    request = httpx.Request("GET", "https://huggingface.co/api/datasets/me/set")
    return kind(text, response=httpx.Response(status, request=request))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            httpx.ConnectError("Name or service not known"),
            "the Hugging Face hub cannot be reached (Name or service not known), and no earlier",
        ),
        (httpx.ConnectTimeout(""), "cannot be reached (ConnectTimeout), and no earlier run"),
        (OfflineModeIsEnabled("x"), "cannot be reached (the variable HF_HUB_OFFLINE forbids it)"),
        (answer(HfHubHTTPError, 503), "cannot be reached (it answers 503)"),
        (httpx.ConnectError("x"), "`hf download --repo-type dataset me/set --local-dir DIR`"),
        (httpx.ConnectError("x"), "data.source.name=DIR"),
        (
            answer(RepositoryNotFoundError, 401, "private or gated repo"),
            "data.source.name=me/set: there is no such data set on the Hugging Face hub, or it is",
        ),
        (
            HFValidationError("Repo id must"),
            "me/set: there is no such data set on the Hugging Face",
        ),
        (answer(GatedRepoError, 403), "data.source.name=me/set is gated: ask for access at"),
        (answer(RevisionNotFoundError, 404), "data.source.revision: me/set has no such branch"),
    ],
)
def test_the_hub_says_no(monkeypatch, capfd, error, expected):
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", failing(error))
    assert expected in message(HuggingFaceImages("me/set"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("'me/set' is a gated dataset on the Hub."),
            "is gated: ask for access",
        ),
        (
            RuntimeError("Dataset scripts are no longer supported, but found set.py"),
            "is a script, which is not run",
        ),
        (
            ValueError("BuilderConfig 'x' not found. Available: ['a', 'b']"),
            "data.source.config of me/set: BuilderConfig 'x' not found. Available: ['a', 'b'].",
        ),
        (OSError(28, "No space left on device"), "cannot be opened: [Errno 28] No space left"),
    ],
)
def test_loading_says_no(monkeypatch, error, expected):
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", failing(error))
    assert expected in message(HuggingFaceImages("me/set"))


def test_the_hub_can_be_reached(tmp_path, monkeypatch):
    saved_dict(tmp_path / "saved")
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        assert datasets.are_progress_bars_disabled()
        return datasets.load_from_disk(tmp_path / "saved")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = HuggingFaceImages("me/set", config="c", revision="v1")
    assert values_of(source.read([7])) == [302]
    assert asked == [(("me/set", "c"), {"revision": "v1", "keep_in_memory": False})]
    assert not datasets.are_progress_bars_disabled()


def cached(tmp_path, commit):
    """What a run with a network leaves in the cache of datasets."""
    folder = hub_folder(tmp_path / "set", train=cifar(0, 3))
    found = datasets.load_dataset(folder)["train"]
    at = Path(found.cache_files[0]["filename"]).parent
    at.rename(at.with_name(commit))
    (tmp_path / "cache" / "set").rename(tmp_path / "cache" / "me___set")
    shutil.rmtree(folder)


def test_the_cache_serves_without_a_network(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cached(tmp_path, "a" * 40)
    capfd.readouterr()
    asked = []
    monkeypatch.setattr(huggingface_hub.HfApi, "hf_hub_download", lambda *_, **__: asked.append(1))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert values_of(HuggingFaceImages("me/set").read(range(3))) == [0, 1, 2]
    assert not asked
    assert datasets.config.HF_HUB_OFFLINE is False
    assert HuggingFaceImages("me/set", revision="a" * 40).class_names == NAMES
    found = message(HuggingFaceImages("me/set", revision="b" * 40))
    assert f"what the cache holds is another one, '{'a' * 40}'" in found
    assert "cannot be had" in message(HuggingFaceImages("me/set", revision="main"))
    note = tmp_path / "hub" / "datasets--me--set" / "refs" / "main"
    note.parent.mkdir(parents=True)
    note.write_text("a" * 40)
    assert HuggingFaceImages("me/set", revision="main").class_names == NAMES
    found = message(HuggingFaceImages("me/set", config="other"))
    assert "data.source.config of me/set (got 'other')" in found
    assert "Available configs in the cache: ['default']" in found
    assert capfd.readouterr() == ("", "")


def test_what_is_no_data_set(tmp_path):
    expected = "data.source.name must be a data set of the Hugging Face hub (OWNER/NAME), a fol"
    for name in (
        "mnist",
        "imagefolder",
        str(tmp_path / "gone"),
        "./gone/x",
        "a/b/c",
        "x/y.parquet",
    ):
        assert expected in message(HuggingFaceImages(name))
    (tmp_path / "empty").mkdir()
    assert "does not hold the files of a data set" in message(
        HuggingFaceImages(str(tmp_path / "empty"))
    )
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "x.csv").write_text("a,b\n1,2\n")
    assert "holds csv files" in message(HuggingFaceImages(str(tmp_path / "csv")))
    hub_folder(tmp_path / "code", train=cifar(0, 3))
    (tmp_path / "code" / "code.py").write_text("raise SystemExit")
    assert "is a script, which is not run" in message(HuggingFaceImages(str(tmp_path / "code")))


def test_summary(tmp_path):
    in_the_hubs_layout(tmp_path / "set")
    name = str(tmp_path / "set")
    assert HuggingFaceImages(name).summary() == (
        f"8 pictures in {name}: 3 classes, train 5, test 3"
    )
