"""Ratios within a turn, and the targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from .sizes import SIZES, SPREAD, VIT_B32

Record = Mapping[str, Any]
KEPT = "model kept"  # Flower's best, but for noise
PLAIN = "1 process, "  # how fedlora's settings without lanes and further processes begin


@dataclass(frozen=True)
class Series:
    """One tool at one setting over the turns.

    Attributes:
        name: tool and setting.
        values: turn -> seconds (of a warm round, the median; or of a command) or bytes.
        fastest: the least of all, of single rounds where there are rounds.
    """

    name: str
    values: Mapping[int, float]
    fastest: float

    @property
    def middle(self) -> float:
        """The median over turns."""
        return median(self.values.values())


@dataclass(frozen=True)
class Target:
    """What must hold between the best of one tool and the best of another.

    Attributes:
        part: of the benchmark.
        text: what it is about.
        above: tool, and what the names of its settings begin with.
        below: the same of what it is divided by.
        most: the largest ratio that passes.
    """

    part: str
    text: str
    above: tuple[str, str]
    below: tuple[str, str]
    most: float


TARGETS = (
    Target(
        "vit",
        "a round, one process without lanes / bare loop",
        ("fedlora", PLAIN),
        ("bare", ""),
        1.02,
    ),
    Target("tiny", "a round, best / bare loop", ("fedlora", ""), ("bare", ""), 0.60),
    Target("tiny", "a round, best / pfl-research", ("fedlora", ""), ("pfl", ""), 0.75),
    Target("vit", "a round, best / pfl-research", ("fedlora", ""), ("pfl", ""), 0.98),
    Target("tiny", "a round, best / Flower", ("fedlora", ""), ("flower", KEPT), 0.60),
    Target("vit", "a round, best / Flower", ("fedlora", ""), ("flower", KEPT), 0.92),
    Target(
        "whole",
        "a command of 3 tiny rounds, best / Flower",
        ("fedlora", ""),
        ("flower", KEPT),
        0.50,
    ),
    # In one process, whose rounds keep all other targets at that size too.
    Target(
        "memory",
        "peak memory, one process / Flower",
        ("fedlora", "1 process"),
        ("flower", KEPT),
        0.55,
    ),
)
SPREAD_TARGET = 1.15  # of the largest number of clients over the smallest, fedlora


def counted(record: Record) -> list[float]:
    """The seconds of the rounds that count."""
    size = SIZES[record["size"]]
    return list(record["seconds"][size.warm_up : size.warm_up + size.counted])


def _values(record: Record) -> list[float]:
    if record["part"] == "memory":
        return [record["peak"]]
    return [record["whole"]] if record["part"] == "whole" else counted(record)


def series(records: Sequence[Record], part: str, size: str | None = None) -> list[Series]:
    """All of a part, in the order in which they were first run."""
    chosen = [r for r in records if r["part"] == part and size in (None, r["size"])]
    names = dict.fromkeys(f"{r['tool']}: {r['variant']}" for r in chosen)
    found = []
    for name in names:
        of_turn = {r["turn"]: _values(r) for r in chosen if f"{r['tool']}: {r['variant']}" == name}
        middles = {turn: median(values) for turn, values in of_turn.items()}
        found.append(Series(name, middles, min(min(values) for values in of_turn.values())))
    return found


def best(found: Sequence[Series], tool: str, begins: str = "") -> Series | None:
    """The setting of a tool that is best by its median; None where the tool was not run."""
    own = [each for each in found if each.name.startswith(f"{tool}: {begins}")]
    return min(own, key=lambda each: each.middle, default=None)


def ratio(above: Series, below: Series) -> dict[str, float] | None:
    """Within turns: median, least and most, and of the fastest; None without a common turn."""
    turns = sorted(set(above.values) & set(below.values))
    if not turns:
        return None
    each = [above.values[turn] / below.values[turn] for turn in turns]
    return {
        "median": median(each),
        "least": min(each),
        "most": max(each),
        "fastest": above.fastest / below.fastest,
        "turns": len(turns),
    }


def say_ratio(found: Mapping[str, float]) -> str:
    """As tables have it."""
    return (
        f"{found['median']:.3f} ({found['least']:.3f} to {found['most']:.3f}), "
        f"of the fastest {found['fastest']:.3f}"
    )


def show_part(records: Sequence[Record], part: str, size: str) -> None:
    """Every setting of a part, beside the best bare loop."""
    found = series(records, part, size)
    if not found:
        return
    first = best(found, "bare") or found[0]
    unit = "MB" if part == "memory" else "s"
    turns = max(len(each.values) for each in found)
    print(f"\n{part}, {size}: {turns} turn(s); ratios to {first.name}")
    for each in found:
        value = each.middle / (1e6 if part == "memory" else 1)
        against = ratio(each, first)
        print(f"  {each.name:<36} {value:9.2f} {unit}  {say_ratio(against) if against else ''}")


def judge(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Every target that there are figures for, printed with PASS or MISS."""
    found = [_judged(target, records) for target in TARGETS]
    found.append(_judged_spread(records))
    known = [each for each in found if each is not None]
    if known:
        print("\ntargets: ratio within a turn, median (least to most)")
    for each in known:
        print(
            f"  {'PASS' if each['passed'] else 'MISS'}  {each['part']:<7} {each['text']}: "
            f"{say_ratio(each['ratio'])}; at most {each['most']:.2f}\n"
            f"        {each['above']} / {each['below']}"
        )
    return known


def _judged(target: Target, records: Sequence[Record]) -> dict[str, Any] | None:
    found = series(records, target.part)
    pick = _as_fast(records) if target.part == "memory" else best
    above, below = pick(found, *target.above), pick(found, *target.below)
    between = ratio(above, below) if above and below else None
    if between is None or above is None or below is None:
        return None
    return {
        "part": target.part,
        "text": target.text,
        "above": above.name,
        "below": below.name,
        "most": target.most,
        "ratio": between,
        "passed": between["median"] <= target.most,
    }


def _as_fast(records: Sequence[Record]) -> Callable[..., Series | None]:
    """Picks the setting with the fastest rounds at that size, where they were timed, too."""
    timed = series(records, "vit", VIT_B32.name)

    def pick(found: Sequence[Series], tool: str, begins: str = "") -> Series | None:
        both = {each.name for each in found}
        fastest = best([each for each in timed if each.name in both], tool, begins)
        own = [each for each in found if fastest and each.name == fastest.name]
        return own[0] if own else best(found, tool, begins)

    return pick


def _judged_spread(records: Sequence[Record]) -> dict[str, Any] | None:
    """The largest number of clients over the smallest, each at fedlora's best setting."""
    few, *_, many = (series(records, "spread", size.name) for size in SPREAD)
    above, below = best(many, "fedlora"), best(few, "fedlora")
    between = ratio(above, below) if above and below else None
    if between is None or above is None or below is None:
        return None
    return {
        "part": "spread",
        "text": f"a round, {SPREAD[-1].clients} clients / {SPREAD[0].clients}, fedlora best",
        "above": above.name,
        "below": below.name,
        "most": SPREAD_TARGET,
        "ratio": between,
        "passed": between["median"] <= SPREAD_TARGET,
    }


def show_spread(records: Sequence[Record]) -> None:
    """What more clients cost each tool, its best setting at each number of them."""
    tools = dict.fromkeys(r["tool"] for r in records if r["part"] == "spread")
    few, *more = SPREAD
    for tool in tools:
        first = best(series(records, "spread", few.name), tool)
        for size in more:
            found = best(series(records, "spread", size.name), tool)
            between = ratio(found, first) if found and first else None
            if between:
                print(f"  {tool}: {size.clients} / {few.clients} clients {say_ratio(between)}")
