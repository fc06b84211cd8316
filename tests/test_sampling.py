from __future__ import annotations

import hashlib
import itertools
import math
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora import sampling
from fedlora.errors import FedloraError
from fedlora.sampling import Plan, Sampling, choose, derive_seed, derive_seeds, plan
from fedlora.state import Client, Round

CLIENTS = [Client(number, 10 + number) for number in range(10)]
keys = st.lists(st.one_of(st.integers(), st.text(max_size=5)), min_size=1, max_size=4)


def ids(clients):
    return [client.id for client in clients]


def test_a_seed_is_the_head_of_the_sha256_of_its_keys():
    head = hashlib.sha256(b"7\x1f'batches'\x1f3\x1f0").hexdigest()[:16]
    assert derive_seed(7, "batches", 3, 0) == int(head, 16) // 2


def test_a_seed_is_the_same_in_another_process():
    program = (
        "from fedlora.sampling import *; from fedlora.state import *\n"
        "print(derive_seed(3, 'choose', 'é', -1))\n"
        "print([c.id for c in choose([Client(k, 1) for k in range(10)], Round(4, 9, 10, 4))])"
    )
    expected = f"{derive_seed(3, 'choose', 'é', -1)}\n{ids(choose(CLIENTS, Round(4, 9, 10, 4)))}\n"
    answer = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout == expected


@given(keys=keys, other=keys)
def test_other_keys_give_another_seed(keys, other):
    assert 0 <= derive_seed(*keys) < 2**63
    assert (derive_seed(*keys) == derive_seed(*other)) == (keys == other)


@pytest.mark.parametrize(
    ("one", "other"),
    [(("ab", "c"), ("a", "bc")), ((1,), ("1",)), ((1, 2), (12,)), ((1, 2), (2, 1)), ((), ("",))],
)
def test_keys_that_look_alike_are_kept_apart(one, other):
    assert derive_seed(*one) != derive_seed(*other)


def test_generators_take_a_seed():
    seed = derive_seed(0, "x")
    torch.Generator().manual_seed(seed)
    np.random.default_rng(seed)
    random.Random(seed)


@pytest.mark.parametrize("cohort", range(1, 13))
def test_the_right_number_of_distinct_clients_in_their_order(cohort):
    chosen = ids(choose(CLIENTS, Round(2, 0, 10, cohort)))
    assert len(chosen) == min(cohort, 10)
    assert chosen == sorted(set(chosen))


def test_everyone_plays_where_the_cohort_is_all():
    assert choose(CLIENTS, Round(0, 0, 10, 10)) == CLIENTS


def test_the_choice_is_pinned():
    # A run that goes on must choose whom it would have chosen.
    assert ids(choose(CLIENTS, Round(4, 9, 10, 4))) == [0, 6, 7, 9]
    assert ids(choose(CLIENTS, Round(0, 0, 10, 3))) == [2, 4, 9]


def test_choosing_is_a_pure_function():
    state = (random.getstate(), torch.get_rng_state())
    before = list(CLIENTS)
    first = choose(CLIENTS, Round(3, 1, 10, 4))
    choose(CLIENTS, Round(9, 8, 10, 2))
    assert choose(CLIENTS, Round(3, 1, 10, 4)) == first
    assert before == CLIENTS
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])


@given(order=st.permutations(CLIENTS), idx=st.integers(0, 1000))
def test_the_order_of_the_list_does_not_matter(order, idx):
    rnd = Round(idx, 0, 10, 4)
    chosen = choose(order, rnd)
    assert sorted(ids(chosen)) == ids(choose(CLIENTS, rnd))
    assert chosen == [client for client in order if client in chosen]


def test_a_client_is_chosen_by_its_id_alone():
    rich = [Client(client.id, 999, rank=4, name="x") for client in CLIENTS]
    assert ids(choose(rich, Round(1, 0, 10, 3))) == ids(choose(CLIENTS, Round(1, 0, 10, 3)))


@pytest.mark.parametrize("seed", [0, 1])
def test_choices_are_uniform_over_rounds(seed):
    rounds = [ids(choose(CLIENTS, Round(idx, seed, 10, 3))) for idx in range(1000)]
    # Each client in 1000 * 3/10 = 300 rounds, standard deviation sqrt(1000 * .3 * .7) = 14.5.
    single = Counter(itertools.chain.from_iterable(rounds))
    assert all(abs(single[number] - 300) < 5 * 14.5 for number in range(10))
    # Each of 45 pairs in 1000 * 3/45 = 66.7, standard deviation sqrt(1000 / 15 * 14 / 15) = 7.9.
    pairs = Counter(pair for chosen in rounds for pair in itertools.combinations(chosen, 2))
    assert all(abs(pairs[pair] - 66.7) < 5 * 7.9 for pair in itertools.combinations(range(10), 2))
    # Two rounds in a row share 3 * 3/10 = 0.9 clients; standard deviation of the mean about 0.03.
    shared = [len({*a} & {*b}) for a, b in itertools.pairwise(rounds)]
    assert abs(np.mean(shared) - 0.9) < 0.15


def test_another_seed_chooses_others():
    choices = {tuple(ids(choose(CLIENTS, Round(0, seed, 10, 3)))) for seed in range(50)}
    assert len(choices) > 25  # of 120 possible


def samples(client):
    return client.num_samples


def ranking(clients, rnd):
    """Who is looked for first: what each larger cohort adds."""
    sets = [
        set(ids(choose(clients, replace(rnd, cohort=size)))) for size in range(len(clients) + 1)
    ]
    return [(larger - smaller).pop() for smaller, larger in itertools.pairwise(sets)]


def pace(seed, client_id, slowness):
    """How many times as long as usual a step takes."""
    head = hashlib.sha256(f"{seed}\x1f'speed'\x1f{client_id}".encode()).digest()[:8]
    uniform = torch.tensor((int.from_bytes(head, "big") >> 11) / 2**53, dtype=torch.float64)
    return math.exp(slowness * float(torch.special.ndtri(uniform)))


def absent(planned, reason):
    return [absence.client.id for absence in planned.absent if absence.reason == reason]


def never(client):
    raise AssertionError(f"the steps of {client} do not matter")


samplings = st.builds(
    Sampling,
    availability=st.sampled_from([0.3, 0.7, 1.0]),
    dropout=st.sampled_from([0.0, 0.4]),
    over_selection=st.sampled_from([0.0, 0.3, 1.0]),
    deadline_steps=st.sampled_from([None, 1, 14]),
    slowness=st.sampled_from([0.0, 0.5, 2.0]),
    late=st.sampled_from(["drop", "partial"]),
)
rounds = st.builds(Round, st.integers(0, 999), st.integers(0, 9), st.just(10), st.integers(1, 10))


@pytest.mark.parametrize("cohort", [1, 4, 10])
def test_by_default_the_chosen_play(cohort):
    for idx in range(200):
        rnd = Round(idx, 3, 10, cohort)
        assert plan(CLIENTS, rnd, Sampling(), samples) == Plan(tuple(choose(CLIENTS, rnd)), {}, ())


@given(rnd=rounds, how=samplings)
def test_everyone_looked_for_plays_or_is_absent(rnd, how):
    planned = plan(CLIENTS, rnd, how, samples)
    played, gone = ids(planned.players), [absence.client.id for absence in planned.absent]
    assert played == sorted(set(played))
    assert gone == sorted(set(gone))
    looked_for = {*played, *gone}
    assert len(looked_for) == len(played) + len(gone)
    # They are the head of the ranking, and the search ends with one that is there.
    order = ranking(CLIENTS, rnd)
    assert looked_for == set(order[: len(looked_for)])
    unavailable = absent(planned, "unavailable")
    reached = len(looked_for) - len(unavailable)
    wanted = math.ceil(rnd.cohort * (10 + round(10 * how.over_selection)) / 10)
    assert reached == wanted or len(looked_for) == 10
    assert reached <= wanted
    assert reached < wanted or order[len(looked_for) - 1] not in unavailable
    answers = reached - len(absent(planned, "dropped out")) - len(absent(planned, "late"))
    assert len(played) == min(rnd.cohort, answers)
    assert len(absent(planned, "not needed")) == answers - len(played)
    assert all(a.reached == (a.reason != "unavailable") for a in planned.absent)
    assert set(planned.limits) <= set(played)
    assert all(1 <= limit < samples(CLIENTS[k]) for k, limit in planned.limits.items())
    assert not planned.limits or how.late == "partial"


@given(rnd=rounds, how=samplings, order=st.permutations(CLIENTS))
def test_a_plan_is_pure_and_does_not_depend_on_the_order_of_the_list(rnd, how, order):
    planned = plan(CLIENTS, rnd, how, samples)
    assert plan(CLIENTS, rnd, how, samples) == planned
    other = plan(order, rnd, how, samples)
    assert other.limits == planned.limits
    assert other.players == tuple(client for client in order if client in planned.players)
    assert sorted(other.absent, key=lambda absence: absence.client.id) == list(planned.absent)


@pytest.mark.parametrize(
    ("how", "reason"),
    [(Sampling(availability=0.7), "unavailable"), (Sampling(dropout=0.3), "dropped out")],
)
def test_absences_are_as_frequent_as_was_set(how, reason):
    plans = [plan(CLIENTS, Round(idx, 1, 10, 10), how, samples) for idx in range(200)]
    counts = Counter(number for planned in plans for number in absent(planned, reason))
    # 2,000 draws of probability .3, standard deviation sqrt(2000 * .3 * .7) = 20.5.
    assert abs(counts.total() - 600) < 4 * 20.5
    # Each client 200 times, standard deviation 6.5: nobody is away for good.
    assert all(abs(counts[number] - 60) < 4 * 6.5 for number in range(10))


def test_to_be_there_and_to_answer_are_drawn_apart_from_each_other_and_from_the_choice():
    how = Sampling(availability=0.5, dropout=0.5)
    plans = [plan(CLIENTS, Round(idx, 0, 10, 3), how, samples) for idx in range(300)]
    away = sum(len(absent(planned, "unavailable")) for planned in plans)
    reached = sum(len(planned.players) + len(absent(planned, "dropped out")) for planned in plans)
    # As many are passed over as are reached (about 900, standard deviation 42 each way).
    assert abs(away - reached) < 4 * 42
    dropped = sum(len(absent(planned, "dropped out")) for planned in plans)
    assert abs(dropped - reached / 2) < 4 * math.sqrt(reached) / 2


@pytest.mark.parametrize(
    ("cohort", "over_selection", "reached"),
    [(10, 0.1, 11), (100, 0.1, 110), (100, 0.3, 130), (3, 0.5, 5), (1, 0.01, 2), (100, 9.0, 200)],
)
def test_over_selection_chooses_as_many_more_as_was_written(cohort, over_selection, reached):
    clients = [Client(number, 1) for number in range(200)]
    how = Sampling(over_selection=over_selection)
    planned = plan(clients, Round(0, 0, 200, cohort), how, samples)
    assert len(planned.players) == cohort
    assert len(absent(planned, "not needed")) == reached - cohort


@pytest.mark.parametrize(("slowness", "deadline"), [(0.0, None), (0.8, None), (0.8, 12)])
def test_over_selection_takes_the_first_to_finish(slowness, deadline):
    how = Sampling(1.0, 0.0, 1.0, deadline, slowness, "partial")
    for idx in range(30):
        rnd = Round(idx, 5, 10, 3)
        times = {k: samples(CLIENTS[k]) * pace(5, k, slowness) for k in ranking(CLIENTS, rnd)[:6]}
        if deadline:  # who is cut short works until then
            times = {number: min(time, deadline) for number, time in times.items()}
        planned = plan(CLIENTS, rnd, how, samples)
        assert ids(planned.players) == sorted(sorted(times, key=times.get)[:3])
        assert absent(planned, "not needed") == sorted(sorted(times, key=times.get)[3:])


def test_who_finishes_at_the_same_time_counts_by_rank():
    for idx in range(30):
        rnd = Round(idx, 0, 10, 4)
        planned = plan(CLIENTS, rnd, Sampling(over_selection=0.5), lambda _: 7)
        assert list(planned.players) == choose(CLIENTS, rnd)


def test_over_selection_makes_up_for_those_that_drop_out():
    how = Sampling(dropout=0.4, over_selection=1.0)
    plans = [plan(CLIENTS, Round(idx, 0, 10, 2), how, samples) for idx in range(300)]
    full = sum(len(planned.players) == 2 for planned in plans)
    # Fewer than 2 of 4 answer with probability .4^4 + 4 * .4^3 * .6 = .179; deviation 6.6 of 300.
    assert abs(full - 300 * 0.8208) < 4 * 6.6


@pytest.mark.parametrize(
    ("late", "limits"), [("drop", {}), ("partial", dict.fromkeys(range(5, 10), 14))]
)
def test_a_deadline_without_slowness_is_a_number_of_steps(late, limits):
    # Client k takes 10 + k steps: with 14 the deadline is met, with 15 it is not.
    how = Sampling(deadline_steps=14, late=late)
    planned = plan(CLIENTS, Round(0, 0, 10, 10), how, samples)
    assert planned.limits == limits
    assert ids(planned.players) == [*range(5), *limits]
    assert absent(planned, "late") == [number for number in range(5, 10) if number not in limits]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("late", ["drop", "partial"])
def test_a_slow_client_gets_less_done_by_the_deadline(seed, late):
    how = Sampling(deadline_steps=4, slowness=1.5, late=late)
    clients = [Client(number, 1 + number % 9) for number in range(50)]
    done = {c.id: math.floor(4 / pace(seed, c.id, 1.5)) for c in clients}
    whole = [c.id for c in clients if done[c.id] >= samples(c)]
    cut = [c.id for c in clients if 0 < done[c.id] < samples(c)]
    none = [c.id for c in clients if done[c.id] == 0]
    assert all((whole, cut, none))
    for idx in (0, 7):  # a speed is for the run
        planned = plan(clients, Round(idx, seed, 50, 50), how, samples)
        if late == "partial":
            assert ids(planned.players) == sorted(whole + cut)
            assert planned.limits == {number: done[number] for number in cut}
            assert absent(planned, "late") == none
        else:
            assert ids(planned.players) == whole
            assert absent(planned, "late") == sorted(cut + none)


def test_who_is_cut_short_finishes_at_the_deadline():
    # Four are done at 10; of the six that would go on for long one is needed, by rank.
    how = Sampling(over_selection=1.0, deadline_steps=14, late="partial")
    for idx in range(20):
        rnd = Round(idx, 0, 10, 5)
        planned = plan(CLIENTS, rnd, how, lambda client: 10 if client.id < 4 else 99)
        fifth = next(number for number in ranking(CLIENTS, rnd) if number > 3)
        assert ids(planned.players) == [0, 1, 2, 3, fifth]
        assert planned.limits == {fifth: 14}


def test_log_speeds_are_normal():
    clients = [Client(number, 1) for number in range(2000)]
    how = Sampling(deadline_steps=10**9, slowness=0.5, late="partial")
    planned = plan(clients, Round(0, 0, 2000, 2000), how, lambda _: 10**12)
    logs = np.log(1e9 / np.array([planned.limits[c.id] for c in clients])) / 0.5
    assert abs(logs.mean()) < 4 / math.sqrt(2000)
    assert abs(logs.std() - 1) < 4 / math.sqrt(4000)
    assert abs((abs(logs) < 1).mean() - 0.6827) < 4 * math.sqrt(0.6827 * 0.3173 / 2000)


@pytest.mark.parametrize(("seed", "players"), [(0, 10), (2**63 - 1, 0)])
def test_the_ends_of_the_draws_are_numbers(monkeypatch, seed, players):
    monkeypatch.setattr(sampling, "derive_seed", lambda *_: seed)
    how = Sampling(availability=1.0, deadline_steps=5, slowness=10.0)
    assert len(plan(CLIENTS, Round(0, 0, 10, 10), how, samples).players) == players
    away = Sampling(availability=1 - 2**-53, dropout=1 - 2**-53)
    reason = "dropped out" if seed == 0 else "unavailable"
    assert len(absent(plan(CLIENTS, Round(0, 0, 10, 10), away, samples), reason)) == 10


@given(
    st.lists(st.integers(0) | st.text(max_size=3), max_size=3),
    st.lists(st.integers(0) | st.text(max_size=3)),
)
def test_seeds_of_many_are_those_of_each(keys, each):
    assert list(derive_seeds(*keys, each=each)) == [derive_seed(*keys, key) for key in each]


def test_a_big_federation_is_hashed_once(monkeypatch):
    drawn = Counter()

    def counted(*keys):
        drawn[keys[1]] += 1
        return derive_seed(*keys)

    def counted_each(*keys, each):
        return (counted(*keys, key) for key in each)

    monkeypatch.setattr(sampling, "derive_seed", counted)
    monkeypatch.setattr(sampling, "derive_seeds", counted_each)
    clients = [Client(number, 1) for number in range(10_000)]
    plan(clients, Round(0, 0, 10_000, 100), Sampling(), samples)
    assert drawn == {"choose": 10_000}
    drawn.clear()
    how = Sampling(0.8, 0.1, 0.3, 40, 0.5)
    planned = plan(clients, Round(0, 0, 10_000, 100), how, lambda client: 10 + client.id % 10)
    assert len(planned.players) == 100
    assert drawn == {
        "choose": 10_000,
        "is available": len(planned.players) + len(planned.absent),
        "drops out": 130,
        "speed": 130 - len(absent(planned, "dropped out")),
    }


def test_who_will_not_answer_is_not_asked_for_steps():
    always = Sampling(dropout=1 - 2**-53)
    assert len(plan(CLIENTS, Round(0, 0, 10, 10), always, never).absent) == 10


@pytest.mark.parametrize(
    "how",
    [Sampling(), Sampling(0.5, 0.5, 1.0, 9, 10.0, "partial"), Sampling(0.5, 0.5, 1.0, None, 1.0)],
)
def test_what_can_be_is_accepted(how):
    how.validate()


@pytest.mark.parametrize(
    ("field", "values", "must"),
    [
        ("availability", [0.0, -0.1, 1.1, math.nan], "above 0 and at most 1"),
        ("dropout", [-0.1, 1.0, math.nan], "at least 0 and below 1"),
        ("over_selection", [-0.1, math.inf, math.nan], "a number from 0 up"),
        ("deadline_steps", [0, -1, math.inf, math.nan], "at least 1"),
        ("slowness", [-0.1, 10.1, math.inf, math.nan], "from 0 to 10"),
        ("late", ["maybe"], "drop or partial"),
    ],
)
def test_what_cannot_be_is_refused(field, values, must):
    for value in values:
        with pytest.raises(FedloraError) as caught:
            replace(Sampling(deadline_steps=3), **{field: value}).validate()
        assert str(caught.value) == f"trainer.sampling.{field} must be {must}, got {value}."


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            Sampling(slowness=0.5),
            r"^trainer\.sampling\.slowness=0\.5 has no effect.*deadline_steps",
        ),
        (Sampling(late="partial"), r"^trainer\.sampling\.late=partial needs a deadline"),
        (Sampling(over_selection=0.3, late="partial"), "late=partial needs a deadline"),
    ],
)
def test_what_would_have_no_effect_is_refused(how, message):
    with pytest.raises(FedloraError, match=message):
        how.validate()
    replace(how, deadline_steps=3).validate()
