# ruff: noqa: E501  (a mistake is a row)
"""Whatever is wrong with a user's data is one line that says what to do, and nothing is lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedlora.main import main
from tests.drawn_pictures import draw, draw_sites

FIT = ["fit", "--config", "clip_lora.yaml", "--trainer.max_rounds=1"]
FOLDER = ["--data.source=ImageFolder", "--data.source.root=pictures"]
MANIFEST = ["--data.source=Manifest", "--data.source.path=pictures/list.csv"]


def sites(names: str = "north south", classes: str = "cat dog") -> Path:
    return draw_sites(Path("pictures"), names.split(), classes.split())


def nothing() -> None:
    pass


def empty() -> None:
    Path("pictures").mkdir()


def texts_only() -> None:
    Path("pictures/cat").mkdir(parents=True)
    Path("pictures/cat/notes.txt").write_text("no picture")


def one_class() -> None:
    draw(Path("pictures/cat/0.png"))
    draw(Path("pictures/cat/1.png"))


def class_only_in_test() -> None:
    for name in ("train/cat", "train/dog", "test/cat", "test/dog", "test/owl"):
        for number in range(3):
            draw(Path("pictures", name, f"{number}.png"))


def broken() -> None:
    file = sites() / "north" / "cat" / "3.png"
    file.write_bytes(file.read_bytes()[:90])


def mixed_depths() -> None:
    draw(sites() / "lost.png")


def patients() -> None:
    for name in ("cat/p1", "cat/p2", "dog/p3", "dog/p4"):
        draw(Path("pictures", name, "0.png"))


def listed(*rows: str, header: str = "path,label,site") -> Callable[[], None]:
    def write() -> None:
        sites()
        Path("pictures/list.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")

    return write


GOOD = tuple(
    f"{site}/{name}/{number}.png,{name},{site}"
    for site in ("north", "south")
    for name in ("cat", "dog")
    for number in range(6)
)


def not_text() -> None:
    listed(*GOOD)()
    Path("pictures/list.csv").write_bytes(b"path,label\nnorth/cat/0.png,\xff\xfe\n")


def no_room() -> None:
    sites()


def cache_in_the_way() -> None:
    sites()
    Path("cache").write_text("a file")


# fmt: off
WRONG: list[tuple[str, Callable[[], object], list[str], int, list[str]]] = [
    ("missing folder", nothing, FOLDER, 1, ["data.source.root", "pictures", "does not exist"]),
    ("empty folder", empty, FOLDER, 1, ["no pictures"]),
    ("no pictures", texts_only, FOLDER, 1, ["no pictures", "txt"]),
    ("one class", one_class, FOLDER, 1, ["one class only, 'cat'"]),
    ("one class by site", lambda: sites(classes="cat"), FOLDER, 1, ["one class only, 'cat'"]),
    ("one site", lambda: sites("north"), FOLDER, 1, ["one site, 'north'"]),
    ("class only in test", class_only_in_test, FOLDER, 1, ["class 'owl' is in the test split only (3 pictures)"]),
    ("unequal depths", mixed_depths, FOLDER, 1, ["lost.png", "data.source.layout"]),
    ("patients taken for sites", patients, FOLDER, 1, ["cat/p1/0.png", "Set data.source.layout to class"]),
    ("a picture that cannot be read", broken, FOLDER, 1, ["north/cat/3.png", "data.on_bad_image=skip"]),
    ("unknown class name", sites, [*FOLDER, "--data.source.class_names=[cat,dig]"], 1, ["'dig'", "Did you mean 'dog'?"]),
    ("no manifest", sites, MANIFEST, 1, ["list.csv"]),
    ("manifest without a label", listed(*GOOD, "north/cat/9.png,,north"), MANIFEST, 1, ["row 26", "label"]),
    ("manifest that is no text", not_text, MANIFEST, 1, ["list.csv", "UTF-8"]),
    ("manifest with a file twice", listed(*GOOD, GOOD[0]), MANIFEST, 1, ["row 2", "row 26", "north/cat/0.png"]),
    ("manifest with an unknown split", listed("north/cat/0.png,cat,trian", header="path,label,split"), MANIFEST, 1, ["row 2", "split", "trian"]),
    ("missing column", listed(*GOOD, header="path,lable,site"), MANIFEST, 1, ["label", "lable"]),
    ("labels out of range", listed("north/cat/0.png,0", "north/cat/1.png,2", header="path,label"), [*MANIFEST, "--data.source.class_names=[cat,dog]"], 1, ["row 3", "label", "2"]),
    ("a listed file that is not there", listed(*GOOD, "north/cat/9.png,cat,north"), MANIFEST, 1, ["north/cat/9.png", "data.on_bad_image=skip"]),
    ("more clients than samples", sites, [*FOLDER, "--data.partitioner=IidPartitioner", "--data.num_clients=100"], 1, ["num_clients must be at most", "got 100"]),
    ("ten thousand clients", nothing, ["--data.num_clients=10000"], 1, ["num_clients must be at most 1294", "got 10000"]),
    ("a number that is not that of the sites", sites, [*FOLDER, "--data.num_clients=3"], 1, ["num_clients is 3", "2 sites"]),
    ("a partitioner that gives up", nothing, ["--data.partitioner=DirichletPartitioner", "--data.partitioner.partition_by=label", "--data.partitioner.alpha=0.001", "--data.partitioner.self_balancing=false", "--data.num_clients=40"], 1, ["works"]),
    ("a column that is not there", sites, [*FOLDER, "--data.partitioner=NaturalIdPartitioner", "--data.partitioner.partition_by=scaner"], 1, ["partition_by", "label, site", "scaner"]),
    ("unknown site held out", sites, [*FOLDER, "--data.hold_out=nord"], 1, ["data.hold_out names 'nord'", "Did you mean 'north'?"]),
    ("all sites held out", sites, [*FOLDER, "--data.hold_out=[north,south]"], 1, ["data.hold_out names all pictures"]),
    ("hub not reachable", nothing, ["--data.source=HuggingFaceImages", "--data.source.name=uoft-cs/cifar10"], 1, ["uoft-cs/cifar10", "data.source.name"]),
    ("no such local data set", nothing, ["--data.source=HuggingFaceImages", "--data.source.name=./cifar"], 1, ["cifar, which does not exist"]),
    ("no idx files", empty, ["--data.source=FashionMNIST", "--data.source.root=pictures"], 1, ["train-images-idx3-ubyte"]),
    ("no room for the cache", no_room, FOLDER, 1, ["data.cache_dir", "data.cache_gb"]),
    ("a file in the place of the cache", cache_in_the_way, [*FOLDER, "--data.cache_dir=cache"], 1, ["cache"]),
    ("no root", nothing, ["--data.source=ImageFolder"], 2, ["root"]),
    ("a path in the place of a source", nothing, ["--data.source=pictures"], 2, ["there is no class pictures", "ImageFolder"]),
    ("a setting of another source", sites, ["--data.source=ImageFolder", "--data.source.path=x"], 2, ["ImageFolder has no setting 'path', it has root"]),
    ("a setting before the source", sites, ["--data.source.root=pictures", "--data.source=ImageFolder"], 2, ["Digits has no setting 'root'", "--data.source=CLASS"]),
    ("a setting beside init_args", nothing, ["--data.source={class_path: fedlora.data.ImageFolder, root: x}"], 2, ["init_args"]),
    ("partitions and not clients", nothing, ["--data.partitioner=IidPartitioner", "--data.partitioner.num_partitions=3"], 2, ["Set --data.num_clients instead"]),
    ("no picture that can be read", listed("north/cat/77.png,cat", "north/dog/77.png,dog", header="path,label"), [*MANIFEST, "--data.on_bad_image=skip"], 1, ["none of the 2 pictures can be read", "no such file"]),
    ("a column with gaps", listed(*[f"{row},{'ab'[i % 2] * (i > 0)}" for i, row in enumerate(GOOD)], header="path,label,site,scanner"), [*MANIFEST, "--data.partitioner=NaturalIdPartitioner", "--data.partitioner.partition_by=scanner"], 1, ["column scanner is empty"]),
    ("unknown layout", sites, [*FOLDER, "--data.source.layout=klass"], 2, ["layout"]),
    ("unknown source", nothing, ["--data.source=ImageFolders"], 2, ["Did you mean ImageFolder?"]),
    ("unknown setting", sites, [*FOLDER, "--data.source.rot=x"], 2, ["Did you mean"]),
    ("unknown metric", sites, [*FOLDER, "--model.metrics=[macro_f2]"], 2, ["macro_f1"]),
    ("weights for other classes", sites, [*FOLDER, "--model.class_weights=[1,2,3]"], 1, ["class_weights", "2"]),
]
# fmt: on


@pytest.mark.parametrize(
    ("make", "args", "code", "said"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG]
)
def test_one_line_and_nothing_left(
    make: Callable[[], object],
    args: list[str],
    code: int,
    said: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    make()
    if make is no_room:
        usage = SimpleNamespace(total=10**9, used=10**9, free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    if not any(arg.startswith("--data.cache_dir") for arg in args):
        args = [*args, "--data.cache_dir=kept"]
    before = sorted(tmp_path.rglob("*"))
    assert main([*FIT, *args]) == code
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1, err
    for words in said:
        assert words in err
    assert "Traceback" not in err
    # What was there is there; what is new is the cache at most, nothing half-written in it.
    new = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
    assert set(before) <= set(tmp_path.rglob("*"))
    assert not [path for path in new if path.relative_to(tmp_path).parts[0] != "kept"]
    assert not [path for path in new if ".tmp" in path.name]
