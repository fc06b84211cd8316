"""Plain data that flows through a round: adapters, residuals, clients and what they send."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

Part = Literal["A", "B", "other"]
PARTS: frozenset[Part] = frozenset({"A", "B", "other"})


@dataclass(frozen=True)
class Round:
    """All that a rule may know about now.

    Attributes:
        idx: rounds completed before this one, from 0.
        seed: the seed of the run.
        num_clients: clients in the federation.
        cohort: clients that play in this round.
    """

    idx: int
    seed: int = 0
    num_clients: int = 1
    cohort: int = 1


@dataclass(frozen=True)
class Client:
    """A participant.

    Attributes:
        id: its number, from 0.
        num_samples: rows it trains on.
        rank: the LoRA rank that it trains (0: that of the server).
        name: what users call it ("site_a"); empty where it has only a number.
        scale: its lora_alpha / rank in units of the server's.
        last_round: the last round before this one in which it was sent anything; None: never.
    """

    id: int
    num_samples: int
    rank: int = 0
    name: str = ""
    scale: float = 1.0
    last_round: int | None = None

    def __str__(self) -> str:
        """As it is named in messages."""
        return f"client {self.id}" + (f" ({self.name})" if self.name else "")


@dataclass(frozen=True)
class Residual:
    """A change of a frozen weight that is served beside the factors; already scaled.

    Either thin, ``U @ V`` with U (out_features, k) and V (k, in_features), or dense, U
    (out_features, in_features) and V None: whichever is smaller.
    """

    U: Tensor
    V: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that it takes to send."""
        return self.U.nbytes + (0 if self.V is None else self.V.nbytes)

    def dense(self) -> Tensor:
        """The change as a matrix (out_features, in_features)."""
        return self.U if self.V is None else self.U @ self.V

    def to(self, dtype: torch.dtype) -> Residual:
        """The same residual in another floating-point type."""
        return Residual(self.U.to(dtype), None if self.V is None else self.V.to(dtype))

    def add(self, other: Residual) -> Residual:
        """The sum, thin while that is the smaller form."""
        if self.V is not None and other.V is not None:
            thin = Residual(torch.cat([self.U, other.U], 1), torch.cat([self.V, other.V], 0))
            if thin.U.shape[1] * sum(self.shape) < self.shape[0] * self.shape[1]:
                return thin
        return Residual(self.dense() + other.dense())

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.U.shape[0], (self.U if self.V is None else self.V).shape[1]


@dataclass(frozen=True)
class AdapterState:
    """An adapter on the CPU in float32; may be partial: what does not travel is absent.

    Attributes:
        A: module path as in ``CLIPModel`` -> (rank, in_features).
        B: module path -> (out_features, rank).
        other: head, biases, logit scale, buffers: parameter path -> tensor.
        scaling: module path -> lora_alpha / rank of this adapter.
        residual: module path -> change of the weight served beside the factors.
        added: module path -> what the last round added to ``residual``, or what of that must
            travel to a client that has the residual before; never served by itself.
    """

    A: Mapping[str, Tensor] = field(default_factory=dict)
    B: Mapping[str, Tensor] = field(default_factory=dict)
    other: Mapping[str, Tensor] = field(default_factory=dict)
    scaling: Mapping[str, float] = field(default_factory=dict)
    residual: Mapping[str, Residual] = field(default_factory=dict)
    added: Mapping[str, Residual] = field(default_factory=dict)

    def part(self, part: Part) -> Mapping[str, Tensor]:
        """The tensors of one part."""
        return {"A": self.A, "B": self.B, "other": self.other}[part]

    def only(self, parts: Iterable[Part]) -> AdapterState:
        """The named parts; neither the others nor the residual nor what was added to it."""
        kept = frozenset(parts)
        if kept >= PARTS and not self.residual and not self.added:
            return self
        return replace(
            self,
            A=self.A if "A" in kept else {},
            B=self.B if "B" in kept else {},
            other=self.other if "other" in kept else {},
            residual={},
            added={},
        )

    def cut(self, rank: int, scale: float = 1.0) -> AdapterState:
        """The first ``rank`` slots of the factors, which serve the same at another scaling.

        Args:
            rank: rows of A and columns of B to keep; 0, or more than there are, keeps all.
            scale: the new scaling in units of this one; B is divided by it.
        """
        if scale == 1.0 and (not rank or all(rank >= own for own in self.ranks.values())):
            return self
        B = {name: tensor[:, : rank or None] for name, tensor in self.B.items()}
        return replace(
            self,
            A={name: tensor[: rank or None] for name, tensor in self.A.items()},
            B=B if scale == 1.0 else {name: tensor / scale for name, tensor in B.items()},
            scaling={name: value * scale for name, value in self.scaling.items()},
        )

    def padded(self, ranks: Mapping[str, int]) -> AdapterState:
        """With slots of zeros up to these ranks; training leaves those zero."""
        if all(ranks[name] == own for name, own in self.ranks.items()):
            return self
        A = {name: pad(tensor, ranks[name], 0) for name, tensor in self.A.items()}
        B = {name: pad(tensor, ranks[name], 1) for name, tensor in self.B.items()}
        return replace(self, A=A, B=B)

    def over(self, base: AdapterState) -> AdapterState:
        """This state where it has a tensor, ``base`` elsewhere."""
        if self == _NOTHING:
            return base
        return AdapterState(
            A={**base.A, **self.A},
            B={**base.B, **self.B},
            other={**base.other, **self.other},
            scaling={**base.scaling, **self.scaling},
            residual={**base.residual, **self.residual},
            added={**base.added, **self.added},
        )

    @cached_property
    def nbytes(self) -> int:
        """Bytes that it takes to send."""
        tensors = (*self.A.values(), *self.B.values(), *self.other.values())
        beside = (*self.residual.values(), *self.added.values())
        return sum(tensor.nbytes for tensor in tensors) + sum(change.nbytes for change in beside)

    @cached_property
    def ranks(self) -> Mapping[str, int]:
        """Module path -> rank."""
        return {
            **{name: tensor.shape[1] for name, tensor in self.B.items()},
            **{name: tensor.shape[0] for name, tensor in self.A.items()},
        }

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Each tensor but the residual's, named ``A/<path>``, ``B/<path>``, ``other/<path>``."""
        for part in ("A", "B", "other"):
            for name, tensor in self.part(part).items():
                yield f"{part}/{name}", tensor

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> AdapterState:
        """A partial state from names as :meth:`tensors` gives them.

        Raises:
            ValueError: for a name of no part.
        """
        parts: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}, "other": {}}
        for name, tensor in tensors.items():
            part, _, path = name.partition("/")
            if part not in parts:
                raise ValueError(f"{name!r} is of no part of an adapter")
            parts[part][path] = tensor
        return cls(parts["A"], parts["B"], parts["other"])

    def to_dict(self) -> dict[str, Any]:
        """Tensors, dicts and numbers only, for ``torch.save`` and back with ``weights_only``."""
        return {
            "A": dict(self.A),
            "B": dict(self.B),
            "other": dict(self.other),
            "scaling": dict(self.scaling),
            "residual": {name: [res.U, res.V] for name, res in self.residual.items()},
            "added": {name: [res.U, res.V] for name, res in self.added.items()},
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> AdapterState:
        """The inverse of :meth:`to_dict`."""
        residual, added = (
            {name: Residual(U, V) for name, (U, V) in state[key].items()}
            for key in ("residual", "added")
        )
        return cls(state["A"], state["B"], state["other"], state["scaling"], residual, added)


_NOTHING = AdapterState()


def pad(factor: Tensor, rank: int, dim: int) -> Tensor:
    """A factor with zeros in its unused slots; ``dim`` is 0 for A, 1 for B."""
    missing = rank - factor.shape[dim]
    if not missing:
        return factor
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim)


@dataclass(frozen=True)
class ClientUpdate:
    """What a client sends after its local training.

    Attributes:
        client: who.
        sent: the public state that it started from (a reference, nothing private in it).
        payload: exactly what travels back: names and bytes are measured here.
        weight: its weight in a mean; num_samples unless a wrapper replaces it.
        extra: also travels and is counted: control variates, clip bits.
        metrics: training figures (loss, accuracy, seconds).
        num_steps: optimizer steps taken.
        down_nbytes: bytes that it received for this round.
    """

    client: Client
    sent: AdapterState
    payload: AdapterState
    weight: float
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    num_steps: int = 0
    down_nbytes: int = 0

    @property
    def adapter(self) -> AdapterState:
        """The whole adapter as the server may know it: the payload over what was sent."""
        return self.payload.over(self.sent)

    @property
    def nbytes(self) -> int:
        """Bytes that travel back."""
        return self.payload.nbytes + sum(tensor.nbytes for tensor in self.extra.values())


@dataclass(frozen=True)
class ServerState:
    """All that the server must keep between rounds.

    Attributes:
        adapter: the global adapter.
        round_idx: rounds completed.
        versions: client id -> round after which its kept state was written.
        received: client id -> the last round in which it was sent anything.
        history: one row of metrics per completed round, row 0 the untrained model.
        finished: why no further round is played ("" while the run goes on).
    """

    adapter: AdapterState
    round_idx: int = 0
    versions: Mapping[int, int] = field(default_factory=dict)
    received: Mapping[int, int] = field(default_factory=dict)
    history: tuple[Mapping[str, float | None], ...] = ()
    finished: str = ""
