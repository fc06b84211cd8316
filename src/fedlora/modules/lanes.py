"""The adapters of several clients at once in one model, over its frozen weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedlora.errors import FedloraError
from fedlora.modules.clip_wrapper import CLIPLoRAWrapper
from fedlora.modules.dropout import Draws
from fedlora.modules.lane_memory import LaneMemory, Seat
from fedlora.modules.layers import Bound, LaneLinear, LaneNorm
from fedlora.sampling import derive_seed
from fedlora.state import AdapterState, Part


@dataclass(frozen=True)
class Place:
    """Where a parameter is used: ``role`` of ``layer``, which sees pictures or else prompts."""

    layer: Any
    role: str
    path: str
    sees_rows: bool


@dataclass(frozen=True)
class Ticket:
    """One lane's part of a step.

    Attributes:
        seat: which of the stack's adapters it trains.
        rows: pictures of its own in the batch, behind those of the lanes before it.
        key: what its dropout masks are drawn from, with ``number``.
        number: of its batch.
    """

    seat: int
    rows: int
    key: int
    number: int


class LaneStack:
    """Room for the adapters, heads and scalings of several clients, stacked by parameter.

    A client's values come and leave as a state: :meth:`put`, :meth:`take`. Between
    the two it has leaves and gradients of its own (``memory``), for an optimizer of its own, and
    any of the seats can share a step (:meth:`together`).

    Args:
        lora: the adapter in the model.
        seats: how many.
        kind: what clients' optimizers are, where that is known.

    Raises:
        FedloraError: for a parameter that lanes cannot have apart; :func:`why_not` says which.
    """

    def __init__(
        self, lora: CLIPLoRAWrapper, seats: int, kind: type[torch.optim.Optimizer] | None = None
    ) -> None:
        if reason := why_not(lora):
            raise FedloraError(f"trainer.lanes must be 1 here: {reason}.")
        self.lora = lora
        self.seats = seats
        self._places = dict(_places(lora))
        own = {
            f"{part}/{path}": parameter
            for part, parameters in lora.parameters.items()
            for path, parameter in parameters.items()
        }
        self.memory = LaneMemory(own, seats, kind)
        self._shapes = lora.shapes()
        self._scaling: list[dict[str, float]] = [dict(lora.scaling) for _ in range(seats)]

    def put(self, seat: int, state: AdapterState) -> Seat:
        """Let a seat have a state, and the model serve its residual."""
        room = self.memory.seats[seat]
        self.lora.load(state, room.every)
        self._scaling[seat] = dict(self.lora.scaling)
        room.clear()
        return room

    def take(self, seat: int) -> AdapterState:
        """What a seat has, with the scaling that it was put in with."""
        state = self.lora.as_state(self.memory.seats[seat].values(), self._shapes)
        return replace(state, scaling=dict(self._scaling[seat]))

    @contextmanager
    def together(self, tickets: Sequence[Ticket]) -> Iterator[None]:
        """Let the model compute with several seats at once; their gradients are theirs at the end.

        Args:
            tickets: the lanes, in the order in which their rows lie in the batch.
        """
        tensors, index = self.memory.chosen([ticket.seat for ticket in tickets])
        layers = [place.layer for place in self._places.values()]
        keys = [derive_seed(ticket.key, ticket.number) for ticket in tickets]
        rows = [ticket.rows for ticket in tickets]
        try:
            self._bind(tensors, tickets)
            self.lora.set_draws(Draws(keys, rows))
            self.lora.federated.lanes = Bound(rows=rows)
            yield
            self.memory.add_gradients(tensors, index)
        finally:
            for layer in layers:
                layer.lanes = None
            self.lora.federated.lanes = None
            self.lora.set_draws(None)

    def _bind(self, tensors: Mapping[str, Tensor], tickets: Sequence[Ticket]) -> None:
        """Give each layer its part."""
        of_layer: dict[int, tuple[Place, dict[str, Tensor]]] = {}
        for name, place in self._places.items():
            of_layer.setdefault(id(place.layer), (place, {}))[1][place.role] = tensors[name]
        for place, own in of_layer.values():
            rows = [ticket.rows if place.sees_rows else 1 for ticket in tickets]
            scales = [self._scaling[ticket.seat].get(place.path, 1.0) for ticket in tickets]
            place.layer.lanes = Bound(own, rows, scales)


def _places(lora: CLIPLoRAWrapper) -> Iterator[tuple[str, Place]]:
    """Name of a parameter -> where it is used, of those that a lane can have apart."""
    from fedlora.modules.adapted import AdaptedLinear

    for path, layer in lora.layers.items():
        if isinstance(layer, AdaptedLinear) and isinstance(layer.get_base_layer(), LaneLinear):
            for part in ("A", "B"):
                yield f"{part}/{path}", Place(layer, part, path, lora.sees_rows(path))
    holders = {
        id(parameter): (module, role)
        for module in lora.federated.modules()
        if isinstance(module, LaneLinear | LaneNorm)
        for role, parameter in module.named_parameters(recurse=False)
    }
    for path, parameter in lora.parameters["other"].items():
        if id(parameter) in holders:
            module, role = holders[id(parameter)]
            yield f"other/{path}", Place(module, role, path, lora.sees_rows(path))


def why_not(lora: CLIPLoRAWrapper) -> str:
    """Why the clients of this model cannot share a step; empty if they can."""
    if not lora.config.enabled:
        return "without LoRA (model.lora.enabled=false) clients have nothing frozen to share"
    known = dict(_places(lora))
    parts: Iterable[Part] = lora.parameters
    lacking = [
        f"{part}/{path}"
        for part in parts
        for path in lora.parameters[part]
        if f"{part}/{path}" not in known
    ]
    if lacking:
        return f"{lacking[0].partition('/')[2]} is trained, of which lanes cannot have one each"
    if lora.has_statistics():
        return "the model keeps running statistics, which clients would mix"
    return ""
