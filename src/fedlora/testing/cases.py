"""The federations that rules are tried on: drawn by hypothesis, small and odd on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedlora.state import AdapterState, Client

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Case:
    """One federation.

    Attributes:
        seed: of all values.
        layers: (out_features, in_features, scaling of the server) of each adapted layer.
        rank: of the server, the largest that a client has; may be larger than a layer.
        clients: with samples (0 too), ranks and scales.
        rounds: rounds played before the one that is looked at.
        step: how far a client's training moves it.
        dtype: of every tensor.
    """

    seed: int
    layers: tuple[tuple[int, int, float], ...]
    rank: int
    clients: tuple[Client, ...]
    rounds: int
    step: float
    dtype: torch.dtype

    def __str__(self) -> str:
        """In one line, for messages."""
        layers = ", ".join(f"{rows}x{columns} scaled {s:g}" for rows, columns, s in self.layers)
        clients = ", ".join(
            f"(n {client.num_samples}, rank {client.rank or self.rank}, scale {client.scale:g})"
            for client in self.clients
        )
        return (
            f"seed {self.seed}; layers {layers}; rank {self.rank}; clients {clients}; "
            f"{self.rounds} rounds before; steps of {self.step:g}; {self.dtype}"
        )

    def equal(self) -> Case:
        """The same with all clients of the rank and scale of the first."""
        first = self.clients[0]
        clients = [replace(c, rank=first.rank, scale=first.scale) for c in self.clients]
        return replace(self, clients=tuple(clients))

    def draw(self, *shape: int, key: Sequence[int]) -> Tensor:
        """Normal values of this type, a function of the seed and the key."""
        values = np.random.default_rng([self.seed, *key]).standard_normal(shape)
        return torch.from_numpy(np.asarray(values)).to(self.dtype)

    def base(self) -> dict[str, Tensor]:
        """The frozen weight of each layer."""
        return {
            f"layer{number}": self.draw(rows, columns, key=(1, number))
            for number, (rows, columns, _) in enumerate(self.layers)
        }

    def start(self) -> AdapterState:
        """A new adapter: B is zero."""
        names = [f"layer{number}" for number in range(len(self.layers))]
        sizes = list(zip(names, self.layers, strict=True))
        return AdapterState(
            A={
                name: self.draw(self.rank, columns, key=(2, number)) * columns**-0.5
                for number, (name, (_, columns, _)) in enumerate(sizes)
            },
            B={
                name: torch.zeros(rows, self.rank, dtype=self.dtype) for name, (rows, _, _) in sizes
            },
            other={
                "classifier.weight": self.draw(2, 3, key=(3,)),
                "logit_scale": self.draw(key=(4,)),
                "norm.weight": self.draw(3, key=(7,)),
            },
            scaling={name: scaling for name, (_, _, scaling) in sizes},
        )

    def players(self, idx: int) -> tuple[Client, ...]:
        """Who plays in a round: some of all in the rounds before, all in the one looked at."""
        if idx >= self.rounds:
            return self.clients
        here = np.random.default_rng([self.seed, 5, idx]).random(len(self.clients)) < 0.7
        chosen = tuple(c for c, plays in zip(self.clients, here, strict=True) if plays)
        return chosen or self.clients[:1]


def cases(mixed: bool) -> SearchStrategy[Case]:
    """What hypothesis draws from; clients differ in rank and scale where ``mixed``.

    Only booleans are drawn: for numbers hypothesis also tries constants that it finds in the user's
    modules, so the examples would depend on what is imported, and files be written beside them.
    """
    from hypothesis import strategies as st

    flag = st.booleans()

    @st.composite
    def case(draw: st.DrawFn) -> Case:
        def pick(options: Sequence[Choice]) -> Choice:
            """One of these; shrinks to the first, so the bits that count most come first."""
            places = reversed(range((len(options) - 1).bit_length()))
            return options[sum(draw(flag) << place for place in places) % len(options)]

        # Each first option is one that shows something: hypothesis draws many of them.
        rank = pick((2, 1, 3, 4))
        count = pick((2, 3, 1, 4, 5, 6))
        samples = [pick((number + 1, 2, 50, 0, 3, 1000)) for number in range(count)]
        clients = [
            Client(
                id=number,
                num_samples=held if any(samples) else 1,
                rank=pick(range(1, rank + 1)) if mixed else pick((rank, 0)),
                scale=pick((1.0, 2.0, 0.5, 1.7)) if mixed else 1.0,
            )
            for number, held in enumerate(samples)
        ]
        rows, columns = (3, 4, 1, 5, 2, 6, 7, 8), (4, 3, 1, 5, 2, 6, 7, 8)
        return Case(
            seed=pick(range(16)),
            layers=tuple(
                (pick(rows), pick(columns), pick((1.0, 2.0, 0.5, 4.0))) for _ in range(pick((1, 2)))
            ),
            rank=rank,
            clients=tuple(clients),
            rounds=pick((1, 0, 2, 3)),
            step=pick((0.5, 0.5, 0.5, 0.01)),
            dtype=pick((torch.float32, torch.float64)),
        )

    return case()
