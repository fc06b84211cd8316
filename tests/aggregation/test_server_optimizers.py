from __future__ import annotations

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlora import FedloraError
from fedlora.aggregation import (
    Aggregator,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedExLoRA,
    FedSALoRA,
    FedYogi,
    FFALoRA,
    FLoRA,
    HetLoRA,
    Local,
    LocalHead,
    LocalOnly,
    RoLoRA,
    Wrapper,
)
from fedlora.state import AdapterState, Client, ClientUpdate
from fedlora.testing import check_aggregator
from fedlora.testing.compare import bits
from fedlora.testing.federation import saved
from tests.aggregation.rule_builders import HEAD, ROUND, adapter, fresh, mean, names, play

OPTIMIZERS = [FedAvgM, FedAdam, FedYogi, FedAdagrad]
# With a momentum, or steps of another length than the change's, what clients agree on is where the
# server goes to, not where it is.
BY_DESIGN = {"one client", "equal clients"}


@pytest.mark.parametrize(
    "make_rule",
    [
        *OPTIMIZERS,
        lambda: FedAvgM(RoLoRA()),
        lambda: FedAdam(FFALoRA()),
        lambda: FedAdam(HetLoRA()),
        lambda: FedAdam(LocalHead(RoLoRA())),
        lambda: LocalHead(FedYogi(FedSALoRA())),
        lambda: FedAdagrad(Local(FedAvg(), ["[AB]/layer0"])),
    ],
    ids=lambda make_rule: make_rule().name,
)
def test_every_promise_is_kept(make_rule):
    check_aggregator(make_rule, examples=3, skip=BY_DESIGN)


def test_momentum_zero_breaks_no_promise():
    check_aggregator(lambda: FedAvgM(FedAvg(), momentum=0.0), examples=3)


def one_round(rule, server, values, rnd=ROUND, name="bias"):
    """A round in which clients of weights 1, 2, ... send these values of one tensor."""
    updates = [
        ClientUpdate(Client(k, k + 1), server, AdapterState(other={name: value}), k + 1.0)
        for k, value in enumerate(values)
    ]
    return rule.aggregate(server, updates, rnd)


# By hand. D = (2, 0.05): 1 -> 3 and 1 -> 1.05; beta1 0.9, beta2 0.99, tau 0.1, lr 0.5.
# Both: m = 0.1 D = (0.2, 0.005).
# Adam: v = 0.99 * 0.01 + 0.01 * (4, 0.0025) = (0.0499, 0.009925), sqrt (0.223383, 0.099624):
#   w = 1 + 0.5 * (0.2 / 0.323383, 0.005 / 0.199624) = (1.309231, 1.012524).
# Yogi: v = 0.01 - 0.01 * (-4, 0.0025) = (0.05, 0.009975), sqrt (0.223607, 0.099875):
#   w = 1 + 0.5 * (0.2 / 0.323607, 0.005 / 0.199875) = (1.309017, 1.012508).
# Adagrad: v = 0.01 + (4, 0.0025) = (4.01, 0.0125), sqrt (2.002498, 0.111803):
#   w = 1 + 0.5 * (2 / 2.102498, 0.05 / 0.211803) = (1.475625, 1.118034).
@pytest.mark.parametrize(
    ("rule", "want"),
    [
        (FedAdam(lr=0.5, tau=0.1), [1.309231, 1.012524]),
        (FedYogi(lr=0.5, tau=0.1), [1.309017, 1.012508]),
        (FedAdagrad(lr=0.5, tau=0.1), [1.475625, 1.118034]),
        (FedAvgM(lr=0.5), [2.0, 1.025]),
    ],
    ids=lambda value: value.name if isinstance(value, Aggregator) else "",
)
def test_the_first_step_by_hand(rule, want):
    server = AdapterState(other={"bias": torch.ones(2, dtype=torch.float64)})
    sent = torch.tensor([3.0, 1.05], dtype=torch.float64)
    after = one_round(rule, server, [sent, sent])
    np.testing.assert_allclose(after.other["bias"].numpy(), want, atol=1e-6)


def adam(w, changes, lr, beta1, beta2, tau, yogi):
    """Algorithm 2 of arXiv 2003.00295."""
    m, v = np.zeros_like(w), np.full_like(w, tau**2)
    for D in changes:
        m = beta1 * m + (1 - beta1) * D
        if yogi:
            v = v - (1 - beta2) * D**2 * np.sign(v - D**2)
        else:
            v = beta2 * v + (1 - beta2) * D**2
        w = w + lr * m / (np.sqrt(v) + tau)
    return w


def by_torch(make_optimizer):
    """The same by an optimizer of torch, whose gradient is -D."""

    def steps(w, changes):
        parameter = torch.nn.Parameter(torch.from_numpy(w.copy()))
        optimizer = make_optimizer([parameter])
        for D in changes:
            parameter.grad = torch.from_numpy(-D)
            optimizer.step()
        return parameter.detach().numpy()

    return steps


@pytest.mark.parametrize(
    ("rule", "reference"),
    [
        (
            FedAvgM(lr=0.3, momentum=0.8),
            by_torch(lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.8)),
        ),
        (
            FedAdagrad(lr=0.3, tau=0.05),
            by_torch(
                lambda p: torch.optim.Adagrad(
                    p, lr=0.3, initial_accumulator_value=0.05**2, eps=0.05
                )
            ),
        ),
        (
            FedAdam(lr=0.3, beta1=0.8, beta2=0.9, tau=0.05),
            lambda w, changes: adam(w, changes, 0.3, 0.8, 0.9, 0.05, yogi=False),
        ),
        (
            FedYogi(lr=0.3, beta1=0.8, beta2=0.9, tau=0.05),
            lambda w, changes: adam(w, changes, 0.3, 0.8, 0.9, 0.05, yogi=True),
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Aggregator) else "",
)
def test_six_rounds_are_those_of_the_reference(rule, reference):
    rng = np.random.default_rng(5)
    start = rng.standard_normal((3, 4))
    # Large changes, then small ones: Yogi's v goes down.
    changes = [0.5 ** (2 * k) * rng.standard_normal((3, 4)) for k in range(6)]
    server = AdapterState(other={"bias": torch.from_numpy(start)})
    for k, D in enumerate(changes):
        w = server.other["bias"].numpy()
        spread = rng.standard_normal((3, 4))  # weights 1 and 2: what is added takes itself off
        values = [torch.from_numpy(w + D + 2 * spread), torch.from_numpy(w + D - spread)]
        server = one_round(rule, server, values, replace(ROUND, idx=k))
    np.testing.assert_allclose(server.other["bias"].numpy(), reference(start, changes), atol=1e-12)


@pytest.mark.parametrize("inner", [FedAvg, HetLoRA, RoLoRA, FedSALoRA])
def test_lr_one_without_momentum_is_the_rule_to_the_bit(inner):
    rule, server = FedAvgM(inner(), lr=1.0, momentum=0.0), fresh()
    for k in range(3):
        rnd = replace(ROUND, idx=k)
        trained = [adapter([9, k, n]) for n in range(3)]
        updates = play(rule, server, trained, [2, 4, 1], rnd)
        want = inner().aggregate(server, updates, rnd)
        server = rule.aggregate(server, updates, rnd)
        assert bits(server) == bits(want)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_saved_goes_on_to_the_bit(optimizer):
    one, server = optimizer(RoLoRA()), fresh()
    for k in range(3):
        rnd = replace(ROUND, idx=k)
        server = one.aggregate(server, play(one, server, [adapter(k), adapter(9)], [1, 2]), rnd)
    other, back = optimizer(RoLoRA()), saved(one.state_dict())
    other.load_state_dict(back)
    assert {v.dtype for memory in back["memory"].values() for v in memory.values()} == {
        torch.float64
    }
    for k in (3, 4):
        rnd = replace(ROUND, idx=k)
        updates = play(one, server, [adapter(k), adapter(8)], [1, 2], rnd)
        server, again = (rule.aggregate(server, updates, rnd) for rule in (one, other))
        assert bits(server) == bits(again)
        assert bits(one.state_dict()) == bits(other.state_dict())
        assert optimizer(RoLoRA()).state_dict()["memory"] == {}


def test_a_frozen_factor_stays_and_its_momentum_waits():
    rule, server, states = FedAvgM(RoLoRA(), momentum=0.5), adapter(0), []
    for k in range(3):
        rnd = replace(ROUND, idx=k)
        updates = play(rule, server, [adapter([7, k]), adapter([8, k])], [1, 2], rnd)
        states.append((server, updates, rule.aggregate(server, updates, rnd)))
        server = states[-1][-1]
    for k, (before, _, after) in enumerate(states):
        frozen, moved = ("B", "A") if k % 2 else ("A", "B")
        assert bits(after.part(frozen)) == bits(before.part(frozen))
        assert not any(torch.equal(t, before.part(moved)[n]) for n, t in after.part(moved).items())
    # B's momentum in round 2 is that of round 0.
    (first, updates, _), _, (third, again, after) = states
    for name in first.B:
        changes = [
            mean([u.payload.B[name] for u in sent], [1, 2]) - start.B[name].double().numpy()
            for start, sent in ((first, updates), (third, again))
        ]
        want = third.B[name].double().numpy() + 0.5 * changes[0] + changes[1]
        np.testing.assert_allclose(after.B[name].numpy(), want, atol=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("rule", "still"),
    [
        (FFALoRA, ["A/vision.fc1", "A/text.fc1"]),
        (FedSALoRA, ["B/vision.fc1", "B/text.fc1"]),
        (lambda: Local(FedAvg(), [f"other/{HEAD}", "A/text.*"]), ["A/text.fc1", f"other/{HEAD}"]),
    ],
)
def test_only_what_was_sent_takes_a_step(optimizer, rule, still):
    rule, server = optimizer(rule()), adapter(0)
    after = rule.aggregate(server, play(rule, server, [adapter(1)], [3]), ROUND)
    same = [n for n, t in after.tensors() if torch.equal(t, dict(server.tensors())[n])]
    assert same == still
    assert sorted(rule.state_dict()["memory"]) == sorted({*names(server)} - {*still})


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("statistic", ["running_var", "norm.running_mean", "norm.running_var"])
def test_running_statistics_take_their_mean(optimizer, statistic):
    rule, server = optimizer(lr=3.0), AdapterState(other={statistic: torch.tensor([4.0, 1.0])})
    for k in range(3):
        values = [torch.tensor([1.0, 0.25]), torch.tensor([0.25, 1.0])]
        server = one_round(rule, server, values, replace(ROUND, idx=k), name=statistic)
        assert server.other[statistic].tolist() == [0.5, 0.75]
    assert rule.state_dict()["memory"] == {}


def test_a_count_of_batches_stays_whole():
    name = "norm.num_batches_tracked"
    server = AdapterState(other={name: torch.tensor(2)})
    after = one_round(FedAdam(), server, [torch.tensor(4), torch.tensor(4)], name=name)
    assert torch.equal(after.other[name], torch.tensor(4))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_any_weight_nothing_changes(optimizer):
    rule, server = optimizer(), adapter(0)
    server = rule.aggregate(server, play(rule, server, [adapter(1)], [1]), ROUND)
    state = bits(rule.state_dict())
    for updates in ([], play(rule, server, [adapter(2), adapter(3)], [0, 0])):
        assert bits(rule.aggregate(server, updates, replace(ROUND, idx=1))) == bits(server)
        assert bits(rule.state_dict()) == state


class TakesOne(Aggregator):
    def aggregate(self, server, updates, rnd):
        return next(iter(updates)).payload.over(server)


def test_nothing_is_remembered_before_the_last_update_was_read():
    rule, server = FedAvgM(TakesOne()), adapter(0)
    read = []

    def stream():
        for update in play(rule, server, [adapter(1), adapter(2)], [1, 1]):
            yield update
            read.append(rule.state_dict()["memory"])

    rule.aggregate(server, stream(), ROUND)
    assert read == [{}, {}]
    assert rule.state_dict()["memory"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_updates_stream(optimizer):
    rule, server = optimizer(LocalHead(FedAvg())), fresh()
    seen, alive = [], []

    def stream():
        for number in range(5):
            [update] = play(rule, server, [adapter(number)], [1])
            seen.append(weakref.ref(update))
            yield update
            del update
            alive.append(sum(ref() is not None for ref in seen))

    rule.aggregate(server, stream(), ROUND)
    assert max(alive) <= 1


def test_it_is_not_exact_and_else_as_its_rule():
    rule = FedAdam(FFALoRA())
    assert FFALoRA().exact
    assert not rule.exact
    assert FedAdam(HetLoRA()).mixed_ranks
    assert not rule.mixed_ranks


@pytest.mark.parametrize(
    ("inner", "said"),
    [
        (
            FedExLoRA,
            "FedAdam(FedExLoRA) cannot be: FedExLoRA makes a residual for the very means that this "
            "would not go to. Put FedAdam around FedAvg, FFALoRA or RoLoRA, or use FedExLoRA "
            "alone.",
        ),
        (
            FLoRA,
            "FedAdam(FLoRA) cannot be: FLoRA makes its factors anew, so that their difference to "
            "the old ones is no direction. Put FedAdam around FedAvg, FFALoRA or RoLoRA, or use "
            "FLoRA alone.",
        ),
        (
            LocalOnly,
            "FedAdam(LocalOnly) cannot be: under LocalOnly nothing is averaged, so there is no "
            "step to take. Put FedAdam around FedAvg, or use LocalOnly alone.",
        ),
        (
            FedAvgM,
            "FedAdam(FedAvgM(FedAvg)) cannot be: the server takes one step a round. Use one of "
            "FedAdam and FedAvgM.",
        ),
        (lambda: LocalHead(FLoRA()), "LocalHead(FLoRA) makes its factors anew"),
        (lambda: Wrapper(LocalHead(FedYogi())), "Use one of FedAdam and FedYogi."),
    ],
)
def test_rules_that_it_cannot_go_around_are_refused(inner, said):
    with pytest.raises(FedloraError) as caught:
        FedAdam(inner())
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_local_head_goes_around_an_optimizer_and_within():
    assert LocalHead(FedAdam(FedAvg())).name == "LocalHead(FedAdam(FedAvg))"
    assert FedAdam(LocalHead(FedAvg())).name == "FedAdam(LocalHead(FedAvg))"


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("optimizer", "argument", "wrong", "said"),
    [
        (optimizer, "lr", wrong, "above 0 and finite")
        for optimizer in OPTIMIZERS
        for wrong in (0, -0.1, NAN, INF)
    ]
    + [
        (optimizer, "tau", wrong, "above 0 and finite")
        for optimizer in (FedAdam, FedYogi, FedAdagrad)
        for wrong in (0.0, NAN, INF)
    ]
    + [
        (optimizer, argument, wrong, "from 0 to below 1")
        for optimizer, argument in (
            (FedAvgM, "momentum"),
            (FedAdam, "beta1"),
            (FedAdam, "beta2"),
            (FedYogi, "beta1"),
        )
        for wrong in (-0.1, 1, NAN)
    ],
)
def test_numbers_out_of_range_are_refused(optimizer, argument, wrong, said):
    with pytest.raises(FedloraError) as caught:
        optimizer(**{argument: wrong})
    assert str(caught.value) == f"aggregator.{argument} must be {said}, got {wrong}."
