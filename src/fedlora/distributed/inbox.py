"""Waiting for other processes, and what they send while this one works."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor

from fedlora.distributed.messages import decode

T = TypeVar("T")
WAITING = "wait for another process"  # name of a thread


class UnderWay(Generic[T]):
    """Something that waits, in a thread of its own: a main thread in torch hears no signals.

    Args:
        wait: what it does.
    """

    def __init__(self, wait: Callable[[], T]) -> None:
        self._wait = wait
        self._result: list[T] = []
        self._raised: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, daemon=True, name=WAITING)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result.append(self._wait())
        except BaseException as error:  # the caller's
            self._raised.append(error)

    def result(self) -> T:
        """What came of it, once it is over; raises what it raised."""
        self._thread.join()
        if self._raised:
            raise self._raised[0]
        return self._result[0]


class Inbox:
    """The results that another process sends, of which the next ones arrive meanwhile.

    Args:
        receive: waits for a message, a list of results.
        count: results in all.

    Attributes:
        results: those that were taken out, for the caller to remove.
    """

    def __init__(self, receive: Callable[[], Tensor], count: int) -> None:
        self.results: deque[Any] = deque()
        self._receive = receive
        self._left = count
        self._coming = UnderWay(receive)

    def take(self) -> None:
        """Wait for the next message, and take its results out."""
        found = decode(self._coming.result())
        self.results.extend(found)
        self._left -= len(found)
        if self._left > 0:
            self._coming = UnderWay(self._receive)
