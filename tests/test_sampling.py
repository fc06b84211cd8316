from __future__ import annotations

import hashlib
import itertools
import os
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.sampling import choose, derive_seed
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
