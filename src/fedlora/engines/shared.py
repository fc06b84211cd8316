"""Plays several clients of a round at once, which share their steps."""

from __future__ import annotations

import itertools
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedlora.engines.lane import Lane
from fedlora.engines.turn import Course, Start, Turn
from fedlora.personal import Kept
from fedlora.state import Client, ClientUpdate

if TYPE_CHECKING:
    from fedlora.engines.local import LocalLoop

AHEAD = 16  # clients that may be done before an earlier one is


@dataclass
class Playing:
    """A client that has a seat.

    Attributes:
        number: its place in the order.
        start: where it starts from.
        seat: its own; None is the model itself.
        course: its turn, as it goes on.
        lane: what it trains now.
    """

    number: int
    start: Start
    seat: int | None
    course: Course
    lane: Lane | None = None


class SharedSteps:
    """Lets clients take seats as these become free, and all that sit take their steps together.

    A client's steps are those that it takes alone, whoever sits beside it; one that is done leaves
    its seat to the next. Of clients whose frozen weights are served with another residual none sits
    down before all others are done.

    Args:
        loop: the local loop; without a stack there is one seat, the model itself.
        on_start: called before a client starts.
        get_start: what a client starts from.
        begin: its turn on a seat.
        conclude: what comes of a turn that ended.
        left_out: what comes of one that raised an error, which it raises itself where that ends
            the round.
    """

    def __init__(
        self,
        loop: LocalLoop,
        on_start: Callable[[Client], None],
        get_start: Callable[[Client], Start],
        begin: Callable[[Start, int | None], Course],
        conclude: Callable[[Client, tuple[ClientUpdate, Kept]], Turn],
        left_out: Callable[[Exception], Turn],
    ) -> None:
        self.loop = loop
        self.on_start = on_start
        self.get_start = get_start
        self.begin = begin
        self.conclude = conclude
        self.left_out = left_out
        self._free: list[int | None] = [None]
        if loop.stack is not None:
            self._free = list(range(loop.stack.seats))
        self._playing: list[Playing] = []
        self._done: dict[int, Turn] = {}
        self._next = 0  # whose turn is asked for next

    def ready(self) -> int:
        """How many turns are over that were not asked for yet, without gaps."""
        return next(i for i in itertools.count() if self._next + i not in self._done)

    def turns(self, clients: Sequence[Client]) -> Iterator[Turn]:
        """What comes of each client's turn, in their order."""
        waiting = deque(enumerate(clients))
        ready: list[Start] = []
        try:
            for number in range(len(clients)):
                while number not in self._done:
                    self._seat(waiting, ready)
                    self._advance()
                self._next = number + 1
                yield self._done.pop(number)
        finally:
            for each in self._playing:
                each.course.close()

    def _seat(self, waiting: deque[tuple[int, Client]], ready: list[Start]) -> None:
        """Let the next clients sit down, as far as there is room."""
        while waiting and self._free and len(self._done) < AHEAD:
            number, client = waiting[0]
            if not ready:
                self.on_start(client)
            try:
                start = ready.pop() if ready else self.get_start(client)
            except Exception as error:
                self._done[number] = self.left_out(error)
                waiting.popleft()
                continue
            if self._playing and not self.loop.lora.served.is_serving(start.state.residual):
                ready.append(start)
                return
            waiting.popleft()
            seat = self._free.pop(0)
            self._go_on(Playing(number, start, seat, self.begin(start, seat)))

    def _advance(self) -> None:
        """A step of all, and what is due after it."""
        if not self._playing:
            return
        failed = self._step()
        if failed is not None:
            self._apart(failed)
            return
        for each in list(self._playing):
            if each.lane is not None and not each.lane.left:
                self._playing.remove(each)
                self._go_on(each)

    def _step(self) -> Exception | None:
        """A step of all; the error that it raised."""
        try:
            self.loop.step([each.lane for each in self._playing if each.lane is not None])
        except Exception as error:
            return _without_frames(error)
        return None

    def _go_on(self, each: Playing) -> None:
        """Let a client go on to its next step, or to its end."""
        try:
            each.lane = _next_lane(each.course)
        except StopIteration as end:
            self._rise(each, self.conclude(each.start.client, end.value))
        except Exception as error:
            self._rise(each, self.left_out(_without_frames(error)))
        else:
            self._playing.append(each)
            self._playing.sort(key=lambda other: other.seat or 0)

    def _rise(self, each: Playing, turn: Turn) -> None:
        self._done[each.number] = turn
        self._free = sorted([*self._free, each.seat], key=lambda seat: seat or 0)

    def _apart(self, error: Exception) -> None:
        """After an error in a shared step, find whose it is: each plays alone, from its start."""
        playing, self._playing = self._playing, []
        if len(playing) == 1:
            self._rise(playing[0], self.left_out(error))
            return
        self.left_out(error)  # which ends the round where errors do
        for each in playing:
            each.course.close()
        for each in playing:
            try:
                result = self._alone(self.begin(each.start, each.seat))
            except Exception as own:
                self._rise(each, self.left_out(_without_frames(own)))
            else:
                self._rise(each, self.conclude(each.start.client, result))

    def _alone(self, course: Course) -> tuple[ClientUpdate, Kept]:
        """A turn from start to end."""
        result: tuple[ClientUpdate, Kept]
        try:
            while True:
                lane = _next_lane(course)
                while lane.left:
                    self.loop.step([lane])
        except StopIteration as end:
            result = end.value
        return result


def _next_lane(course: Course) -> Lane:
    """The next lane of a turn that has steps to take."""
    lane = next(course)
    while not lane.left:
        lane = next(course)
    return lane


def _without_frames(error: Exception) -> Exception:
    """An error without what its frames hold: a batch, and all that was computed of it."""
    traceback.clear_frames(error.__traceback__)
    return error
