from __future__ import annotations

import pytest
from jsonargparse import ArgumentParser

from fedlora import aggregation
from fedlora.aggregation import (
    RULES,
    WRAPPERS,
    Aggregator,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedExLoRA,
    FFALoRA,
    HetLoRA,
    LocalHead,
    RoLoRA,
    ServerOptimizer,
    Wrapper,
)
from fedlora.state import AdapterState, Client
from fedlora.testing import check_aggregator
from tests.aggregation.rule_builders import ROUND

STATE, CLIENT = AdapterState(), Client(0, 1)
CALLS = {
    "start": (STATE, {}, ROUND),
    "distribute": (STATE, CLIENT, ROUND),
    "receive": (STATE, STATE, ROUND),
    "trainable": (ROUND,),
    "shared": (ROUND,),
    "private": (ROUND,),
    "stays": (STATE, ROUND),
    "upload": (STATE, STATE, CLIENT, ROUND),
    "aggregate": (STATE, [], ROUND),
}


@pytest.mark.parametrize("method", CALLS)
def test_every_method_is_the_rules(method):
    asked, answer = [], object()

    def says(self, *arguments):
        asked.append(arguments)
        return answer

    rule = type("Says", (FedAvg,), {method: says})()
    assert getattr(Wrapper(Wrapper(rule)), method)(*CALLS[method]) is answer
    assert asked == [CALLS[method]]


def test_no_method_of_a_rule_is_left_out():
    methods = {name for name in vars(Aggregator) if callable(getattr(Aggregator, name))}
    assert {name for name in methods if name[0] != "_"} == {
        *CALLS,
        "state_dict",
        "load_state_dict",
    }


@pytest.mark.parametrize("rule", [FedAvg(), FFALoRA(), FedExLoRA(), HetLoRA()])
def test_promises_are_the_rules(rule):
    wrapper = Wrapper(Wrapper(rule))
    for promise in ("exact", "mixed_ranks", "factors"):
        assert getattr(wrapper, promise) == getattr(rule, promise)


def test_without_a_rule_it_is_fedavg():
    assert type(Wrapper().rule) is FedAvg


def test_the_name_says_what_is_in_it():
    wrapper = FedAdam(LocalHead(FFALoRA()))
    assert FFALoRA().name == "FFALoRA"
    assert str(wrapper) == wrapper.name == "FedAdam(LocalHead(FFALoRA))"


def test_the_state_is_the_rules_beside_its_own():
    class Counts(FedAvg):
        count = 0

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    rule, other = Counts(), Counts()
    rule.count = 3
    state = FedAvgM(Wrapper(rule)).state_dict()
    assert state == {"rule": {"rule": {"count": 3}}, "memory": {}}
    FedAvgM(Wrapper(other)).load_state_dict(state)
    assert other.count == 3


def test_a_wrapper_alone_keeps_the_rules_promises():
    check_aggregator(lambda: Wrapper(RoLoRA()), examples=2)


def test_wrappers_are_public_and_no_rules():
    assert len(RULES) == 14
    for name, wrapper in WRAPPERS.items():
        assert getattr(aggregation, name) is wrapper
        assert name not in RULES
        assert name in aggregation.__all__
    made = {Wrapper}
    for kind in (Wrapper, ServerOptimizer, *WRAPPERS.values()):
        made |= {sub for sub in kind.__subclasses__() if sub.__module__.startswith("fedlora.")}
    assert made - {Wrapper, ServerOptimizer} == set(WRAPPERS.values())


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--rule=FedAdam", "--rule.lr=0.5"], "FedAdam(FedAvg)"),
        (["--rule=FedAvgM", "--rule.rule=FFALoRA"], "FedAvgM(FFALoRA)"),
        (
            ["--rule=FedYogi", "--rule.rule=LocalHead", "--rule.rule.rule=RoLoRA"],
            "FedYogi(LocalHead(RoLoRA))",
        ),
        (["--rule=Local", "--rule.keep=[A/*, other/bias]"], "Local(FedAvg)"),
    ],
)
def test_the_command_line_makes_them(arguments, name):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--rule", type=Aggregator)
    rule = parser.instantiate(parser.parse_args(arguments)).rule
    assert rule.name == name
    assert getattr(rule, "lr", 0.5) in (0.5, 1.0, 0.01)
    assert getattr(rule, "keep", None) in (None, ["A/*", "other/bias"])
