from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR, StepLR

from fedlora.errors import FedloraError
from fedlora.round_lr import RoundLR


def torchs(count, warmup, after):
    """The learning rates of torch's schedulers from a base of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    warm = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    scheduler = SequentialLR(optimizer, [warm, after(optimizer)], [warmup])
    rates = []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def factors(schedule, count, max_rounds):
    return [schedule.factor(idx, max_rounds) for idx in range(count)]


# Torch's cosine and its warm-up are recursive: they agree to rounding, not to the bit.
near = lambda values: pytest.approx(values, rel=1e-9, abs=1e-12)  # noqa: E731


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("given", [None, 15])
def test_cosine_is_torchs(warmup, floor, given):
    schedule = RoundLR("cosine", warmup, rounds=given, floor=floor)
    schedule.validate()
    expected = torchs(16, warmup, lambda o: CosineAnnealingLR(o, 15 - warmup, eta_min=floor))
    ours = factors(schedule, 16, 15 if given is None else 99)
    assert ours == near(expected)
    assert ours[warmup] == 1
    assert ours[15] == floor


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize(("every", "gamma"), [(1, 0.9), (4, 0.1), (5, 1.0)])
def test_step_is_torchs(warmup, every, gamma):
    schedule = RoundLR("step", warmup, every=every, gamma=gamma)
    schedule.validate()
    expected = torchs(20, warmup, lambda o: StepLR(o, every, gamma))
    assert factors(schedule, 20, 20) == near(expected)


def test_constant_is_one_after_the_warm_up():
    RoundLR().validate()
    assert factors(RoundLR(), 9, 5) == [1.0] * 9
    assert factors(RoundLR(warmup_rounds=3), 5, 5) == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("rounds", [None, 6])
def test_cosine_stays_at_its_floor(rounds):
    schedule = RoundLR("cosine", 2, rounds=rounds, floor=0.25)
    assert factors(schedule, 30, 6)[6:] == [0.25] * 24
    assert schedule.factor(5, 6) > 0.25


@pytest.mark.parametrize("max_rounds", [1, 3])
def test_a_run_may_be_over_before_the_warm_up(max_rounds):
    schedule = RoundLR("cosine", 3, floor=0.5)
    assert factors(schedule, 5, max_rounds) == [0.25, 0.5, 0.75, 0.5, 0.5]


schedules = st.one_of(
    st.builds(RoundLR, st.just("constant"), st.integers(0, 9)),
    st.builds(
        RoundLR,
        st.just("cosine"),
        st.integers(0, 9),
        st.none() | st.integers(10, 40),
        st.floats(0, 1),
    ),
    st.builds(
        RoundLR,
        st.just("step"),
        st.integers(0, 9),
        every=st.integers(1, 9),
        gamma=st.floats(0.01, 1),
    ),
)


@given(schedule=schedules, max_rounds=st.integers(1, 40))
def test_a_factor_rises_then_falls_and_is_a_share(schedule, max_rounds):
    schedule.validate()
    values = factors(schedule, 45, max_rounds)
    assert all(0 <= value <= 1 for value in values)
    peak = schedule.warmup_rounds
    assert values[:peak] == sorted(values[:peak])
    assert values[peak:] == sorted(values[peak:], reverse=True)


@given(schedule=schedules, begun=st.integers(1, 40), longer=st.integers(1, 40))
def test_a_pinned_horizon_keeps_the_factors_of_a_longer_run(schedule, begun, longer):
    pinned = schedule.horizon(begun)
    assert (pinned is None) == (schedule.schedule != "cosine")
    now = longer if pinned is None else pinned
    assert factors(schedule, 45, now) == factors(schedule, 45, begun)


def test_a_horizon_is_what_was_given_or_the_run():
    assert RoundLR("cosine").horizon(7) == 7
    assert RoundLR("cosine", rounds=9).horizon(7) == 9


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (RoundLR("linear"), "schedule must be one of constant, cosine, step, got linear."),
        (RoundLR(warmup_rounds=-1), "warmup_rounds must be at least 0, got -1."),
        (RoundLR("cosine", 3, rounds=3), "rounds must be above warmup_rounds=3, got 3."),
        (RoundLR("cosine", rounds=0), "rounds must be above warmup_rounds=0, got 0."),
        (RoundLR("cosine", floor=-0.1), "floor must be from 0 to 1, got -0.1."),
        (RoundLR("cosine", floor=1.5), "floor must be from 0 to 1, got 1.5."),
        (RoundLR("cosine", floor=math.nan), "floor must be from 0 to 1, got nan."),
        (RoundLR("step", every=0), "every must be at least 1, got 0."),
        (RoundLR("step", every=1, gamma=0.0), "gamma must be above 0 and at most 1, got 0.0."),
        (RoundLR("step", every=1, gamma=1.1), "gamma must be above 0 and at most 1, got 1.1."),
        (RoundLR("step", every=1, gamma=math.nan), "gamma must be above 0 and at most 1, got nan."),
        (RoundLR("step"), "every must be given with schedule=step"),
        (RoundLR(rounds=5), "rounds=5 belongs to schedule=cosine, the schedule is constant."),
        (RoundLR("step", floor=0.5, every=1), "floor=0.5 belongs to schedule=cosine"),
        (RoundLR("cosine", every=5), "every=5 belongs to schedule=step, the schedule is cosine."),
        (RoundLR(gamma=0.5), "gamma=0.5 belongs to schedule=step"),
    ],
)
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(FedloraError) as caught:
        wrong.validate()
    assert str(caught.value).startswith(f"trainer.round_lr.{message}")
