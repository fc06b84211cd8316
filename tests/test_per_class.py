from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from fedlora import per_class
from fedlora.callbacks.progress import Progress
from fedlora.errors import FedloraError
from fedlora.modules.metrics import ClassScores

NAMES = ["a, b", "[red]tram", "käse"]
CLASSES = [
    ClassScores(4, 0.5, 0.75, 0.6, 0.875),
    ClassScores(0, None, None, None, None),
    ClassScores(2, 1.0, 0.25, 0.4, 1.0),
]


def printed(names: list[str], classes: list[ClassScores], mode: str = "plain") -> str:
    progress = Progress(mode)  # type: ignore[arg-type]
    text = io.StringIO()
    progress._console = Console(file=text, width=100, highlight=False)
    per_class.show(progress, names, classes, Path("somewhere/per_class.csv"))
    return text.getvalue()


def test_the_file_has_a_row_per_class_and_nothing_where_not_defined(tmp_path: Path) -> None:
    path = tmp_path / "new" / "per_class.csv"
    per_class.write(path, NAMES, CLASSES)
    assert path.read_text(encoding="utf-8").splitlines() == [
        "class,samples,precision,recall,f1,auroc",
        '"a, b",4,0.5,0.75,0.6,0.875',
        "[red]tram,0,,,,",
        "käse,2,1.0,0.25,0.4,1.0",
    ]
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FedloraError, match="cannot write"):
        per_class.write(tmp_path / "file" / "per_class.csv", NAMES, CLASSES)


def test_the_table_shows_the_lowest_recall_first() -> None:
    out = printed(NAMES, CLASSES)
    assert out.index("käse") < out.index("a, b") < out.index("[red]tram")
    assert "0.2500" in out
    assert "all 3 classes shown; the figures are in somewhere/per_class.csv" in out


def test_of_many_classes_the_worst_are_shown() -> None:
    names = [f"class{number:03}" for number in range(120)]
    classes = [ClassScores(1, 1.0, 1 - number / 200, 1.0, 1.0) for number in range(120)]
    out = printed(names, classes)
    shown = [number for number in range(120) if f"class{number:03}" in out]
    assert shown == list(range(90, 120))
    assert out.index("class119") < out.index("class118")
    assert "30 of 120 classes shown" in out


def test_nothing_is_printed_where_it_is_off() -> None:
    assert printed(NAMES, CLASSES, "off") == ""
