"""What benchmarks/rules.py makes of its runs; the runs themselves are too long for here."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from rules_table import checks, error_of, first_reach, points, reached, tables, traffic

MB = 1_000_000


def figures(vals, error=0.1, test=0.5):
    rounds = [
        {"val": val, "own_val": val / 2, "up": MB * bool(i), "down": MB * bool(i), "error": error}
        for i, val in enumerate(vals)
    ]
    rounds[0] |= {"up": None, "down": None, "error": None}
    kept = {"rounds": rounds, "server_s": [0.002] * (len(vals) - 1), "val": vals[-1]}
    return kept | {"own_val": vals[-1] / 2, "test": test, "own_test": test, "own_worst": test}


def row(title, found, rule=None, personal=False):
    method = SimpleNamespace(
        name=title, rule=rule, personal=personal, figure="own_val" if personal else "val"
    )
    return SimpleNamespace(
        skew=0.5, ranks="equal", title=title, method=method, rate=1e-3, found=found
    )


EXACT, LOSSY = SimpleNamespace(exact=True), SimpleNamespace(exact=False)


def test_bytes_until_the_first_round_that_is_good_enough():
    found = figures([0.95, 0.5, 0.91, 0.92])
    # Before the first round nothing was learned, however good the model is.
    assert first_reach(found, 0.9, "val") == (2, 4 * MB)
    assert first_reach(found, 0.93, "val") is None
    assert first_reach({}, 0.1, "val") is None


def test_central_is_the_measure_on_the_same_pictures():
    central = row("central", [figures([0.0, 1.0]), figures([0.0, 0.5])])
    rule = row("fedavg", [figures([0.0, 0.8, 0.9]), figures([0.0, 0.4, 0.46])], LOSSY)
    assert reached(rule, central) == [(2, 4 * MB), (2, 4 * MB)]
    own = row("fedsa", [figures([0.0, 0.9]), figures([0.0, 0.1])], LOSSY, personal=True)
    assert reached(own, central) == [(1, 2 * MB), None]


def test_what_is_said_of_bytes_and_errors():
    assert traffic([None, None]) == "not reached"
    assert traffic([(2, 4 * MB), None]) == "4.0 (round 2.0, 1 of 2 seeds)"
    assert traffic([(2, 4 * MB), (3, 6 * MB)]) == "5.0 (round 2.5)"
    assert error_of([1e-8, 2e-7]) == "0"
    assert error_of([0.1, 0.2]) == "0.150"


def test_differences_are_seed_by_seed():
    better = row("ffa", [figures([0.1, 0.2], test=0.6), figures([0.1, 0.2], test=0.9)], EXACT)
    average = row("fedavg", [figures([0.1, 0.2], test=0.5), figures([0.1, 0.2], test=0.7)], LOSSY)
    assert points(better, average) == pytest.approx([10, 20])
    said = tables([row("central", average.found), average, better])
    assert "| `ffa` | 0.001 | 75.0 ± 21.2 | +15.0 (+10.0 to +20.0) |" in said


@pytest.mark.parametrize(
    ("rule", "error", "start", "failed"),
    [
        (EXACT, 1e-7, 0.1, False),
        (EXACT, 1e-3, 0.1, True),
        (LOSSY, 1e-3, 0.1, False),
        (LOSSY, 1e-3, 0.2, True),
    ],
)
def test_checks(rule, error, start, failed):
    untrained = row("zero-shot", [figures([0.1])])
    assert checks([untrained, row("ffa", [figures([start, 0.5], error)], rule)]) is failed
