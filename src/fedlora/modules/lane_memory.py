"""The values and gradients of several clients, each client's side by side in a row of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from fedlora.flat import joined

# Their updates work entry by entry, and have the same bits wherever in a tensor an entry is: those
# of SGD, where it is fused, have not.
ENTRY_BY_ENTRY = (torch.optim.Adam, torch.optim.AdamW)

ByType: TypeAlias = Mapping[torch.dtype, Tensor]
MakeGroups: TypeAlias = Callable[[Mapping[str, nn.Parameter]], list[dict[str, Any]]]


class Span(NamedTuple):
    """Where in a row a parameter lies."""

    dtype: torch.dtype
    first: int
    last: int

    def of(self, rows: ByType, *shape: int) -> Tensor:
        """Its part of rows (…, entries), as (…, *shape); not a copy."""
        part = rows[self.dtype][..., self.first : self.last]
        return part.view((*part.shape[:-1], *shape))


class LaneMemory:
    """Room for what several clients train, with their gradients.

    Args:
        own: name -> the model's own parameter.
        seats: how many clients.
        kind: what their optimizers are, where that is known.

    Attributes:
        seats: the room of each.
    """

    def __init__(
        self,
        own: Mapping[str, nn.Parameter],
        seats: int,
        kind: type[torch.optim.Optimizer] | None = None,
    ) -> None:
        self.own = own
        self.joins = kind in ENTRY_BY_ENTRY
        self.spans = dict(_spans(own))
        self._rows, self._gradients = self._make_rows(seats), self._make_rows(seats)
        self.seats = [
            Seat(self, _row(self._rows, seat), _row(self._gradients, seat)) for seat in range(seats)
        ]
        # Names that a backward pass came to. What none comes to has no gradient, as without lanes:
        # an optimizer then passes it over.
        self.reached: set[str] = set()

    def _make_rows(self, seats: int) -> ByType:
        sizes = {span.dtype: span.last for span in self.spans.values()}
        device = next(iter(self.own.values())).device
        return {
            dtype: torch.zeros(seats, size, dtype=dtype, device=device)
            for dtype, size in sizes.items()
        }

    def chosen(self, seats: Sequence[int]) -> tuple[dict[str, Tensor], Tensor | None]:
        """What a pass computes with.

        Args:
            seats: whose, in this order.

        Returns:
            Name -> their values, (lanes, …), a leaf where it is trained; and the seats as an index,
            None where they are all of them in their order.
        """
        index, rows = None, self._rows
        if list(seats) != list(range(len(self.seats))):
            index = torch.tensor(seats, device=next(iter(rows.values())).device)
            rows = {dtype: each.index_select(0, index) for dtype, each in rows.items()}
        values = {
            name: self.spans[name].of(rows, *own.shape).detach().requires_grad_(own.requires_grad)
            for name, own in self.own.items()
        }
        return values, index

    def add_gradients(self, values: Mapping[str, Tensor], index: Tensor | None) -> None:
        """Add to each seat's gradients what a pass left at what :meth:`chosen` gave."""
        for name, value in values.items():
            if value.grad is None:
                continue
            if name not in self.reached:
                self.reached.add(name)
                for seat in self.seats:
                    seat.reach(name)
            into = self.spans[name].of(self._gradients, *self.own[name].shape)
            if index is None:
                into.add_(value.grad)
            else:
                into.index_add_(0, index, value.grad)


class Seat:
    """A client's room.

    Args:
        memory: which it is a part of.
        values: its row of each type.
        gradients: likewise.

    Attributes:
        every: what may be trained, by name.
    """

    def __init__(self, memory: LaneMemory, values: ByType, gradients: ByType) -> None:
        self.memory = memory
        self._values, self._gradients = values, gradients
        self._of_name: dict[str, Tensor] = {}  # gradients, where passes come to
        self._of_span: dict[Span, nn.Parameter] = {}
        self._groups: tuple[Any, list[dict[str, Any]]] | None = None
        self.every = {
            name: nn.Parameter(memory.spans[name].of(values, *own.shape))
            for name, own in memory.own.items()
        }

    def clear(self) -> None:
        """Have no gradients."""
        self.forget_gradients()
        for name, leaf in self.every.items():
            leaf.grad = self._of_name.get(name)  # whatever one that broke off has put there

    @torch.no_grad()
    def values(self) -> Tensor:
        """A copy of all values end to end, in the order of their names; float32, on the CPU."""
        if len(self._values) > 1:  # types
            return joined(leaf.to(torch.float32) for leaf in self.every.values()).cpu()
        (row,) = self._values.values()
        return row.to("cpu", torch.float32, copy=True)

    def leaves(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {n: self.every[n] for n, own in self.memory.own.items() if own.requires_grad}

    def reach(self, name: str) -> None:
        """Give a parameter room for gradients."""
        leaf = self.every[name]
        leaf.grad = self._of_name[name] = self.memory.spans[name].of(self._gradients, *leaf.shape)

    def forget_gradients(self) -> None:
        """Get ready for the next step."""
        for row in self._gradients.values():
            row.zero_()

    def settle_gradients(self) -> None:
        """Take over what somebody put in the place of gradients."""
        for name, own in self._of_name.items():
            leaf = self.every[name]
            if leaf.grad is not own:
                own.zero_() if leaf.grad is None else own.copy_(leaf.grad)
                leaf.grad = own

    def groups(self, make: MakeGroups) -> list[dict[str, Any]]:
        """The groups of a fresh optimizer of :meth:`leaves`.

        What lies side by side in a group is one parameter, where that comes to the same: what a
        step of many small tensors takes depends on their number, not on their sizes.

        Args:
            make: what is trained, by name -> its groups; the same ones for all clients.
        """
        leaves = self.leaves()
        key = (frozenset(leaves), len(self._of_name))
        if self._groups is None or self._groups[0] != key:
            groups = make(leaves)
            if self.memory.joins:
                names = {id(leaf): name for name, leaf in leaves.items()}
                groups = [
                    group | {"params": list(self._joined(group["params"], names))}
                    for group in groups
                ]
            self._groups = key, groups
        # An optimizer edits what it is given.
        return [group | {"params": list(group["params"])} for group in self._groups[1]]

    def _joined(
        self, parameters: Iterable[nn.Parameter], names: Mapping[int, str]
    ) -> Iterator[nn.Parameter]:
        spans: list[Span] = []
        for parameter in parameters:
            name = names[id(parameter)]
            if name not in self._of_name:  # it may have to be passed over
                yield parameter
                continue
            own = self.memory.spans[name]
            if spans and (spans[-1].dtype, spans[-1].last) == (own.dtype, own.first):
                spans[-1] = spans[-1]._replace(last=own.last)
            else:
                spans.append(own)
        yield from map(self._as_one, spans)

    def _as_one(self, span: Span) -> nn.Parameter:
        if span not in self._of_span:
            self._of_span[span] = nn.Parameter(span.of(self._values, -1))
            self._of_span[span].grad = span.of(self._gradients, -1)
        return self._of_span[span]


def _row(rows: ByType, seat: int) -> ByType:
    return {dtype: each[seat] for dtype, each in rows.items()}


def _spans(own: Mapping[str, Tensor]) -> Iterator[tuple[str, Span]]:
    ends: dict[torch.dtype, int] = {}
    for name, parameter in own.items():
        first = ends.get(parameter.dtype, 0)
        ends[parameter.dtype] = first + parameter.numel()
        yield name, Span(parameter.dtype, first, ends[parameter.dtype])
