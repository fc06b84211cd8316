"""What ``rules.py`` found, as tables, and what must hold whatever the figures are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean, median, stdev
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rules import Row
    from rules_run import Figures

SHARE = 0.9  # of what central training reaches
EXACT = 1e-5  # agg/error of a rule that promises none, float32
SAME = 1e-4  # between accuracies: less than a picture
COLUMNS = (
    "rule",
    "lr",
    "test, one model",
    "minus FedAvg",
    "own pictures, mean client",
    "worst client",
    f"MB to {100 * SHARE:.0f} % of central",
    "MB up / down",
    "agg/error",
    "server ms",
)
MB = 1e6


def percent(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    scaled = [100 * value for value in values]
    return f"{mean(scaled):.1f}" + (f" ± {stdev(scaled):.1f}" if len(scaled) > 1 else "")


def judged(row: Row) -> list[float]:
    """The test figure that a method is for: of one model, or of the clients' own."""
    return [each["own_test" if row.method.personal else "test"] for each in row.found]


def begins_there(row: Row, start: Row) -> bool:
    """Whether it is as good as another before its first round, seed by seed."""
    return all(
        abs(mine["rounds"][0]["val"] - theirs["val"]) < SAME
        for mine, theirs in zip(row.found, start.found, strict=True)
        if mine["rounds"]
    )


def points(row: Row, other: Row) -> list[float]:
    """How much better it is than another, seed by seed, on the figure that it is for."""
    name = "own_test" if row.method.personal else "test"
    pairs = zip(row.found, other.found, strict=True)
    return [100 * (mine[name] - theirs[name]) for mine, theirs in pairs]


def reached(row: Row, central: Row) -> list[tuple[int, float] | None]:
    """Round and bytes after which it had so much of what central training reaches, or None.

    Both on the same validation pictures and with the same seed: the server's, or where each client
    has a model of its own the clients'. Bytes: of all clients, up and down, all rounds until then.
    """
    return [
        first_reach(mine, SHARE * theirs[row.method.figure], row.method.figure)
        for mine, theirs in zip(row.found, central.found, strict=True)
    ]


def first_reach(figures: Figures, wanted: float, figure: str) -> tuple[int, float] | None:
    """The first round that has what is wanted, and the bytes that it took."""
    spent = 0.0
    for number, row in enumerate(figures.get("rounds", ())):
        spent += (row["up"] or 0.0) + (row["down"] or 0.0)
        if number and row[figure] is not None and row[figure] >= wanted:
            return number, spent
    return None


def errors(row: Row) -> list[float]:
    """``agg/error`` of every round of every seed."""
    every = (each["error"] for figures in row.found for each in figures.get("rounds", ()))
    return [error for error in every if error is not None]


def tables(found: Sequence[Row]) -> str:
    """A table for each division of the pictures."""
    said = []
    for skew, ranks in dict.fromkeys((row.skew, row.ranks) for row in found):
        title = "ranks 2, 4 and 8" if ranks == "mixed" else "rank 8 on all clients"
        said += ["", f"Dirichlet {skew:g}, {title}:", ""]
        said += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        chosen = [row for row in found if (row.skew, row.ranks) == (skew, ranks)]
        said += [f"| {' | '.join(cells(row, found))} |" for row in chosen]
    return "\n".join(said)


def reference(row: Row, found: Sequence[Row], name: str) -> Row | None:
    """The row of another method with the same skew and equal ranks."""
    there = (r for r in found if (r.skew, r.ranks, r.title) == (row.skew, "equal", name))
    return next(there, None)


def cells(row: Row, found: Sequence[Row]) -> Iterator[str]:
    """What a line of a table says."""
    central, average = (reference(row, found, name) for name in ("central", "fedavg"))
    yield f"`{row.title}`" if row.method.rule else row.title
    yield "" if row.rate is None else f"{row.rate:g}"
    one = percent([each["test"] for each in row.found])
    yield f"({one})" if row.method.personal else one
    yield difference(row, average) if average and row.method.rule and row is not average else ""
    yield percent([each["own_test"] for each in row.found])
    yield percent([each["own_worst"] for each in row.found])
    if row.method.rule is None or central is None:
        yield from ("", "", "", "")
        return
    yield traffic(reached(row, central))
    sums = [
        [sum(r[way] or 0 for r in f["rounds"]) / MB for way in ("up", "down")] for f in row.found
    ]
    yield " / ".join(f"{mean(each):.1f}" for each in zip(*sums, strict=True))
    found_errors = errors(row)
    yield error_of(found_errors) if found_errors else ""
    seconds = [second for figures in row.found for second in figures["server_s"]]
    yield f"{1e3 * median(seconds):.1f}" if seconds else ""


def difference(row: Row, other: Row) -> str:
    """Points: mean, and least to most over seeds."""
    found = points(row, other)
    between = f" ({min(found):+.1f} to {max(found):+.1f})" if len(found) > 1 else ""
    return f"{mean(found):+.1f}{between}"


def traffic(found: Sequence[tuple[int, float] | None]) -> str:
    """Mean bytes and round of the seeds that got there, and how many did."""
    there = [each for each in found if each]
    if not there:
        return "not reached"
    few = "" if len(there) == len(found) else f", {len(there)} of {len(found)} seeds"
    rounds = mean(number for number, _ in there)
    return f"{mean(spent for _, spent in there) / MB:.1f} (round {rounds:.1f}{few})"


def error_of(found: Sequence[float]) -> str:
    """Mean over rounds and seeds; 0 where there is none but rounding."""
    return "0" if max(found) < EXACT else f"{mean(found):.3f}"


def checks(found: Sequence[Row]) -> bool:
    """Print what must hold; whether something does not."""
    failed = False
    for row in found:
        if row.method.rule is None:
            continue
        where = f"{row.title}, Dirichlet {row.skew:g}, {row.ranks} ranks"
        largest = max(errors(row), default=0.0)
        if row.method.rule.exact:
            failed |= largest >= EXACT
            print(f"{'FAIL' if largest >= EXACT else 'ok'}: {where}: agg/error {largest:.1e}")
        start = reference(row, found, "zero-shot")
        if start and not begins_there(row, start):
            failed = True
            print(f"FAIL: {where}: it does not begin where the untrained model is")
    return failed
