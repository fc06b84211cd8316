"""How much of a model is trained and how much travels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fedlora.state import Part


@dataclass(frozen=True)
class ParameterReport:
    """Counts of parameters and of bytes for one way, one client and one round.

    Attributes:
        total: parameters of the model without the adapter.
        adapter: parameters of the adapter.
        full: parameters trained in full besides: head, biases, normalisation layers.
        idle: those of the trained that do not travel: of a tower that the head does not use.
        exchanged: numbers that travel, running statistics included.
        exchanged_nbytes: bytes that they take in the types that they have.
        total_nbytes: bytes of an exchange of the full model, its saved buffers included.
    """

    total: int
    adapter: int
    full: int
    idle: int
    exchanged: int
    exchanged_nbytes: int
    total_nbytes: int

    @classmethod
    def of(
        cls,
        modules: Iterable[nn.Module],
        parameters: Mapping[Part, Mapping[str, nn.Parameter]],
        exchanged: Mapping[str, Tensor],
    ) -> ParameterReport:
        """Count.

        Args:
            modules: each module of the model, adapter included.
            parameters: what is trained.
            exchanged: what travels.
        """
        travels = {id(tensor) for tensor in exchanged.values()}
        trained = [p for part in parameters.values() for p in part.values()]
        idle = [p for p in trained if id(p) not in travels]
        factors = [p for part in ("A", "B") for p in parameters[part].values()]
        mine = {id(p) for p in factors}
        base: dict[int, Tensor] = {}
        buffers: dict[int, Tensor] = {}
        for module in modules:
            unsaved = module._non_persistent_buffers_set
            own = (p for p in module._parameters.values() if p is not None and id(p) not in mine)
            kept = (b for n, b in module._buffers.items() if b is not None and n not in unsaved)
            base.update({id(p): p for p in own})
            buffers.update({id(b): b for b in kept})
        return cls(
            total=sum(p.numel() for p in base.values()),
            adapter=sum(p.numel() for p in factors),
            full=sum(p.numel() for p in parameters["other"].values()),
            idle=sum(p.numel() for p in idle),
            exchanged=sum(t.numel() for t in exchanged.values()),
            exchanged_nbytes=sum(t.nbytes for t in exchanged.values()),
            total_nbytes=sum(t.nbytes for held in (base, buffers) for t in held.values()),
        )

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        return self.adapter + self.full

    @property
    def percent(self) -> float:
        """Trained, in percent of the model."""
        return 100 * self.trained / self.total

    @property
    def reduction(self) -> float:
        """What is spared of the full exchange, in percent of its bytes."""
        return 100 * (1 - self.exchanged_nbytes / self.total_nbytes)

    def __str__(self) -> str:
        """One line for people."""
        idle = f", {self.idle:,} of them in a tower that the head does not use" if self.idle else ""
        return (
            f"{self.trained:,} of {self.total:,} parameters trained ({self.percent:.2f} %){idle}, "
            f"{readable(self.exchanged_nbytes)} of {readable(self.total_nbytes)} exchanged "
            f"({self.reduction:.2f} % less)"
        )


def readable(count: float) -> str:
    """Bytes for people: 1,234,000 -> "1.23 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
