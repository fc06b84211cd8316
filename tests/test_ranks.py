from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora import FedloraError, LoRAConfig, ranks
from fedlora.aggregation import FedAvg
from fedlora.checkpoint import load
from fedlora.errors import CheckpointError
from fedlora.main import main
from fedlora.ranks import assign_ranks
from fedlora.state import Client
from tests.padded_mean import PaddedMean
from tests.runs import fit, rows


def clients(count):
    return [Client(number, 10 + number, name=f"site_{number}") for number in range(count)]


def assign(given, count=4, rule=None, seed=0, alpha="scaled", **config):
    lora = LoRAConfig(**({"r": 8} | config))
    return assign_ranks(clients(count), given, lora, rule or PaddedMean(), seed, alpha)


def given_ranks(*args, **options):
    return [client.rank for client in assign(*args, **options)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, [8, 8, 8, 8]),
        (3, [3, 3, 3, 3]),
        ([2, 4, 8, 1], [2, 4, 8, 1]),
        ((8, 4, 2, 1), [8, 4, 2, 1]),
        ({4: 1.0}, [4, 4, 4, 4]),
    ],
)
def test_what_each_client_gets(given, expected):
    assigned = assign(given)
    assert [client.rank for client in assigned] == expected
    kept = [replace(client, rank=0) for client in assigned]
    assert kept == clients(4)


def test_the_servers_rank_needs_no_special_rule():
    for equal in (None, 8, [8] * 4, {8: 1.0}):
        assert given_ranks(equal, rule=FedAvg()) == [8] * 4


# Shares.


@pytest.mark.parametrize(
    ("shares", "count", "expected"),
    [
        ({2: 0.5, 4: 0.5}, 10, {2: 5, 4: 5}),
        ({2: 0.2, 4: 0.3, 8: 0.5}, 10, {2: 2, 4: 3, 8: 5}),
        ({8: 3, 2: 1}, 8, {8: 6, 2: 2}),  # need not add up to 1
        ({2: 50.0, 4: 25.0, 8: 25.0}, 4, {2: 2, 4: 1, 8: 1}),
        ({2: 0.0, 4: 1.0}, 5, {4: 5}),
        ({2: 0.7, 4: 0.3}, 4, {2: 3, 4: 1}),  # 2.8 and 1.2
        ({2: 0.1, 4: 0.9}, 4, {4: 4}),  # 0.4 of a client is none
        (dict.fromkeys(range(1, 11), 0.1), 50, dict.fromkeys(range(1, 11), 5)),
    ],
)
def test_shares_are_met_to_the_nearest_client(shares, count, expected):
    assert Counter(given_ranks(shares, count, r=16)) == expected


@settings(max_examples=100, deadline=None)
@given(
    shares=st.lists(st.floats(0, 1e3), min_size=1, max_size=6).filter(lambda s: sum(s) > 1e-3),
    count=st.integers(1, 60),
)
def test_every_client_gets_a_rank_whatever_the_shares(shares, count):
    found = Counter(given_ranks(dict(enumerate(shares, start=1)), count))
    assert sum(found.values()) == count
    for rank, share in enumerate(shares, start=1):
        # the borders between ranks are rounded, so both ends of one may move by a half
        assert abs(found[rank] - count * share / sum(shares)) <= 1 + 1e-9


def test_shares_are_drawn_from_the_seed_and_not_from_the_order():
    shares = {2: 0.5, 4: 0.5}
    drawn = [tuple(given_ranks(shares, 12, seed=seed)) for seed in range(5)]
    assert len(set(drawn)) == 5
    assert drawn[0] == tuple(given_ranks(shares, 12, seed=0))
    assert drawn[0] != (2,) * 6 + (4,) * 6
    backwards = assign_ranks(clients(12)[::-1], shares, LoRAConfig(r=8), PaddedMean(), 0)
    assert [client.rank for client in backwards] == list(drawn[0])[::-1]


def test_another_process_draws_the_same():
    program = (
        "from fedlora import LoRAConfig; from fedlora.ranks import assign_ranks\n"
        "from fedlora.state import Client; from fedlora.aggregation import FedAvg\n"
        "rule = FedAvg(); rule.mixed_ranks = True\n"
        "made = [Client(n, 1) for n in range(12)]\n"
        "print(*(c.rank for c in assign_ranks(made, {2: .5, 4: .5}, LoRAConfig(r=8), rule, 3)))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.split() == [str(r) for r in given_ranks({2: 0.5, 4: 0.5}, 12, seed=3)]


# How a client scales.


@pytest.mark.parametrize(
    ("alpha", "rslora", "expected"),
    [
        ("scaled", False, [1.0, 1.0, 1.0, 1.0]),
        ("scaled", True, [1.0, 1.0, 1.0, 1.0]),
        # alpha / r_k over alpha / r = r / r_k, and sqrt(r / r_k) for alpha / sqrt(r)
        ("fixed", False, [4.0, 2.0, 1.0, 8.0]),
        ("fixed", True, [2.0, np.sqrt(2.0), 1.0, np.sqrt(8.0)]),
    ],
)
def test_lora_alpha_follows_the_rank_or_not(alpha, rslora, expected):
    assigned = assign([2, 4, 8, 1], alpha=alpha, use_rslora=rslora)
    assert [client.scale for client in assigned] == pytest.approx(expected, rel=1e-15)


# Refusals.


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (0, r"whole numbers from 1 to model\.lora\.r=8, got 0\. Change it"),
        (-1, "got -1"),
        (9, r"from 1 to model\.lora\.r=8, got 9\. Change it, or set model\.lora\.r to the largest"),
        ([2, 4, 16, 8], "got 16"),
        ({4: 0.5, 16: 0.5}, "got 16"),
        ([2, 4.5, 8, 8], r"got 4\.5"),
        (4.0, r"got 4\.0"),
        ([2, 4, 8], "lists 3 ranks for 4 clients. Give one for each, one for all, or shares"),
        ([2] * 5, "lists 5 ranks for 4 clients"),
        ([], "lists 0 ranks"),
        ({}, r"shares, none below 0 and one above, such as '\{4: 0\.5, 8: 0\.5\}', got \{\}"),
        ({4: -0.5, 8: 1.5}, r"got \{4: -0\.5, 8: 1\.5\}"),
        ({4: 0.0, 8: 0.0}, "none below 0 and one above"),
        ({4: float("nan"), 8: 1.0}, "got {4: nan"),
        ({4: float("inf"), 8: 1.0}, "got {4: inf"),
    ],
)
def test_ranks_that_cannot_be(given, message):
    with pytest.raises(FedloraError, match=rf"trainer\.client_ranks .*{message}"):
        assign(given)


@pytest.mark.parametrize("given", [4, [8, 8, 8, 4], {4: 0.25, 8: 0.75}])
def test_a_rule_that_needs_equal_ranks_names_those_that_do_not(given, monkeypatch):
    class Other(PaddedMean): ...

    monkeypatch.setattr(
        ranks, "RULES", {"FedAvg": FedAvg, "PaddedMean": PaddedMean, "Other": Other}
    )
    message = (
        r"FedAvg needs the server's rank, model\.lora\.r=8, on all clients: .* "
        r"trainer\.averaging\.aggregator to one of PaddedMean, Other\."
    )
    with pytest.raises(FedloraError, match=message):
        assign(given, rule=FedAvg())


def test_there_is_a_rule_for_other_ranks():
    assert any(rule.mixed_ranks for rule in ranks.RULES.values())


def test_without_lora_there_are_no_ranks():
    with pytest.raises(
        FedloraError, match=r"LoRA, which is off \(lora\.enabled=false\)\. Leave it out"
    ):
        assign(4, enabled=False)
    assert assign(None, enabled=False) == clients(4)


# Through the trainer.


@pytest.mark.parametrize(
    ("given", "expected"), [(2, [2, 2, 2]), ([1, 2, 4], [1, 2, 4]), ({3: 2, 1: 1}, None)]
)
def test_the_tables_say_who_trains_which(tmp_path, given, expected):
    trainer = fit(tmp_path, PaddedMean(), client_ranks=given, max_rounds=1, limit_train_batches=1)
    table = rows(trainer.run.clients_csv)
    found = [int(row["rank"]) for row in table]
    assert found == expected if expected else sorted(found) == [1, 3, 3]
    # r (in + out) of fc1 and fc2 of 4 blocks of (128, 512), and a head of 10 x 64 + 10: both ways
    bytes_of = {rank: str(4 * (4 * 2 * rank * (128 + 512) + 650)) for rank in (1, 2, 3, 4)}
    assert [row["up_bytes"] for row in table] == [bytes_of[rank] for rank in found]
    assert [row["down_bytes"] for row in table] == [bytes_of[rank] for rank in found]
    server = trainer.server.adapter
    assert set(server.ranks.values()) == {4}


@pytest.mark.parametrize("settings", [{"client_ranks": 9}, {"client_ranks": 2, "rule": FedAvg()}])
def test_what_is_refused_leaves_no_run_folder(tmp_path, settings):
    with pytest.raises(FedloraError, match="client_ranks"):
        fit(tmp_path, **({"rule": PaddedMean()} | settings))
    assert not list(tmp_path.iterdir())


def test_a_resume_needs_the_same_ranks(tmp_path):
    options = {"limit_train_batches": 1}
    fit(tmp_path, PaddedMean(), max_rounds=1, client_ranks=[1, 2, 4], **options)
    for changed in ({"client_ranks": [1, 4, 4]}, {"client_alpha": "fixed"}):
        settings = {"client_ranks": [1, 2, 4], **changed}
        with pytest.raises(CheckpointError, match=r"client_(ranks|scales): \[.* -> \["):
            fit(tmp_path, PaddedMean(), max_rounds=2, ckpt_path="last", **settings, **options)
    going_on = fit(
        tmp_path, PaddedMean(), max_rounds=2, ckpt_path="last", client_ranks=[1, 2, 4], **options
    )
    assert going_on.server.round_idx == 2


# On the command line.

QUICK = [
    "--config=clip_lora.yaml",
    "--trainer.limit_train_batches=1",
    "--trainer.logger=false",
    "--data.num_clients=3",
    "--trainer.averaging.aggregator=tests.padded_mean.PaddedMean",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table():
    return rows(Path("runs/version_0/clients.csv"))


@pytest.mark.parametrize(
    ("where", "text", "expected"),
    [
        ("option", "[2,4,8]", [2, 4, 8]),
        ("option", '{"2": 2, "4": 1}', [2, 2, 4]),
        ("file", "{2: 0.5, 4: 0.25}", [2, 2, 4]),
    ],
)
def test_ranks_can_be_written_down(folder, where, text, expected):
    args = [f"--trainer.client_ranks={text}"]
    if where == "file":
        Path("mine.yaml").write_text(f"trainer:\n  client_ranks: {text}\n")
        args = ["--config=mine.yaml"]
    assert main(["fit", *QUICK, *args, "--trainer.max_rounds=1"]) == 0
    assert sorted(int(row["rank"]) for row in table()) == expected
    # its own config goes on with it
    assert main(["fit", "--ckpt_path", "last", "--trainer.max_rounds=2"]) == 0
    assert sorted(int(row["rank"]) for row in table()) == sorted(expected * 2)


def test_a_resume_with_other_ranks_is_one_line(folder, capsys):
    args = ["--trainer.client_ranks={2: 2, 4: 1}", "--trainer.max_rounds=1"]
    assert main(["fit", *QUICK, *args]) == 0
    changed = ["--trainer.client_ranks={2: 2, 8: 1}", "--trainer.max_rounds=2"]
    assert main(["fit", "--ckpt_path", "last", *changed]) == 1
    assert "trainer.client_ranks.4: 1.0 -> 'absent'" in capsys.readouterr().err


def test_one_rank_and_a_fixed_alpha_are_options(folder):
    fixed = ["--trainer.client_ranks=4", "--trainer.client_alpha=fixed", "--trainer.max_rounds=1"]
    assert main(["fit", *QUICK, *fixed]) == 0
    assert [row["rank"] for row in table()] == ["4", "4", "4"]
    identity = load(Path("runs/version_0/checkpoints/last.ckpt")).identity
    assert identity["client_scales"] == [2.0, 2.0, 2.0]  # r = 8


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--trainer.client_ranks=16"], 1, "from 1 to model.lora.r=8, got 16"),
        (["--trainer.client_ranks=[2,4]"], 1, "lists 2 ranks for 3 clients"),
        (["--trainer.client_ranks=many"], 2, "trainer.client_ranks: should be of type int"),
        (["--trainer.client_alpha=fixd"], 2, "should be one of 'scaled', 'fixed' but got fixd"),
        (
            ["--trainer.client_ranks=4", "--trainer.averaging.aggregator=FedAvg"],
            1,
            "FedAvg needs the server's rank",
        ),
    ],
)
def test_a_mistake_is_one_line_and_no_run(folder, capsys, args, code, said):
    assert main(["fit", *QUICK, *args]) == code
    err = capsys.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not Path("runs").exists()


def test_an_adapted_head_has_a_rank_of_its_own():
    both = ("encoder", "classifier")
    with pytest.raises(FedloraError, match="the head has a rank of its own"):
        assign(4, target_components=both)
    assert assign(None, target_components=both) == clients(4)  # rank 0: nothing is cut


def test_shares_and_alpha_of_another_kind_are_refused():
    with pytest.raises(FedloraError, match="must give ranks shares"):
        assign({4: "half"})
    with pytest.raises(FedloraError, match="should be scaled or fixed but got 'fixd'"):
        assign(4, alpha="fixd")


def test_an_alpha_without_ranks_is_refused():
    with pytest.raises(FedloraError, match=r"client_alpha=fixed is about .* set trainer.client_ra"):
        assign(None, alpha="fixed")
