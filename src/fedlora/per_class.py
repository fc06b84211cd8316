"""The figures of each class of the test split: a file, and a table of the worst."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.files import clear_os_errors, write_csv

if TYPE_CHECKING:
    from fedlora.callbacks.progress import Progress
    from fedlora.modules.metrics import ClassScores

# Of the command, beside a run's own: it may be of another checkpoint, or of other data.
OF_TEST = "test_per_class.csv"
SHOWN = 30


def write(path: Path, names: Sequence[str], classes: Sequence[ClassScores]) -> None:
    """Write ``class,samples,precision,recall,f1,auroc`` of each class; empty where not defined.

    Raises:
        FedloraError: when it cannot be written.
    """
    with clear_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    rows = ((name, *astuple(scores)) for name, scores in zip(names, classes, strict=True))
    write_csv(path, ("class", *_columns(classes)), rows)


def show(
    progress: Progress, names: Sequence[str], classes: Sequence[ClassScores], path: Path
) -> None:
    """Print the classes of the lowest recall first, at most ``SHOWN``, and where all are.

    Args:
        progress: prints, unless it is off.
        names: one per class.
        classes: the figures.
        path: where they were written.
    """
    shown = min(len(classes), SHOWN)
    if progress.mode != "off":
        from rich.table import Table
        from rich.text import Text

        table = Table(title="classes, lowest recall first", title_justify="left")
        table.add_column("class", overflow="fold")
        for title in _columns(classes):
            table.add_column(title, justify="right")
        for name, scores in sorted(zip(names, classes, strict=True), key=_recall)[:shown]:
            table.add_row(Text(name), *_cells(scores))  # a name is no markup
        progress.console.print(table)
    what = "all" if shown == len(classes) else f"{shown} of"
    progress.say(f"{what} {len(classes)} classes shown; the figures are in {path}")


def _columns(classes: Sequence[ClassScores]) -> list[str]:
    return [field.name for field in fields(classes[0])]


def _recall(row: tuple[str, ClassScores]) -> float:
    return math.inf if row[1].recall is None else row[1].recall


def _cells(scores: ClassScores) -> Iterator[str]:
    for value in astuple(scores):
        yield "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
