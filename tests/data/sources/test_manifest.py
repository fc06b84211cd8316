from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fedlora.data.decode import BadImageError
from fedlora.data.sources.image_folder import ImageFolder
from fedlora.data.sources.manifest import Manifest
from fedlora.errors import FedloraError


def write(folder, text, name="list.csv"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def draw(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 2), colour).save(path)
    return path


def message(source):
    with pytest.raises(FedloraError) as error:
        source.prepare()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_pictures_and_labels(tmp_path):
    draw(tmp_path / "a" / "1.png", (255, 0, 0))
    draw(tmp_path / "2.png", (0, 0, 9))
    path = write(tmp_path, "path,label\na/1.png,dog\n2.png,cat\n")
    source = Manifest(path)
    source.prepare()
    table = source.load()
    assert source.class_names == ["cat", "dog"]
    assert table.labels.tolist() == [1, 0]
    assert table.split.tolist() == ["train", "train"]
    assert table.keys.tolist() == ["a/1.png", "2.png"]
    assert table.site is None
    assert table.columns == {}
    second, first = source.read([1, 0])
    assert first[:, 0, 0].tolist() == [255, 0, 0]
    assert second.shape == (3, 2, 3)
    assert second.dtype == torch.uint8
    assert second[:, 1, 2].tolist() == [0, 0, 9]


def test_another_process_needs_no_prepare(tmp_path):
    path = write(tmp_path, "path,label\na.png,dog\nb.png,cat\n")
    assert Manifest(path).class_names == ["cat", "dog"]
    prepared = Manifest(path)
    prepared.prepare()
    other = pickle.loads(pickle.dumps(prepared))
    assert other.load().keys.tolist() == ["a.png", "b.png"]


def test_the_constructor_looks_at_no_disk():
    Manifest("/nowhere/list.csv", root="/nowhere/else")
    with pytest.raises(FedloraError, match=r"data\.source\.path must be a file, got an empty name"):
        Manifest(" ")
    with pytest.raises(FedloraError, match="templates must have exactly one"):
        Manifest("x.csv", templates=["no place"])
    with pytest.raises(FedloraError, match="class_names must be distinct"):
        Manifest("x.csv", class_names=["a", "a"])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("path,label\na.png,x\nb.png,y\n", "list.csv"),
        ("path;label\na.png;x\nb.png;y\n", "list.csv"),
        ("path\tlabel\na.png\tx\nb.png\ty\n", "list.tsv"),
        ("\ufeffpath,label\r\na.png,x\r\nb.png,y\r\n", "list.csv"),
        ("path,label\ra.png,x\rb.png,y", "list.txt"),
        ("\n\npath , label\n a.png, x \n\nb.png,y\n,\n\n", "list.csv"),
        (",path,label,\n0,a.png,x,\n1,b.png,y,\n", "list.csv"),
        ('"path","label"\n"a.png","x"\n"b.png","y"\n', "list.csv"),
        ('path, label\na.png, "x"\nb.png, "y"\n', "list.csv"),
    ],
)
def test_kinds_of_csv(tmp_path, text, name):
    source = Manifest(write(tmp_path, text, name))
    table = source.load()
    assert source.class_names == ["x", "y"]
    assert table.keys.tolist() == ["a.png", "b.png"]
    assert table.labels.tolist() == [0, 1]
    assert table.columns == {}


def test_quoted_delimiters_quotes_and_line_breaks(tmp_path):
    text = 'path,label,note\n"a, b.png","say ""x""","one\ntwo"\nb.png,y,\n'
    source = Manifest(write(tmp_path, text))
    assert source.load().keys.tolist() == ["a, b.png", "b.png"]
    assert source.class_names == ['say "x"', "y"]
    assert source.load().columns["note"].tolist() == ["one\ntwo", ""]


@pytest.mark.parametrize(
    "text",
    [
        "sep=;\r\npath;label\r\na.png;x,1\r\nb.png;y\r\n",
        "\ufeffSEP=|\npath|label\na.png|x,1\nb.png|y\n",
    ],
)
def test_excels_line_tells_the_delimiter(tmp_path, text):
    source = Manifest(write(tmp_path, text))
    assert source.load().keys.tolist() == ["a.png", "b.png"]
    assert source.class_names == ["x,1", "y"]


def test_a_site_in_two_forms_of_unicode(tmp_path):
    text = "path,label,site\na.png,x,caf\u00e9\nb.png,y,cafe\u0301\n"
    assert Manifest(write(tmp_path, text)).load().site.tolist() == ["caf\u00e9"] * 2


def test_the_wanted_columns_tell_the_delimiter(tmp_path):
    text = "path;label;x,y,z\na.png;1;0,5\nb.png;2;0,7\n"
    table = Manifest(write(tmp_path, text)).load()
    assert table.labels.tolist() == [0, 1]
    assert table.columns["x,y,z"].tolist() == ["0,5", "0,7"]


def test_sites_splits_and_other_columns(tmp_path):
    text = (
        "file,diagnosis,site,split,age,size,code,empty\n"
        "a.png,nv,paris,Train,41,0.5,007,1\n"
        "b.png,mel,rome,validation,9,-2,012,\n"
        "c.png,nv,paris,TESTING,67,1e3,100,3\n"
    )
    path = write(tmp_path, text)
    table = Manifest(path, path_column="file", label_column="diagnosis").load()
    assert table.site.tolist() == ["paris", "rome", "paris"]
    assert table.split.tolist() == ["train", "val", "test"]
    assert list(table.columns) == ["age", "size", "code", "empty"]
    assert table.columns["age"].dtype == np.int64
    assert table.columns["age"].tolist() == [41, 9, 67]
    assert table.columns["size"].dtype == np.float64
    assert table.columns["size"].tolist() == [0.5, -2, 1000]
    assert table.columns["code"].tolist() == ["007", "012", "100"]
    assert table.columns["empty"].tolist() == ["1", "", "3"]
    other = Manifest(path, path_column="file", label_column="diagnosis", site_column="code").load()
    assert other.site.tolist() == ["007", "012", "100"]
    assert other.columns["site"].tolist() == ["paris", "rome", "paris"]


def test_long_texts_are_not_kept(tmp_path):
    text = f"path,label,report,note\na.png,x,{'r' * 101},{'n' * 100}\nb.png,y,,\n"
    assert list(Manifest(write(tmp_path, text)).load().columns) == ["note"]


def test_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    root = tmp_path / "pictures"
    elsewhere = draw(tmp_path / "other" / "5.png", (5, 0, 0))
    names = ["a/1.png", "./a/2.png", "a\\3.png", f"{root}/a//4.png", str(elsewhere), "~/6.png"]
    names += ["x/../a/7.png"]
    for number in (1, 2, 3, 4, 7):
        draw(root / "a" / f"{number}.png", (number, 0, 0))
    draw(tmp_path / "home" / "6.png", (6, 0, 0))
    (root / "x").mkdir()
    rows = "".join(f"{name},{i % 2}\n" for i, name in enumerate(names))
    source = Manifest(write(tmp_path / "lists", f"path,label\n{rows}"), root=str(root))
    expected = [f"a/{i}.png" for i in (1, 2, 3, 4)]
    expected += [str(elsewhere), str(tmp_path / "home" / "6.png"), "a/7.png"]
    assert source.load().keys.tolist() == expected
    assert [int(picture[0, 0, 0]) for picture in source.read(range(7))] == list(range(1, 8))


def test_what_is_above_a_link(tmp_path):
    draw(tmp_path / "far" / "x.png", (7, 0, 0))
    (tmp_path / "far" / "deep").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "far" / "deep")
    draw(tmp_path / "root" / "y.png", (8, 0, 0))
    path = write(tmp_path / "root", "path,label\nlink/../x.png,a\ny.png,b\n")
    source = Manifest(path)
    assert source.load().keys.tolist() == [str(tmp_path / "far" / "x.png"), "y.png"]
    assert int(source.read([0])[0][0, 0, 0]) == 7


def test_tables_of_the_same_pictures_share_what_is_kept(tmp_path):
    for name in ("c/a.png", "d/b.png"):
        draw(tmp_path / "p" / name, (1, 2, 3))
    (tmp_path / "way").symlink_to(tmp_path / "p")
    text = f"path,label\nc/a.png,1\n{tmp_path}/way/d/b.png,2\n"
    first = Manifest(write(tmp_path / "p", text))
    second = Manifest(write(tmp_path, text, "2.csv"), root=str(tmp_path / "way"))
    folder = ImageFolder(str(tmp_path / "p"))
    assert first.place == second.place == folder.place == str(tmp_path / "p")
    # The link is not the root of the first: only its own paths are known to be the same.
    assert second.load().keys.tolist() == folder.load().keys.tolist() == ["c/a.png", "d/b.png"]
    assert first.load().stamps.tolist() == second.load().stamps.tolist()
    assert first.load().stamps.tolist() == folder.load().stamps.tolist()


def test_stamps_change_with_the_file(tmp_path):
    first, second = draw(tmp_path / "a.png", (1, 1, 1)), draw(tmp_path / "b.png", (2, 2, 2))
    path = write(tmp_path, "path,label\na.png,x\nb.png,y\n")
    before = Manifest(path).load().stamps
    assert Manifest(path).load().stamps.tolist() == before.tolist()
    os.utime(second, ns=(1, 1))
    after = Manifest(path).load().stamps
    assert (before == after).tolist() == [True, False]
    assert (
        before[0] == f"{first.stat().st_size}:{first.stat().st_mtime_ns}:{first.stat().st_ctime_ns}"
    )


def test_a_missing_picture_is_no_error_of_the_table(tmp_path):
    draw(tmp_path / "a.png", (1, 1, 1))
    source = Manifest(write(tmp_path, "path,label\na.png,x\ngone.png,y\nfolder,y\n"))
    (tmp_path / "folder").mkdir()
    assert (source.load().stamps == "missing").tolist() == [False, True, True]
    good, gone, folder = source.read([0, 1, 2])
    assert good.shape == (3, 2, 3)
    assert isinstance(gone, BadImageError)
    assert isinstance(folder, BadImageError)
    assert "2 not there" in source.summary()


def test_summary(tmp_path):
    text = "path,label,site,split\na.png,x,s,train\nb.png,y,s,train\nc.png,y,t,test\n"
    path = write(tmp_path, text)
    for name in "abc":
        draw(tmp_path / f"{name}.png", (0, 0, 0))
    assert Manifest(path).summary() == (
        f"3 pictures listed in {path}: 2 classes, 2 sites, train 2, test 1"
    )


# Labels


@pytest.mark.parametrize(
    ("labels", "given", "expected", "names"),
    [
        (["10", "2", "10"], None, [1, 0, 1], ["2", "10"]),
        (["0", "2", "1"], ["a", "b", "c"], [0, 2, 1], ["a", "b", "c"]),
        (["0", "2", "0"], ["a", "b", "c"], [0, 2, 0], ["a", "b", "c"]),
        (["0", "2", "1"], ["a", "b", "2"], [0, 2, 1], ["a", "b", "2"]),
        (["1", "0", "1"], ["1", "0"], [0, 1, 0], ["1", "0"]),
        (["b", "a", "b"], ["b", "a"], [0, 1, 0], ["b", "a"]),
        (["b", "a", "b"], {"b": "bird", "a": "ape"}, [0, 1, 0], ["bird", "ape"]),
        (["1", "0", "1"], {"1": "one", "0": "zero"}, [0, 1, 0], ["one", "zero"]),
        (["a;b", "a|b", "a"], None, [1, 2, 0], ["a", "a;b", "a|b"]),
        (["0.5", "1", "0.5"], None, [0, 1, 0], ["0.5", "1"]),
    ],
)
def test_labels(tmp_path, labels, given, expected, names):
    rows = "".join(f"{i}.png\t{label}\n" for i, label in enumerate(labels))
    source = Manifest(write(tmp_path, f"path\tlabel\n{rows}"), class_names=given)
    assert source.load().labels.tolist() == expected
    assert source.class_names == names


@pytest.mark.parametrize(
    ("label", "given", "expected"),
    [
        (
            "3",
            ["a", "b", "c"],
            "row 3, column 'label': the label must be between 0 and 2, a position in "
            "data.source.class_names (3 names), got 3",
        ),
        ("-1", ["a", "b"], "row 3, column 'label': the label must be between 0 and 1"),
        ("c", ["a", "b"], "data.source.class_names lists"),
        ("", None, "row 3, column 'label': empty, but every picture needs a label"),
        ("nan", None, "row 3, column 'label': 'nan', but every picture needs a label. Fill it in."),
        # The name at position 1, or position 2?
        ("2", ["0", "2", "c"], "row 3, column 'label': the label 2 is a position in data.source"),
        ("2", ["0", "2", "c"], "that of 'c', and one of the names in it, too. Write a dict there"),
        ("  ", None, "row 3, column 'label': empty"),
        ("0", None, "there is one class only"),
    ],
)
def test_labels_that_do_not_fit(tmp_path, label, given, expected):
    path = write(tmp_path, f"path,label\na.png,0\nb.png,{label}\n")
    assert expected in message(Manifest(path, class_names=given))


# What is wrong with a table


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("path,label\na.png,x\n,y\n", "list.csv row 3, column 'path': empty"),
        ("path,label\na.png,x\nb.png\n", "row 3 has 1 fields, the header has 2: ['b.png']"),
        ("path,label\na.png,x,y\n", "row 2 has 3 fields, the header has 2: ['a.png', 'x', 'y']"),
        ('path,label\n"a\n.png",x\nb.png\n', "row 3 has 1 fields"),
        ("path,label\n\n\nb.png\n", "row 4 has 1 fields"),
        ("path,label\na.png,x\nb.png,y\na.png,x\n", "row 4, column 'path': the picture 'a.png'"),
        ("path,label\na.png,x\n./a.png,y\n", "'./a.png' is listed twice, first as 'a.png' ("),
        ("path,label,split\na.png,x,trian\n", "row 2, column 'split': the split must be one of"),
        ("path,label,split\na.png,x,trian\n", "got 'trian'. Mend it"),
        ("path,label,split\na.png,x,trian\n", "Did you mean 'train'?"),
        ("path,label,split\na.png,x,\n", "row 2, column 'split': the split must be one of"),
        ("path,label,site\na.png,x,\nb.png,y,s\n", "row 2, column 'site': empty"),
        ("path,label,site\na.png,x,s\nb.png,y,NaN\n", "row 3, column 'site': 'NaN', but every"),
        ("path,label,site\na.png,x,s\nb.png,y,\n", "or set data.source.site_column to another"),
        ("sep=;\npath;label\na.png;\n", "row 3, column 'label': empty"),
        ("path,lable\na.png,x\n", "has no column 'label', only 'path', 'lable'. Set data.source."),
        ("path,lable\na.png,x\n", "label_column. Did you mean 'lable'?"),
        ("pth,label\na.png,x\n", "has no column 'path', only 'pth', 'label'. Set data.source."),
        ("path,label,path\na.png,x,b\n", "has two columns called 'path' (columns 1 and 3)"),
        ("", "is empty"),
        ("\ufeff", "is empty"),
        ("\n\n", "is empty"),
        ("path,label\n", "has a header but no rows"),
        ("path,label\n,\n\n", "has a header but no rows"),
        (b"path,label\na.png,x\nb.png,caf\xe9\n", "row 3, column 'label': this is not UTF-8"),
        (b"path,label\n\xff.png,x\n", "row 2, column 'path': this is not UTF-8"),
        (b"path,lab\xffel\na.png,x\n", "row 1, column 'header': this is not UTF-8"),
        (b"path,label\na.png,x\nb\0.png,y\n", "row 3, column 'path': there is a NUL byte"),
        ("path,label\na.png,x\nb.png,y\n".encode("utf-16"), "row 1, column 'header'"),
        ('path,label\n"a.png,x\nb.png,y\n', "row 2: a quote is opened and never closed"),
        ('path,label\na.png,x\n"b"c.png,y\n', "row 3: ',' expected after '\"'"),
        (b"PK\x03\x04 and so on", "is a zip archive or an Excel workbook, not text. Save it as"),
        (b"PAR1 and so on", "cannot be read"),
    ],
)
def test_tables_with_mistakes(tmp_path, text, expected):
    assert expected in message(Manifest(write(tmp_path, text)))


def test_a_mistake_in_a_later_row(tmp_path):
    rows = "".join(f"{i}.png,{i % 2}\n" for i in range(1000))
    path = write(tmp_path, f"path,label\n{rows}é.png,1\n1001.png,\n")
    assert f"{path} row 1,003, column 'label': empty" in message(Manifest(path))
    bad = write(tmp_path, f"path,label\n{rows}".encode() + b"\xe9.png,1\n")
    assert f"{bad} row 1,002, column 'path': this is not UTF-8" in message(Manifest(bad))


def test_a_picture_listed_in_two_ways(tmp_path):
    (tmp_path / "way").symlink_to(tmp_path)
    text = f"path,label\na.png,x\nb.png,y\n{tmp_path}/a.png,x\n"
    found = message(Manifest(write(tmp_path, text)))
    assert "row 4, column 'path'" in found
    assert f"first as 'a.png' ({tmp_path}/list.csv row 2)" in found
    text = f"path,label\na.png,x\nb.png,y\n{tmp_path}/way/a.png,x\n"
    path = write(tmp_path, text)
    assert "listed twice" in message(Manifest(path, root=str(tmp_path / "way")))


def test_files_that_are_none(tmp_path):
    assert "got the folder" in message(Manifest(str(tmp_path)))
    assert "which does not exist" in message(Manifest(str(tmp_path / "gone.csv")))
    fake = write(tmp_path, "path,label\n", "list.parquet")
    assert "is not a parquet file" in message(Manifest(fake))
    good = write(tmp_path, "path,label\na.png,x\nb.png,y\n")
    assert "data.source.root must be a folder" in message(Manifest(good, root=str(tmp_path / "g")))


@pytest.mark.parametrize("option", ["site_column", "split_column"])
def test_a_named_column_must_be_there(tmp_path, option):
    path = write(tmp_path, "path,label,hospital\na.png,x,s\nb.png,y,s\n")
    found = message(Manifest(path, **{option: "hopsital"}))
    assert (
        f"has no column 'hopsital', only 'path', 'label', 'hospital'. Set data.source.{option}."
        in (found)
    )
    assert "Did you mean 'hospital'?" in found


# Parquet


def parquet(folder, name="list.parquet", **columns):
    pq.write_table(pa.table(columns), folder / name)
    return str(folder / name)


def test_parquet(tmp_path):
    path = parquet(
        tmp_path,
        path=["a.png", "b.png", "c.png"],
        label=pa.array(["x", "y", "x"]).dictionary_encode(),
        site=pa.array([1.0, 2.0, 1.0]),
        split=["train", "val", "test"],
        age=pa.array([1, 2, 3], pa.int8()),
        weight=pa.array([1.5, 2, 3]),
        gap=pa.array([1, None, 3]),
        day=pa.array([0, 1, 2], pa.date32()),
        male=[True, False, True],
        boxes=[[1], [2], [3]],
    )
    source = Manifest(path)
    table = source.load()
    assert source.class_names == ["x", "y"]
    assert table.labels.tolist() == [0, 1, 0]
    assert table.site.tolist() == ["1", "2", "1"]
    assert table.split.tolist() == ["train", "val", "test"]
    assert {name: column.tolist() for name, column in table.columns.items()} == {
        "age": [1, 2, 3],
        "weight": [1.5, 2, 3],
        "gap": ["1", "", "3"],
        "day": ["1970-01-01", "1970-01-02", "1970-01-03"],
        "male": ["true", "false", "true"],
    }


def test_parquet_labels_that_are_whole(tmp_path):
    path = parquet(tmp_path, path=["a.png", "b.png"], label=pa.array([1.0, 0.0]))
    assert Manifest(path, class_names=["cat", "dog"]).load().labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (pa.array([["x"], ["y", "z"]]), "One label per picture: fedlora is for single-label"),
        (pa.array(["x", None]), "row 2, column 'label': empty"),
        (pa.array([1.0, float("nan")]), "row 2, column 'label': empty"),
        (pa.array([b"x", b"y"]), "Name a column of text or numbers"),
    ],
)
def test_parquet_with_mistakes(tmp_path, labels, expected):
    assert expected in message(Manifest(parquet(tmp_path, path=["a.png", "b.png"], label=labels)))


@pytest.mark.parametrize("name", ["label", "age"])
def test_parquet_with_two_columns_of_a_name(tmp_path, name):
    columns = [pa.array(["a.png", "b.png"]), pa.array(["x", "y"]), pa.array([1, 2])]
    path = tmp_path / "list.parquet"
    pq.write_table(
        pa.Table.from_arrays([*columns, columns[2]], ["path", "label", "age", name]), path
    )
    assert f"has two columns called '{name}' (columns " in message(Manifest(str(path)))


def test_parquet_with_the_pictures_in_it(tmp_path):
    path = parquet(tmp_path, path=[{"bytes": b"x", "path": "a"}] * 2, label=["x", "y"])
    assert "use HuggingFaceImages" in message(Manifest(path))


def test_parquet_without_rows(tmp_path):
    path = parquet(tmp_path, path=pa.array([], pa.string()), label=pa.array([], pa.string()))
    assert "has a header but no rows" in message(Manifest(path))


def test_many_rows_are_quick(tmp_path):
    import time

    rows = "".join(f"p/{i:06d}.png,class {i % 10},s{i % 7}\n" for i in range(70_000))
    source = Manifest(write(tmp_path, f"path,label,site\n{rows}"))
    start = time.perf_counter()
    assert len(source.load()) == 70_000
    # 0.6 s on an idle core.
    assert time.perf_counter() - start < 8


def test_paths_are_of_the_working_folder(tmp_path, monkeypatch):
    draw(tmp_path / "sub" / "a.png", (1, 2, 3))
    write(tmp_path / "sub", "path,label\na.png,x\nb.png,y\n")
    monkeypatch.chdir(tmp_path)
    source = Manifest("sub/list.csv")
    assert source.place == str(Path("sub").resolve())
    monkeypatch.chdir("sub")
    assert Manifest("list.csv").read([0])[0].shape == (3, 2, 3)
