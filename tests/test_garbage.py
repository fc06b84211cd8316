from __future__ import annotations

import gc
from typing import Any

import pytest

from fedlora.callbacks.base import FederatedCallback
from fedlora.garbage import looking_at_new_objects_only
from tests.runs import fit


class Frozen(FederatedCallback):
    def __init__(self, error: type[BaseException] | None = None) -> None:
        self.error = error
        self.seen: list[int] = []

    def on_round_start(self, *args: Any) -> None:
        self.seen.append(gc.get_freeze_count())
        if self.error is not None:
            raise self.error


def test_what_was_there_is_left_alone_while_clients_train(tmp_path) -> None:
    frozen = Frozen()
    fit(tmp_path, max_rounds=2, callbacks=[frozen])
    assert len(frozen.seen) == 2
    assert min(frozen.seen) > 10_000
    assert gc.get_freeze_count() == 0


def test_after_an_error_it_is_looked_at_again(tmp_path) -> None:
    with pytest.raises(KeyError):
        fit(tmp_path, max_rounds=2, callbacks=[Frozen(KeyError)])
    assert gc.get_freeze_count() == 0


def test_what_the_program_froze_itself_stays_frozen() -> None:
    gc.freeze()
    try:
        before = gc.get_freeze_count()
        with looking_at_new_objects_only():
            new = [[] for _ in range(1000)]
            assert gc.get_freeze_count() <= before  # what is gone meanwhile does not count
        assert 0 < gc.get_freeze_count() <= before
        assert len(new) == 1000
    finally:
        gc.unfreeze()
