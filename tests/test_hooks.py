from __future__ import annotations

import inspect

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback, Timer

from fedlora.callbacks.base import FederatedCallback
from fedlora.errors import FedloraError
from fedlora.hooks import Hooks


class Trainer:
    """What a callback sees of a trainer; it has little."""

    should_stop = False


class Greedy(Callback):
    def on_train_start(self, trainer, pl_module):
        trainer.strategy.barrier()


class Noting(FederatedCallback):
    def __init__(self, notes, name):
        self.notes, self.name = notes, name

    def on_round_end(self, trainer, pl_module, row):
        self.notes.append((self.name, type(trainer), pl_module, row))


def test_callbacks_are_called_in_their_order_with_all_arguments():
    notes = []
    hooks = Hooks([Noting(notes, "one"), Noting(notes, "two")])
    hooks("on_round_end", Trainer(), "module", {"round": 1})
    assert notes == [
        ("one", Trainer, "module", {"round": 1}),
        ("two", Trainer, "module", {"round": 1}),
    ]


HOOKS = [
    name
    for name, value in vars(FederatedCallback).items()
    if name.startswith("on_") and inspect.isfunction(value)
]


@pytest.mark.parametrize("hook", [*HOOKS, "on_train_epoch_start", "setup", "teardown"])
def test_a_hook_that_nobody_overrides_is_not_called(hook, monkeypatch):
    def never(*_):
        raise AssertionError("called")

    for cls in (Callback, FederatedCallback):
        if hasattr(cls, hook):
            monkeypatch.setattr(cls, hook, never)
    Hooks([Callback(), FederatedCallback(), Greedy()])(hook, Trainer(), None, None)


def test_there_are_hooks_of_a_federation():
    assert {"on_round_start", "on_client_start", "on_client_end", "on_aggregate"} < set(HOOKS)


def test_a_callback_of_lightning_has_no_rounds():
    notes = []
    Hooks([Callback(), Noting(notes, "x")])("on_round_end", Trainer(), None, {})
    assert len(notes) == 1


def test_an_inherited_hook_is_called():
    class Child(Noting):
        pass

    notes = []
    Hooks([Child(notes, "x")])("on_round_end", Trainer(), None, {})
    assert len(notes) == 1


def test_hooks_of_a_lambda_callback_are_called():
    notes = []
    hooks = Hooks([LambdaCallback(on_train_epoch_end=lambda *args: notes.append(args))])
    hooks("on_train_epoch_end", "trainer", "module")
    hooks("on_train_epoch_start", "trainer", "module")
    assert notes == [("trainer", "module")]


# What a callback may not find.


def refusal(callback, hook, *args):
    with pytest.raises(FedloraError) as caught:
        Hooks([callback])(hook, Trainer(), None, *args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_attribute_is_one_line_that_names_both():
    message = refusal(Greedy(), "on_train_start")
    assert message.startswith("the callback Greedy needs trainer.strategy in on_train_start, ")
    assert "Leave that callback out, or use it with lightning.Trainer." in message


def test_a_callback_of_lightning_that_needs_more_than_there_is():
    timer = Timer(duration="00:00:00:01")
    message = refusal(timer, "on_fit_start")
    assert message.startswith("the callback Timer needs trainer.")


def test_a_fault_of_the_callbacks_own_passes_as_it_is():
    class Faulty(Callback):
        def on_train_start(self, trainer, pl_module):
            self.nothing.at_all()

        def on_train_end(self, trainer, pl_module):
            raise AttributeError("said by hand")

    hooks = Hooks([Faulty()])
    with pytest.raises(AttributeError, match="nothing"):
        hooks("on_train_start", Trainer(), None)
    with pytest.raises(AttributeError, match="said by hand"):
        hooks("on_train_end", Trainer(), None)


# Their state.


class Counting(Callback):
    def __init__(self, count=0):
        self.count = count

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]


def test_the_state_of_callbacks_goes_there_and_back():
    state = Hooks([Counting(5), Callback()]).state_dict()
    assert state == {"Counting": {"count": 5}}
    fresh = Counting()
    Hooks([Callback(), fresh]).load_state_dict(state)
    assert fresh.count == 5


def test_a_callback_that_was_not_saved_keeps_its_state():
    fresh = Counting(2)
    Hooks([fresh]).load_state_dict({"Another": {"count": 5}})
    assert fresh.count == 2
