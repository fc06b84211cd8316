from __future__ import annotations

import threading
from typing import Any

import pytest
from torch import Tensor

from fedlora.distributed.inbox import WAITING, Inbox, UnderWay
from fedlora.distributed.messages import encode


def test_something_under_way_has_a_result() -> None:
    go_on, seen = threading.Event(), []

    def wait() -> int:
        seen.append(threading.current_thread().name)
        go_on.wait(10)
        return 3

    under_way = UnderWay(wait)  # it does not wait for it
    go_on.set()
    assert under_way.result() == 3
    assert seen == [WAITING]


def test_what_it_raised_is_raised_where_it_is_waited_for() -> None:
    def fail() -> None:
        raise KeyError("lost")

    under_way = UnderWay(fail)
    with pytest.raises(KeyError, match="lost"):
        under_way.result()


def test_the_next_message_comes_before_it_is_asked_for() -> None:
    messages, asked = [["a", "b"], ["c"], ["never"]], threading.Semaphore(0)

    def receive() -> Tensor:
        asked.release()
        return encode(messages.pop(0))

    inbox = Inbox(receive, 3)
    assert asked.acquire(timeout=10)  # nothing was taken out yet
    inbox.take()
    assert list(inbox.results) == ["a", "b"]
    assert asked.acquire(timeout=10)
    inbox.results.clear()
    inbox.take()
    assert list(inbox.results) == ["c"]
    # All came: it listens no more.
    assert not asked.acquire(timeout=0.2)
    assert messages == [["never"]]


def test_an_error_on_the_way_comes_with_the_message() -> None:
    def receive() -> Any:
        raise RuntimeError("Connection closed by peer")

    inbox = Inbox(receive, 1)
    with pytest.raises(RuntimeError, match="closed by peer"):
        inbox.take()
