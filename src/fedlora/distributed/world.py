"""The processes of a run, seen from one of them."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, distributed

from fedlora.distributed.inbox import Inbox, UnderWay
from fedlora.distributed.messages import decode, encode
from fedlora.errors import ElsewhereError, FedloraError, LostError

if TYPE_CHECKING:
    from lightning.fabric import Fabric

T = TypeVar("T")
# Results that a process may keep until they are asked for, unless it is told otherwise, and their
# bytes: more would cost memory, fewer time.
AHEAD = 64
MOST = 2**28
BUNCH = 2**24  # bytes, about, of results that one message carries
POLL_S = 0.1


class World:
    """Every process of a run and this one's place among them; one process needs no messages.

    All must make the same calls in the same order. What is exchanged is on the CPU and goes over
    gloo, also between GPUs: it is small, and gloo notices at once when a process is gone.

    Args:
        rank: this process, from 0; rank 0 is the server.
        size: processes.
        machine: the machine that this one is on, from 0.
        is_first: whether it is the first of its machine.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, machine: int = 0, is_first: bool = True
    ) -> None:
        self.rank = rank
        self.size = size
        self.machine = machine
        self.is_first = is_first

    @classmethod
    def of(cls, fabric: Fabric) -> World:
        """The processes that Fabric has launched."""
        if fabric.world_size == 1:
            return cls()
        strategy: Any = fabric.strategy
        machine = strategy.cluster_environment.node_rank()
        return cls(fabric.global_rank, fabric.world_size, machine, fabric.local_rank == 0)

    @property
    def is_zero(self) -> bool:
        """Whether this is the server's process."""
        return self.rank == 0

    def share(self, make: Callable[[], Any]) -> Any:
        """Rank 0's value, on every rank.

        Args:
            make: called on rank 0 only; gives plain data, as
                :func:`~fedlora.distributed.messages.encode` takes it.
        """
        value = make() if self.is_zero else None
        if self.size == 1:
            return value
        message = encode(value) if self.is_zero else torch.empty(0, dtype=torch.uint8)
        length = torch.tensor([len(message)])
        self._broadcast(length)
        if not self.is_zero:
            message = torch.empty(int(length), dtype=torch.uint8)
        self._broadcast(message)
        return value if self.is_zero else decode(message)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        count = torch.tensor([int(flag)])
        self._wait(lambda: distributed.all_reduce(count, async_op=True))
        return bool(count)

    def once(self, what: str, work: Callable[[], object]) -> None:
        """Let the first process of each machine work; the others wait however long it takes.

        Args:
            what: is done then, in a word or two.
            work: called in the first process only.
        """
        key = f"fedlora/{what} on machine {self.machine}"
        if self.is_first:
            work()
            if self.size > 1:
                _store().set(key, "")
            return
        with self._listening():
            while not _store().check([key]):
                if (words := self.last_words()) is not None:
                    raise words
                time.sleep(POLL_S)

    def add_up(self, tensor: Tensor) -> None:
        """The sum over the ranks in the place of a tensor, on its own device."""
        if self.size == 1:
            return
        if tensor.device.type == "cpu":
            self._wait(lambda: distributed.all_reduce(tensor, async_op=True))
            return
        with self._listening():  # a GPU's is queued like any other work
            distributed.all_reduce(tensor)

    def in_order(
        self,
        owners: Sequence[int],
        compute: Callable[[int], T],
        pack: Callable[[T], Any] = lambda result: result,
        unpack: Callable[[int, Any], T] = lambda _, plain: plain,
        nbytes: Callable[[T], int] = lambda _: 0,
        ready: Callable[[], int] = lambda: 0,
        ahead: int = AHEAD,
    ) -> Iterator[T]:
        """Work spread over the ranks, its results in order on rank 0.

        Each rank computes what is its own, in order, and waits for nobody: what comes before its
        turn is kept, by whoever computed it, at most ``ahead`` results and, where that is more than
        one, :data:`MOST` bytes.

        Args:
            owners: the rank that computes each item.
            compute: called with the number of an item, on its owner.
            pack: a result as plain data.
            unpack: the number of an item and plain data -> the result.
            nbytes: of a result, as it is kept.
            ready: how many results are there already after the last one: they travel together.
            ahead: how many results may be kept.

        Yields:
            On rank 0 every result; elsewhere nothing, but the work is done while it is consumed.
        """
        mine = deque(number for number, owner in enumerate(owners) if owner == self.rank)
        if not self.is_zero:
            self._send(_bunches(mine, compute, pack, nbytes, ready), ahead)
            return
        kept: dict[int, tuple[T, int]] = {}
        inboxes = {
            rank: Inbox(partial(_message, rank), count)
            for rank, count in Counter(owners).items()
            if rank
        }

        def compute_next() -> None:
            item = mine.popleft()
            result = compute(item)
            kept[item] = result, nbytes(result)

        for number, owner in enumerate(owners):
            if owner == 0:
                if number not in kept:
                    compute_next()
                yield kept.pop(number)[0]
                continue
            if not inboxes[owner].results:
                # The other may be at it.
                while mine and _is_room((size for _, size in kept.values()), ahead):
                    compute_next()
                with self._listening():
                    inboxes[owner].take()
            yield unpack(number, inboxes[owner].results.popleft())

    def _send(self, bunches: Iterable[list[Any]], ahead: int) -> None:
        under_way: deque[tuple[Any, Any, Tensor]] = deque()
        for bunch in bunches:
            message = encode(bunch)
            with self._listening():
                size = distributed.isend(torch.tensor([len(message)]), 0)
                under_way.append((size, distributed.isend(message, 0), message))
            while not _is_room((message.nbytes for _, _, message in under_way), ahead):
                self._arrive(under_way)
        while under_way:
            self._arrive(under_way)

    def _arrive(self, under_way: deque[tuple[Any, Any, Tensor]]) -> None:
        size, content, _ = under_way.popleft()
        self._wait(lambda: size)
        self._wait(lambda: content)

    def _broadcast(self, tensor: Tensor) -> None:
        self._wait(lambda: distributed.broadcast(tensor, 0, async_op=True))

    def _wait(self, begin: Callable[[], Any]) -> None:
        with self._listening():
            UnderWay(begin().wait).result()

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Turn what gloo and NCCL say of a process that is gone into our own error."""
        try:
            yield
        except RuntimeError as error:
            late = "timed out" in str(error).lower() or "timeout" in str(error).lower()
            raise LostError(
                "another process of the run did not answer in time (trainer.timeout)"
                if late
                else "another process of the run is gone"
            ) from error

    # What one says of its end, for those who notice that it is gone.

    def report(self, error: BaseException) -> ElsewhereError | None:
        """Tell rank 0 why this process ends; None where nobody can be told."""
        text = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, ValueError):
            text = f"{type(error).__name__}: {text}"
        try:
            _store().set(_key(self.rank), text)
        except (RuntimeError, ValueError):  # rank 0 keeps the store and is gone
            return None
        return ElsewhereError(f"rank {self.rank}: {text}")

    def last_words(self) -> FedloraError | None:
        """What a rank said before it ended."""
        try:
            for rank in range(self.size):
                if _store().check([_key(rank)]):
                    return FedloraError(f"rank {rank}: {_store().get(_key(rank)).decode()}")
        except (RuntimeError, ValueError):  # gone, or never there
            pass
        return None


def _bunches(
    numbers: deque[int],
    compute: Callable[[int], T],
    pack: Callable[[T], Any],
    nbytes: Callable[[T], int],
    ready: Callable[[], int],
) -> Iterator[list[Any]]:
    """Results, packed, that are there at the same time."""
    while numbers:
        bunch: list[Any] = []
        size = 0
        while numbers and (not bunch or (ready() and size < BUNCH)):
            result = compute(numbers.popleft())
            size += nbytes(result)
            bunch.append(pack(result))
        yield bunch


def _is_room(sizes: Iterable[int], ahead: int) -> bool:
    kept = list(sizes)
    return not kept or (len(kept) < ahead and sum(kept) < MOST)


def _message(rank: int) -> Tensor:
    length = torch.zeros(1, dtype=torch.int64)
    distributed.recv(length, rank)
    message = torch.empty(int(length), dtype=torch.uint8)
    distributed.recv(message, rank)
    return message


def _key(rank: int) -> str:
    return f"fedlora/end of rank {rank}"


def _store() -> Any:
    # The store that the processes found each other by: it answers when all else is broken.
    return distributed.distributed_c10d._get_default_store()
