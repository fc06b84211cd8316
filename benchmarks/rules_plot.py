"""The figures of ``rules.py`` as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from rules_table import MB, SHARE, judged, reached, reference

if TYPE_CHECKING:
    from rules import Row

COLOURS = ("#1f5fa8", "#d1702a")  # of the skews, strongest first; told apart by all
LEAVES = {"svg.fonttype": "none", "svg.hashsalt": "rules", "font.size": 9.0}


def draw(found: Sequence[Row], path: Path) -> None:
    """Test accuracy and the bytes on the way, a line for each rule, a dot for each seed.

    Raises:
        SystemExit: where matplotlib is missing.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("--plot needs matplotlib: pip install 'fedlora[bench]'") from error
    equal = [row for row in found if row.ranks == "equal"]
    titles = list(dict.fromkeys(row.title for row in equal))
    with mpl.rc_context(LEAVES):
        figure = Figure(figsize=(9.5, 0.29 * len(titles) + 1.3), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        skews = list(dict.fromkeys(row.skew for row in equal))
        for number, skew in enumerate(skews):
            shift = 0.32 * (number - (len(skews) - 1) / 2)
            rows = [row for row in equal if row.skew == skew]
            accuracies(left, rows, titles, COLOURS[number], shift)
            bytes_(right, rows, found, titles, COLOURS[number], shift)
        left.set_yticks(range(len(titles)), titles)
        left.invert_yaxis()
        own = ", ".join(dict.fromkeys(row.title for row in equal if row.method.personal))
        left.set_xlabel("test accuracy, %" + f" ({own}: clients' own pictures)" * bool(own))
        right.set_xlabel(f"MB until {100 * SHARE:.0f} % of central; x: not reached")
        for axes in (left, right):
            axes.grid(axis="x", alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        left.legend(loc="lower left", frameon=False)
        figure.savefig(path, metadata={"Date": None})


def accuracies(
    axes: Any, rows: Sequence[Row], titles: Sequence[str], colour: str, shift: float
) -> None:
    """A dot for each seed, and a mark at the mean."""
    for row in rows:
        height, values = titles.index(row.title) + shift, [100 * v for v in judged(row)]
        axes.plot(values, [height] * len(values), "o", color=colour, markersize=3.5, alpha=0.6)
        said = f"Dirichlet {row.skew:g}" if row is rows[0] else None
        axes.plot([mean(values)], [height], "|", color=colour, markersize=9, mew=2, label=said)


def bytes_(
    axes: Any,
    rows: Sequence[Row],
    found: Sequence[Row],
    titles: Sequence[str],
    colour: str,
    shift: float,
) -> None:
    """A dot for each seed that got there, a cross at the edge for each that did not."""
    for row in rows:
        central = reference(row, found, "central")
        if row.method.rule is None or central is None:
            continue
        height = titles.index(row.title) + shift
        for each in reached(row, central):
            if each:
                axes.plot([each[1] / MB], [height], "o", color=colour, markersize=3.5, alpha=0.6)
            else:
                edge = {"transform": axes.get_yaxis_transform(), "clip_on": False}
                axes.plot([1.0], [height], "x", color=colour, markersize=4, **edge)
    axes.set_xscale("symlog", linthresh=1, linscale=0.3)  # nothing at all travels with local_only
    ticks = (0, 1, 2, 5, 10, 20, 50, 100)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlim(-0.1, 150)
