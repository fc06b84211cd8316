from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from fedlora import FedloraError
from fedlora.aggregation import Aggregator, FedAvg, FedExLoRA, FLoRA, HetLoRA
from fedlora.state import AdapterState, Client, Residual
from fedlora.testing import CHECKS, check_aggregator
from fedlora.testing.cases import Case, cases
from fedlora.testing.compare import bits, ideal_error
from fedlora.testing.federation import Federation


class TakesHalf(FedAvg):
    def __init__(self, share=0.5):
        self.share = share

    def aggregate(self, server, updates, rnd):
        mean = super().aggregate(server, updates, rnd)
        change = {name: B - server.B[name] for name, B in mean.B.items()}
        return replace(mean, B={n: server.B[n] + self.share * c for n, c in change.items()})


MESSAGE = (
    r"TakesHalf fails 'one client': not what the only client serves: layer0 is off by \d\.\de-01 "
    r"of its size\. Example: seed 0; layers 3x4 scaled 1; rank 2; clients \(n 1, rank 2, scale 1\)"
    r", \(n 2, rank 2, scale 1\); 1 rounds before; steps of 0\.5; torch\.float32"
)


def test_a_class_or_a_function_makes_the_rule():
    check_aggregator(FedAvg, examples=2)
    check_aggregator(lambda: FedExLoRA(residual_rank=None), examples=2)


def test_the_message_is_one_line_with_check_rule_and_the_smallest_example():
    with pytest.raises(AssertionError) as caught:
        check_aggregator(lambda: TakesHalf(0.5))
    assert re.fullmatch(MESSAGE, str(caught.value)), caught.value
    assert caught.value.__cause__ is None


def test_the_error_of_a_rule_is_named_and_chained():
    class Raises(FedAvg):
        def aggregate(self, server, updates, rnd):
            raise IndexError("no such\n  layer.")

    with pytest.raises(AssertionError, match=r"it raised IndexError: no such layer\. Ex") as caught:
        check_aggregator(Raises)
    assert isinstance(caught.value.__cause__, IndexError)


def test_more_examples_find_more():
    class RareFault(FedAvg):
        """Wrong for one layer of a shape that few examples have."""

        def aggregate(self, server, updates, rnd):
            mean = super().aggregate(server, updates, rnd)
            rare = {n: B for n, B in mean.B.items() if B.shape == (8, 4)}
            return replace(mean, B={**mean.B, **{n: B + 1 for n, B in rare.items()}})

    check_aggregator(RareFault, examples=3)
    with pytest.raises(AssertionError, match=r"RareFault fails 'no weight'.* 8x.* rank 4"):
        check_aggregator(RareFault, examples=80, skip=[*CHECKS.keys() - {"no weight"}])


def test_what_a_rule_fails_by_design_can_be_left_out():
    check_aggregator(TakesHalf, examples=2, skip={"one client", "equal clients"})


def test_an_unknown_check_cannot_be_left_out():
    with pytest.raises(
        FedloraError, match=r"no check 'equal' to skip\. Choose from parts, result,"
    ):
        check_aggregator(FedAvg, skip=["equal", "order"])


def test_clients_may_know_more_than_they_are_sent():
    class Forgets(FLoRA):  # its clients do not draw the new adapter
        receive = Aggregator.receive

    skip = CHECKS.keys() - {"distribution"}
    check_aggregator(FLoRA, skip=skip)
    with pytest.raises(AssertionError, match=r"'distribution': client \d does not get to A of lay"):
        check_aggregator(Forgets, skip=skip)


RULE = FedAvg()


@pytest.mark.parametrize(
    "wrong", [RULE, lambda: RULE, lambda: None, dict], ids=["rule", "same", "none", "dict"]
)
def test_what_makes_no_fresh_rule_is_refused(wrong):
    with pytest.raises(FedloraError, match="a callable that makes a fresh Aggregator each time"):
        check_aggregator(wrong)


def test_no_example_is_no_check():
    with pytest.raises(FedloraError, match="examples must be 1 or more, got 0"):
        check_aggregator(FedAvg, examples=0)


def test_hypothesis_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(FedloraError) as caught:
        check_aggregator(FedAvg)
    assert str(caught.value) == (
        "check_aggregator needs hypothesis and finds none. Run: pip install hypothesis"
    )


@pytest.mark.parametrize("rule", [FedAvg, TakesHalf])
def test_threads_are_as_before(rule):
    before = torch.get_num_threads()
    seen = []

    class Looks(rule):
        def aggregate(self, server, updates, rnd):
            seen.append(torch.get_num_threads())
            return super().aggregate(server, updates, rnd)

    torch.set_num_threads(3)
    try:
        if rule is FedAvg:
            check_aggregator(Looks, examples=1)
        else:
            with pytest.raises(AssertionError):
                check_aggregator(Looks, examples=5)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}


PROGRAM = """
import sys
import fedlora.testing
print("hypothesis" in sys.modules)
from fedlora.aggregation import FedAvg

class Wrong(FedAvg):
    exact = True

try:
    fedlora.testing.check_aggregator(Wrong)
except AssertionError as error:
    print(error)
"""


def test_a_run_is_repeated_to_the_letter_and_writes_nothing(tmp_path):
    said = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        # Numbers in the user's modules are no examples.
        (folder / "own.py").write_text("NUMBERS = [3, 4, 5, 6, 7, 8]")
        program = ("import own\n" if name == "two" else "") + PROGRAM
        answer = subprocess.run(
            [sys.executable, "-B", "-c", program],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
        said.append(answer.stdout.splitlines())
        assert [path.name for path in folder.iterdir()] == ["own.py"]
    assert said[0] == said[1]
    assert said[0][0] == "False"  # not imported before it is used
    assert said[0][1].startswith("Wrong fails 'exact': ")


@pytest.mark.parametrize("mixed", [True, False])
def test_the_examples_are_various(mixed):
    drawn: list[Case] = []

    @settings(max_examples=100, derandomize=True, database=None, deadline=None)
    @given(cases(mixed))
    def collect(case):
        drawn.append(case)

    collect()
    sides = {side for case in drawn for rows, columns, _ in case.layers for side in (rows, columns)}
    assert sides == set(range(1, 9))
    assert {len(case.clients) for case in drawn} == set(range(1, 7))
    assert {case.rounds for case in drawn} == {0, 1, 2, 3}
    assert {case.dtype for case in drawn} == {torch.float32, torch.float64}
    assert any(case.rank > min(case.layers[0][:2]) for case in drawn)
    assert any(client.num_samples == 0 for case in drawn for client in case.clients)
    assert all(any(client.num_samples for client in case.clients) for case in drawn)
    assert any(len(case.players(0)) < len(case.clients) for case in drawn if case.rounds)
    assert all(case.players(case.rounds) == case.clients for case in drawn)
    unequal = [case for case in drawn if len({c.rank or case.rank for c in case.clients}) > 1]
    scaled = [case for case in drawn if any(client.scale != 1 for client in case.clients)]
    assert bool(unequal) == bool(scaled) == mixed


CASE = Case(
    seed=3,
    layers=((4, 5, 2.0), (2, 3, 1.0)),
    rank=3,
    clients=(Client(0, 2, rank=3), Client(1, 5, rank=2, scale=2.0), Client(2, 0, rank=1)),
    rounds=2,
    step=0.5,
    dtype=torch.float64,
)


def test_clients_are_played_at_their_rank_and_scale():
    federation = Federation(HetLoRA(), CASE)
    for turn, rank, scale in zip(federation.turns(), (3, 2, 1), (1.0, 2.0, 1.0), strict=False):
        assert turn.update.payload.ranks == {"layer0": rank, "layer1": rank}
        assert turn.update.adapter.scaling == {"layer0": 2 * scale, "layer1": scale}
        assert turn.update.client.last_round is None
        assert not torch.equal(turn.model.A["layer0"], turn.update.sent.A["layer0"])


def test_clients_go_on_from_what_they_keep_and_are_sent_what_they_lack():
    case = replace(CASE, clients=(Client(0, 2), Client(1, 5)), rounds=0)

    class KeepsB(FedAvg):
        def shared(self, rnd):
            return frozenset({"A", "other"})

    federation = Federation(KeepsB(), case)
    first, second = federation.play(), federation.play()
    for before, after in zip(first.turns, second.turns, strict=True):
        client = after.update.client
        assert client.last_round == 0
        federation.idx = 1  # the step of that round again
        start = replace(first.after, B=before.model.B)
        assert bits(federation.moved(start, client).B) == bits(after.model.B)
        assert not any(B.any() for B in after.update.adapter.B.values())


def test_the_ideal_by_hand():
    # I = (3 * (1 + 2 * 1*1) + 1 * (0 + 2 * 5*5)) / 4 = 59 / 4; served: 8 + 2 * 2*2 = 16. The sizes
    # are those of what goes in: here all of one sign, so I itself.
    def scalar(B, A, residual=None):
        beside = {} if residual is None else {"x": Residual(torch.tensor([[residual]]))}
        A, B = torch.tensor([[A]]), torch.tensor([[B]])
        return AdapterState({"x": A}, {"x": B}, {}, {"x": 2.0}, beside)

    clients = [scalar(1.0, 1.0, 1.0), scalar(5.0, 5.0)]
    error = ideal_error(scalar(2.0, 2.0, 8.0), clients, [0.75, 0.25])
    assert error == pytest.approx((16 - 59 / 4) / (59 / 4), rel=1e-12)
    assert math.isnan(ideal_error(scalar(2.0, float("nan")), clients, [0.75, 0.25]))


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([1.0, float("nan")]),
        torch.tensor(True),
        torch.tensor([1.0], dtype=torch.bfloat16),
        {"a": [torch.zeros(2), 1]},
        Residual(torch.zeros(2, 1), torch.ones(1, 2)),
        TakesHalf(0.25),
    ],
    ids=lambda value: type(value).__name__,
)
def test_bits_are_equal_for_copies_alone(value):
    from copy import deepcopy

    before = bits(value)
    assert bits(deepcopy(value)) == before
    assert bits(torch.zeros(2)) != before
    edited = deepcopy(value)
    tensors = {"a": lambda v: v["a"][0], "U": lambda v: v.U}
    if isinstance(value, torch.Tensor):
        edited.zero_()
    elif isinstance(value, FedAvg):
        edited.share = 0.5
    else:
        tensors["a" if isinstance(value, dict) else "U"](edited).add_(1)
    assert bits(edited) != before
