from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedlora.data import FederatedDataModule
from fedlora.main import main
from fedlora.tools.partition import holdings
from tests.drawn_pictures import draw_sites

FOLDER = ["--data.source=ImageFolder", "--data.source.root=pictures"]


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def said(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["partition", *args]) == 0
    return capsys.readouterr().out


def test_what_it_says_is_what_a_run_does(capsys: pytest.CaptureFixture[str]) -> None:
    held = json.loads(said(["--config", "clip_lora.yaml", "--json"], capsys))
    data = FederatedDataModule()
    data.prepare_data()
    table, division = data.divide()
    assert held["classes"] == data.class_names
    assert [client["train"] for client in held["clients"]] == [len(r) for r in division.train]
    for client, rows in zip(held["clients"], division.train, strict=True):
        assert client["counts"] == np.bincount(table.labels[rows], minlength=10).tolist()
    assert sum(held["test"]) == 359
    assert 0.3 < held["skew"] < 0.8


def test_a_table_of_sites(capsys: pytest.CaptureFixture[str]) -> None:
    draw_sites(Path("pictures"), ("north", "south [x]"), count=10)
    out = said(["--config", "clip_lora.yaml", *FOLDER], capsys)
    # 20 pictures a site: 4 to test, 2 of the other 16 (rounded) and 1 or 2 of the rest to validate.
    rows = [line.split() for line in out.splitlines() if "north" in line or "south" in line]
    assert [row[1] for row in rows] == ["north", "south"]
    assert "south [x]" in out
    assert "cat" in out.splitlines()[0]
    assert "8 to test on" in out
    assert "Label skew 0.0" in out


@pytest.mark.parametrize(
    ("args", "cells", "words"),
    [
        # Of 50 pictures 5 to validate at the server; 9 of 45 to test, 4 of 36 to validate.
        (["--data.hold_out=west", "--data.client_test_fraction=0.2"], ["32", "4", "9"], "18 of"),
        # Of 50 pictures 10 to test and 4 of 40 to validate at the server, which is what a client
        # tests on, too; 7 of 36 to test, 3 of 29 to validate.
        (["--data.client_test_fraction=0.2"], ["26", "3", "17"], "51 of their own to test on; "),
        ([], ["32", "4", "10"], "30 of their own to test on; the server has 30 of these, too"),
    ],
)
def test_what_clients_test_on_is_a_column(
    args: list[str], cells: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_sites(Path("pictures"), ("north", "south", "west"), count=25)
    lines = said([*FOLDER, *args], capsys).splitlines()
    assert lines[0].split()[:5] == ["client", "name", "train", "val", "test"]
    assert lines[2].split()[1:5] == ["north", *cells]
    assert words in "\n".join(lines)
    held = json.loads(said([*FOLDER, *args, "--json"], capsys))
    assert [client["test"] for client in held["clients"]] == [int(cells[2])] * len(held["clients"])
    assert held["shared_test"] == (0 if "--data.hold_out=west" in args else 30)


def test_no_column_where_no_client_tests(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(["--data.num_clients=3"], capsys)
    assert out.splitlines()[0].split()[:4] == ["client", "train", "val", "zero"]
    assert "of their own to test on" not in out


def test_skew_by_hand() -> None:
    class Apart(FederatedDataModule):
        class_names = ("a", "b")  # type: ignore[assignment]

        def prepare_data(self) -> None:
            pass

        def divide(self):  # type: ignore[no-untyped-def]
            from types import SimpleNamespace

            from fedlora.data.division import Division

            labels = np.array([0, 0, 1, 1])
            one, two, none = np.array([0, 1]), np.array([2, 3]), np.array([], dtype=np.int64)
            division = Division(
                train=(one, two),
                client_val=(none, none),
                client_test=(none, none),
                names=("", ""),
                val=none,
                test=none,
            )
            return SimpleNamespace(labels=labels), division

    # Each client has one of two equally frequent classes: half of its mass is where it is not.
    assert holdings(Apart())["skew"] == 0.5


def test_many_classes_and_clients(capsys: pytest.CaptureFixture[str]) -> None:
    draw_sites(Path("pictures"), [f"site{i:03d}" for i in range(65)], ["a", "b"], count=2)
    out = said(["--config", "clip_lora.yaml", *FOLDER, "--plot=map.png"], capsys)
    assert "site059" in out
    assert "site060" not in out
    assert "… and 5 more" in out
    assert Image.open("map.png").width > 100
    draw_sites(Path("more"), classes=[f"kind{i:02d}" for i in range(30)], count=3)
    out = said(["--data.source=ImageFolder", "--data.source.root=more", "--plot=m.svg"], capsys)
    assert "most of" in out
    assert Path("m.svg").read_text().startswith("<?xml")


def test_bars(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(["--config", "clip_lora.yaml", "--plot", "who.png"], capsys)
    assert "The picture is in who.png" in out
    image = np.asarray(Image.open("who.png").convert("RGB"))
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 10
    assert [path.name for path in Path.cwd().iterdir()] == ["who.png"]


def test_bad_pictures_are_left_out_where_that_is_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    draw_sites(Path("pictures"))
    Path("pictures/north/cat/0.png").write_text("no picture")
    args = ["--config", "clip_lora.yaml", *FOLDER, "--data.cache_dir=kept", "--json"]
    assert sum(sum(c["counts"]) + c["val"] for c in json.loads(said(args, capsys))["clients"]) + 8
    whole = json.loads(said(args, capsys))
    held = json.loads(said([*args, "--data.on_bad_image=skip"], capsys))

    def total(parts: dict) -> int:  # type: ignore[type-arg]
        return sum(c["train"] + c["val"] for c in parts["clients"]) + sum(
            parts["val"] + parts["test"]
        )

    assert (total(whole), total(held)) == (24, 23)


def test_other_commands_settings_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(
        [
            "-c",
            "clip_lora.yaml",
            "--trainer.max_rounds=3",
            "--model.lora.r=2",
            "--data.num_clients=4",
        ],
        capsys,
    )
    assert "with 4 clients" in out


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--plot=who.gif"], 1, "--plot must be a file that ends in .png, .pdf, .svg, got who.gif"),
        (["--plot=no/who.png"], 1, "there is no folder no"),
        (["--data.num_clents=3"], 2, "Did you mean data.num_clients?"),
        (["--data.num_clients=10000"], 1, "num_clients must be at most 1294"),
        (["--data.source=ImageFolder", "--data.source.root=nowhere"], 1, "does not exist"),
    ],
)
def test_a_mistake_is_one_line(
    args: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["partition", "--config", "clip_lora.yaml", *args]) == code
    err = capsys.readouterr().err
    assert words in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("given", ["1", "[1,south]"])
def test_a_held_out_site_may_be_called_a_number(
    given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_sites(Path("pictures"), ("1", "south", "2", "3"), count=10)
    Path("held.yaml").write_text(f"data: {{hold_out: {given}}}", encoding="utf-8")
    typed = said([*FOLDER, f"--data.hold_out={given}", "--json"], capsys)
    assert said([*FOLDER, "--config=held.yaml", "--json"], capsys) == typed
    left = [client["name"] for client in json.loads(typed)["clients"]]
    assert left == (["2", "3", "south"] if given == "1" else ["2", "3"])


@pytest.mark.parametrize("tool", ["partition", "info"])
def test_quiet_is_taken_as_elsewhere(tool: str) -> None:
    assert main([tool, "--quiet", "--json"]) == 0
